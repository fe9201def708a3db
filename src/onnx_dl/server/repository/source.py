"""Origin of a configuration, and what is said about it: refusals with file and line, and notes."""

from __future__ import annotations

from typing import Any, NoReturn

import msgspec

from onnx_dl.server.repository import schema, text_format
from onnx_dl.server.repository.schema import Path
from onnx_dl.server.repository.text_format import Malformed


class Refused(ValueError):
    """A configuration that cannot be used; the message has file and line."""


class Source:
    """One configuration as plain data in Triton's JSON form, with the fields that were given only.

    ``name``: the file, or what else the configuration is; ``notes``: what is told once in the log.
    """

    def __init__(self, name: str, plain: dict[str, Any], lines: dict[Path, int] | None = None) -> None:
        self.name = name
        self.plain = plain
        self.notes: list[str] = []
        self._lines = lines or {}

    @classmethod
    def of_text(cls, text: str, file: str) -> Source:
        """Reads config.pbtxt.  Raises Refused."""
        lines: dict[Path, int] = {}
        try:
            return cls(file, schema.of_tree(text_format.parse(text), lines), lines)
        except Malformed as error:
            raise Refused(f"{file}:{error.line or 1}: {_ended(str(error))}") from None

    @classmethod
    def of_json(cls, text: str | bytes, name: str) -> Source:
        """Reads the JSON of a load request.  Raises Refused."""
        try:
            value = msgspec.json.decode(text)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise Refused(f"{name} is not JSON: {_ended(str(error))}") from None
        try:
            return cls(name, schema.of_json(value))
        except Malformed as error:
            raise Refused(f"{name}: {_ended(str(error))}") from None

    def get(self, *path: str | int, default: Any = None) -> Any:
        """The value at a path; ``default`` if it was not given."""
        found: Any = self.plain
        for part in path:
            try:
                found = found[part]
            except (KeyError, IndexError):
                return default
        return found

    def refuse(self, path: Path, sentence: str) -> NoReturn:
        """Raises Refused, with the line of the value at this path, or of what it is in."""
        line = self._line(path)
        where = f"{self.name}:{line}" if line else self.name
        raise Refused(f"{where}: {_ended(sentence)}")

    def note(self, path: Path, sentence: str) -> None:
        """Remembers what is to be told once."""
        line = self._line(path)
        where = f"{self.name}:{line}" if line else self.name
        self.notes.append(f"{where}: {_ended(sentence)}")

    def _line(self, path: Path) -> int:
        for end in range(len(path), 0, -1):
            if line := self._lines.get(path[:end]):
                return line
        return 1 if self._lines else 0


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith((".", "?")) else f"{sentence}."
