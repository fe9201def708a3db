"""Finds the line of a key in a TOML text, and of nesting that is too deep to be parsed.

tomllib has line numbers for syntax errors only.  One pass over strings, comments and brackets separates the
statements, in time proportional to the length of the text.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from typing import Any, Final

Keys = tuple[str, ...]
"""A key by its parts: ``("models", "vad", "ttl")``."""

_TOKEN: Final = re.compile(
    r'''"""(?:[^"\\]|\\[\s\S]|"(?!""))*(?:"{3,5}|\Z)'''
    r"""|'''(?:[^']|'(?!''))*(?:'{3,5}|\Z)"""
    r"""|"(?:[^"\\\n]|\\.)*"?"""
    r"""|'[^'\n]*'?"""
    r"""|\#[^\n]*"""
    r"""|[\[\]{}.=,\n]"""
)
"""Whole strings and comments, and the single characters outside of them that can end a statement.
An unclosed string ends with its line or the text, so that invalid TOML is read in one pass, too."""


def line_of(text: str, keys: Sequence[str]) -> int:
    """Number (from 1) of the line where a key first occurs in a valid TOML text.

    For a missing key, or one within an array, the line of the nearest key around it.
    """
    lines = _lines(text)
    around = (tuple(keys[:count]) for count in range(len(keys), 0, -1))
    return next((lines[part] for part in around if part in lines), 1)


def too_deep(text: str, most: int) -> int | None:
    """The first line with more than ``most`` open brackets or parts of one key; None: there is none.

    The text need not be valid TOML.
    """
    line, depth, parts = 1, 0, 0
    for token in _TOKEN.findall(text):
        if token in "[{":
            depth += 1
        elif token in "]}":
            depth -= 1
        parts = parts + 1 if token == "." else 0 if token in "[]{}=,\n" else parts
        if depth > most or parts >= most:
            return line
        line += token.count("\n")
    return None


def _lines(text: str) -> dict[Keys, int]:
    found: dict[Keys, int] = {}
    table: Keys = ()
    for line, statement in _statements(text.replace("\r\n", "\n")):
        parsed = tomllib.loads(statement)
        is_header = statement.lstrip().startswith("[")
        table = () if is_header else table
        for keys in _paths(parsed, table):
            found.setdefault(keys, line)
            table = keys if is_header else table
    return found


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Headers and assignments with their first lines.  Each ends at a newline outside of all brackets."""
    line = first = 1
    begin = depth = 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token == "\n" and depth == 0:
            yield first, text[begin : match.start()]
            begin, first = match.end(), line + 1
        depth += (token in "[{") - (token in "]}")
        line += token.count("\n")
    yield first, text[begin:]


def _paths(table: dict[str, Any], above: Keys) -> Iterator[Keys]:
    """All keys in a table, each before the keys inside it."""
    for key, value in table.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from _paths(value, (*above, key))
