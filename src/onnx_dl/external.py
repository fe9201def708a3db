"""Which files beside an ONNX file hold its weights.

Reads just enough of the protobuf for that (onnx.proto: field numbers below), without the onnx package, which
users need not have, and without reading the weights.  A file may be anything: what is no model ends in a
ValueError, never in a crash, and an application looks for a bounded time only.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import time
from collections.abc import Iterator
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
            total += os.path.getsize(name)
    return total


def external_files(path: str) -> list[str]:
    """Paths of the files that a model's tensors lie in.

    Raises:
        OSError, ValueError: it cannot be read, or is no model.
    """
    return sorted(set(_names(path, None)))


def _names(path: str, until: float | None) -> Iterator[str]:
    """Yields each as it is found, until this time, so that what was found by then counts."""
    if not os.path.getsize(path):
        return
    folder = os.path.dirname(os.path.abspath(path))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for name in _Walk(data, until).locations(0, len(data), "model", 0):
            yield os.path.join(folder, name)


class _Walk:
    """Through one file."""

    def __init__(self, data: mmap.mmap, until: float | None) -> None:
        self._data = data
        self._until = until
        self._fields_seen = 0

    def locations(self, start: int, end: int, kind: str, depth: int) -> Iterator[str]:
        if depth > _DEEPEST:
            raise ValueError(f"not a model: more than {_DEEPEST} messages within each other")
        inside = _INSIDE[kind]
        for field, first, last in self._fields(start, end):
            if inside.get(field) == "entry":
                pair = {number: self._data[a:b] for number, a, b in self._fields(first, last)}
                if pair.get(1) == b"location":
                    yield pair.get(2, b"").decode()
            elif field in inside:
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

    def _varint(self, at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            if at >= len(self._data):
                raise ValueError("not a model: it ends too soon")
            if shift > 63:
                raise ValueError("not a model: a number of more than 64 bits")
            byte = self._data[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value, at
