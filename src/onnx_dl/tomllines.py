"""On which line of a TOML text a key stands.  tomllib tells that of syntax errors only."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Sequence
from typing import Any

Keys = tuple[str, ...]
"""A key by its parts: ``("models", "vad", "ttl")``."""


def line_of(text: str, keys: Sequence[str]) -> int:
    """The line, from 1, on which a key first stands in a valid TOML text.

    A key that stands nowhere, or within an array, is looked for where the nearest key around it stands.
    """
    lines = _lines(text)
    around = (tuple(keys[:count]) for count in range(len(keys), 0, -1))
    return next((lines[part] for part in around if part in lines), 1)


def _lines(text: str) -> dict[Keys, int]:
    found: dict[Keys, int] = {}
    table: Keys = ()
    for line, statement in _statements(text):
        parsed = tomllib.loads(statement)
        is_header = statement.lstrip().startswith("[")
        table = () if is_header else table
        for keys in _paths(parsed, table):
            found.setdefault(keys, line)
            table = keys if is_header else table
    return found


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Headers and assignments with their first lines.  Some lines that parse by themselves are a whole one:
    each ends with its line, so none is the beginning of another."""
    first, statement = 1, ""
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        first, statement = (first, f"{statement}\n{line}") if statement else (number, line)
        if _is_whole(statement):
            yield first, statement
            statement = ""


def _is_whole(statement: str) -> bool:
    try:
        tomllib.loads(statement)
    except tomllib.TOMLDecodeError:
        return False
    return True


def _paths(table: dict[str, Any], above: Keys) -> Iterator[Keys]:
    """All keys in it, an outer one before those in it."""
    for key, value in table.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from _paths(value, (*above, key))
