"""Which files beside an ONNX file hold its weights.

Reads just enough of the protobuf for that (onnx.proto: field numbers below), without the onnx package, which
users need not have, and without reading the weights.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Final

from onnx_dl import smallfiles

_DEEPEST: Final = 100
"""Messages within messages, as protobuf itself takes them."""
_MOST_FIELDS: Final = 1_000_000
"""Of which a model of ten thousand nodes has a quarter; so many are looked at within a second."""
_HEAD: Final = 20
"""Bytes of two numbers: what a field is, and how long."""
_CHUNK: Final = 1 << 16
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


def bytes_of(path: str) -> int:
    """Of a model's file and of those beside it that hold its weights; 0 for what cannot be looked at."""
    total = 0
    with contextlib.suppress(OSError, ValueError):
        total += os.path.getsize(path)
        total += sum(map(os.path.getsize, external_files(path)))
    return total


def external_files(path: str) -> list[str]:
    """Paths of the files that a model's tensors lie in.

    Whatever is in the file: it takes a bounded time, and no more than a chunk of it is in memory.

    Raises:
        OSError, ValueError: it cannot be read, or is no model.
    """
    with smallfiles.opened(path) as file:
        data = _Data(file.fileno())
        names = set(_locations(data, 0, os.fstat(file.fileno()).st_size, "model", 0))
    return sorted(os.path.join(os.path.dirname(os.path.abspath(path)), name) for name in names)


class _Data:
    """A file's bytes, read as they are asked for: mapped ones would end the process if the file became
    shorter meanwhile."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._chunk, self._begin = b"", 0
        self._left = _MOST_FIELDS

    def head(self, at: int) -> bytes:
        """Enough bytes for what stands before a field's value.

        Raises:
            ValueError: so many fields were asked for that it takes too long.
        """
        self._left -= 1
        if self._left < 0:
            raise ValueError("not a model that can be looked through: it has too many fields")
        first = at - self._begin
        if not 0 <= first <= len(self._chunk) - _HEAD:
            self._chunk, self._begin, first = os.pread(self._fd, _CHUNK, at), at, 0
        return self._chunk[first : first + _HEAD]

    def text(self, first: int, last: int) -> str:
        return os.pread(self._fd, min(last - first, _CHUNK), first).decode()


def _locations(data: _Data, start: int, end: int, kind: str, depth: int) -> Iterator[str]:
    inside = _INSIDE[kind]
    if depth > _DEEPEST:
        raise ValueError("not a model: its messages are nested too deeply")
    for field, first, last in _fields(data, start, end):
        if inside.get(field) == "entry":
            pair = {number: (a, b) for number, a, b in _fields(data, first, last)}
            if 1 in pair and 2 in pair and data.text(*pair[1]) == "location":
                yield data.text(*pair[2])
        elif field in inside:
            yield from _locations(data, first, last, inside[field], depth + 1)


def _fields(data: _Data, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, first and last byte of every field that has a length."""
    while at < end:
        head = data.head(at)
        tag, size = _varint(head, 0)
        wire = tag & 7
        if wire == _BYTES:
            length, size = _varint(head, size)
            if at + size + length > end:
                raise ValueError("not a model: a field is longer than its message")
            yield tag >> 3, at + size, at + size + length
            at += size + length
        elif wire == _VARINT:
            at += _varint(head, size)[1]
        elif wire in (_FIXED64, _FIXED32):
            at += size + (8 if wire == _FIXED64 else 4)
        else:
            raise ValueError(f"not a model: wire type {wire}")


def _varint(head: bytes, at: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = shift = 0
    for byte in head[at : at + 10]:
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("not a model: it ends too soon, or has too long a number")
