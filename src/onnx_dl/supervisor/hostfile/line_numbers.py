"""On which line of a TOML text a key stands, and where a text is nested too deeply to be read.

tomllib tells the lines of syntax errors only.  Statements are told apart by strings, comments and brackets,
in one pass over the text, so that a long array costs no more than its length.
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
"""What tells where a statement ends: strings and comments, whole, and single characters outside of them.
Each form that is not closed ends with its line or the text, so a text that is no TOML is read once, too."""


def line_of(text: str, keys: Sequence[str]) -> int:
    """The line, from 1, on which a key first stands in a valid TOML text.

    A key that stands nowhere, or within an array, is looked for where the nearest key around it stands.
    """
    lines = _lines(text)
    around = (tuple(keys[:count]) for count in range(len(keys), 0, -1))
    return next((lines[part] for part in around if part in lines), 1)


def too_deep(text: str, most: int) -> int | None:
    """The first line with more than ``most`` brackets that are open, or parts of one key; None: there is
    none.  The text need not be TOML."""
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
    """Headers and assignments with their first lines: each ends with a line outside of all brackets."""
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
    """All keys in it, an outer one before those in it."""
    for key, value in table.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from _paths(value, (*above, key))
