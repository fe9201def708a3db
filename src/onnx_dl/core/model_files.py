"""Which files beside an ONNX file hold its weights.

Reads just enough of the protobuf for that (onnx.proto: field numbers below), without the onnx package, which
users need not have, and without reading the weights.  A file may be anything: what is no model ends in a
ValueError, never in a crash, and an application looks for a bounded time only.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import Final

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Where tensors are: message -> field -> the message in it.
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
"""Messages within each other; protobuf's own parsers refuse more."""
_LONGEST_LOOK: Final = 0.05
"""Seconds that an application looks through a model; what it has not found by then is not counted."""
_LOOK_AT_CLOCK: Final = 64
"""Fields between two looks at the clock."""
_LONGEST_NAME: Final = 4096
"""Bytes of a path, on Linux."""
_LOCATION: Final = b"location"
"""The key of the entry that names a tensor's file."""
_SEARCHED: Final = 64 << 10
"""Bytes of a message that is searched before it is looked through field by field."""
_WINDOW: Final = 4096
"""Bytes that are read at a time."""


def bytes_of(path: str) -> int:
    """Of a model's file and of those beside it that hold its weights; 0 for what cannot be looked at.

    Takes 50 ms at most, plus what the disk takes; where that is too little, not all of the files count.
    """
    total = 0
    found: set[str] = set()
    with contextlib.suppress(OSError, ValueError):
        if stat.S_ISREG((about := os.stat(path)).st_mode):  # to open a FIFO would wait
            total += about.st_size
            for name in _names(path, time.monotonic() + _LONGEST_LOOK):
                found.add(name)
    for name in found:
        with contextlib.suppress(OSError, ValueError):
            total += os.path.getsize(os.path.join(os.path.dirname(path), name))
    return total


def external_files(model: str | int) -> list[str]:
    """Names of the files that the tensors of a model lie in, which has this path or lies in the memory of
    this descriptor; they are looked for beside it.

    Raises:
        OSError, ValueError: it cannot be read, or is no model.
    """
    return sorted(set(_names(model, None)))


def _names(path: str | int, until: float | None) -> Iterator[str]:
    """Yields each as it is found, until this time, so that what was found by then counts."""
    if not (size := os.path.getsize(path)):  # so is a FIFO, to open which would wait
        return
    with open(path, "rb", closefd=isinstance(path, str)) as file:
        # Not mapped: to look at a page of a file that somebody shortens meanwhile ends the process.
        walk = _Walk(functools.partial(os.pread, file.fileno()), until)
        yield from walk.locations(0, size, "model", 0)


class _Walk:
    """Through one model.  ``read``: tells so many bytes from this place on, or fewer at its end."""

    def __init__(self, read: Callable[[int, int], bytes], until: float | None) -> None:
        self._read = read
        self._until = until
        self._fields_seen = 0
        self._window = b""
        self._window_at = 0

    def locations(self, start: int, end: int, kind: str, depth: int) -> Iterator[str]:
        if depth > _DEEPEST:
            raise ValueError(f"not a model: more than {_DEEPEST} messages within each other")
        inside = _INSIDE[kind]
        for field, first, last in self._fields(start, end):
            if inside.get(field) == "entry":
                pair = {number: self._text(a, b) for number, a, b in self._fields(first, last)}
                if pair.get(1) == _LOCATION:
                    yield pair.get(2, b"").decode()
            elif field in inside and self._may_tell(first, last):
                yield from self.locations(first, last, inside[field], depth + 1)

    def _fields(self, at: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Number, first and last byte of every field that has a length."""
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
        late = self._until is not None and self._fields_seen % _LOOK_AT_CLOCK == 0
        if late and self._until is not None and time.monotonic() >= self._until:
            raise ValueError("too large to be looked through here")

    def _may_tell(self, first: int, last: int) -> bool:
        """False: a message is short enough to be searched, and names no file.  Most nodes are."""
        return last - first > _SEARCHED or _LOCATION in self._read(last - first, first)

    def _text(self, first: int, last: int) -> bytes:
        """What lies there, if it can be a name."""
        return self._read(last - first, first) if last - first <= _LONGEST_NAME else b""

    def _varint(self, at: int) -> tuple[int, int]:
        value = shift = 0
        while shift <= 63:
            offset = at - self._window_at
            if not 0 <= offset < len(self._window):
                self._window, self._window_at, offset = self._read(_WINDOW, at), at, 0
                if not self._window:
                    raise ValueError("not a model: it ends too soon")
            byte = self._window[offset]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value, at
        raise ValueError("not a model: a number of more than 64 bits")
