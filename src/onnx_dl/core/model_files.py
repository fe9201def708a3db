"""The files of an ONNX model: finds its external data, and notices changes.

The search reads only the necessary parts of the protobuf (field numbers as in onnx.proto), without the
weights and without the onnx package, which users may not have.  The file may have any content: one that is
not a model raises ValueError.  An application searches for a limited time only.

A worker records each file's identity before and after it reads it.  Before that worker, or an entry of the
load cache, is used again, the files are compared, by the path that the model would open: a link that points
to another file is a change.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import msgspec

from onnx_dl import linux_only

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# The way to tensors: message -> field -> type of the message in it.
_INSIDE: Final[dict[str, dict[int, str]]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}

_DEEPEST: Final = 100
"""Deepest nesting of messages; protobuf's own parsers refuse more."""
_SEARCH_TIME: Final = 0.05
"""Seconds that an application searches a model; files that it has not found by then do not count."""
_CLOCK_INTERVAL: Final = 64
"""Fields between two checks of the clock."""
_LONGEST_NAME: Final = 4096
"""Largest number of bytes of a path, on Linux."""
_LOCATION: Final = b"location"
"""The key of the entry with the name of a tensor's file."""
_SEARCHED: Final = 64 << 10
"""Largest number of bytes of a message that is searched for the key before its fields are read."""
_WINDOW: Final = 4096
"""Bytes that are read at once."""


def bytes_of(path: str) -> int:
    """Bytes of a model's file and its external data; files that cannot be read count as 0.

    Takes at most 50 ms, plus the time of the disk; if that is too short, some of the files are not counted.
    """
    total = 0
    found: set[str] = set()
    with contextlib.suppress(OSError, ValueError):
        if stat.S_ISREG((about := os.stat(path)).st_mode):  # opening a FIFO would block
            total += about.st_size
            for name in _names(path, time.monotonic() + _SEARCH_TIME):
                found.add(name)
    for name in found:
        with contextlib.suppress(OSError, ValueError):
            total += os.path.getsize(os.path.join(os.path.dirname(path), name))
    return total


def external_files(model: str | int) -> list[str]:
    """Names of a model's external data files, relative to its folder.

    ``model``: its path, or a descriptor of its memory.

    Raises:
        OSError, ValueError: it cannot be read, or is not a model.
    """
    return sorted(set(_names(model, None)))


def _names(path: str | int, until: float | None) -> Iterator[str]:
    """Yields each name as it is found, until this time, so that a caller can count those found so far."""
    if not (size := os.path.getsize(path)):  # also a FIFO, whose opening would block
        return
    with open(path, "rb", closefd=isinstance(path, str)) as file:
        # Not mapped: reading a page of a file that is truncated meanwhile would kill the process.
        walk = _Walk(functools.partial(linux_only.pread, file.fileno()), until)
        yield from walk.locations(0, size, "model", 0)


class _Walk:
    """Walks through one model.  ``read(size, offset)``: returns that many bytes, or fewer at the end."""

    def __init__(self, read: Callable[[int, int], bytes], until: float | None) -> None:
        self._read = read
        self._until = until
        self._fields_seen = 0
        self._window = b""
        self._window_at = 0

    def locations(self, start: int, end: int, kind: str, depth: int) -> Iterator[str]:
        if depth > _DEEPEST:
            raise ValueError(f"not a model: messages are nested deeper than {_DEEPEST}")
        inside = _INSIDE[kind]
        for field, first, last in self._fields(start, end):
            if inside.get(field) == "entry":
                pair = {number: self._text(a, b) for number, a, b in self._fields(first, last)}
                if pair.get(1) == _LOCATION:
                    yield pair.get(2, b"").decode()
            elif field in inside and self._may_name_file(first, last):
                yield from self.locations(first, last, inside[field], depth + 1)

    def _fields(self, at: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Number, start and end of every length-delimited field."""
        while at < end:
            self._count()
            tag, at = self._varint(at)
            wire = tag & 7
            if not tag >> 3:
                raise ValueError("not a model: a field without a number")
            if wire == _BYTES:
                size, at = self._varint(at)
                if at + size > end:
                    raise ValueError("not a model: a field is longer than its message")
                yield tag >> 3, at, at + size
                at += size
            elif wire == _VARINT:
                _, at = self._varint(at)
            elif wire in (_FIXED64, _FIXED32):
                at += 8 if wire == _FIXED64 else 4
            else:
                raise ValueError(f"not a model: wire type {wire}")

    def _count(self) -> None:
        self._fields_seen += 1
        if self._until is None or self._fields_seen % _CLOCK_INTERVAL:
            return
        if time.monotonic() >= self._until:
            raise ValueError("too large to be searched in this time")

    def _may_name_file(self, first: int, last: int) -> bool:
        """False if a short message does not contain the key.  That is so for most nodes."""
        return last - first > _SEARCHED or _LOCATION in self._read(last - first, first)

    def _text(self, first: int, last: int) -> bytes:
        """The bytes, if they are short enough for a name."""
        return self._read(last - first, first) if last - first <= _LONGEST_NAME else b""

    def _varint(self, at: int) -> tuple[int, int]:
        value = shift = 0
        while shift <= 63:
            offset = at - self._window_at
            if not 0 <= offset < len(self._window):
                self._window, self._window_at, offset = self._read(_WINDOW, at), at, 0
                if not self._window:
                    raise ValueError("not a model: unexpected end")
            byte = self._window[offset]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value, at
        raise ValueError("not a model: a number of more than 64 bits")


# --- identities --------------------------------------------------------------------------------------------

Identity = tuple[int, int, int, int]
Where = Callable[[str], str]
"""Maps the name of a file to its path."""


class ReadFile(msgspec.Struct, frozen=True, array_like=True):
    """One file.  ``name``: relative to the model's folder, or absolute; empty: the model itself.

    ``identity``: device, inode, bytes and mtime in ns; None: there was no file.
    """

    name: str
    identity: tuple[int, int, int, int] | None


def identity(path: str) -> Identity | None:
    """The identity of the file at this path, after links; None: there is none, or it cannot be seen."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def identities(where: Where, names: Iterable[str]) -> list[ReadFile]:
    """The present identities of these files."""
    return [ReadFile(name, identity(where(name))) for name in names]


def changed(where: Where, read: Iterable[ReadFile]) -> str | None:
    """The path of the first file that has changed since; None: none has."""
    return next((where(file.name) for file in read if identity(where(file.name)) != file.identity), None)
