"""Which files beside an ONNX file hold its weights.

Reads just enough of the protobuf for that (onnx.proto: field numbers below), without the onnx package, which
users need not have, and without reading the weights.
"""

from __future__ import annotations

import contextlib
import mmap
import os
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


def bytes_of(path: str) -> int:
    """Of a model's file and of those beside it that hold its weights; 0 for what cannot be looked at."""
    total = 0
    with contextlib.suppress(OSError, ValueError):
        total += os.path.getsize(path)
        total += sum(map(os.path.getsize, external_files(path)))
    return total


def external_files(path: str) -> list[str]:
    """Paths of the files that a model's tensors lie in.

    Raises:
        OSError, ValueError: it cannot be read, or is no model.
    """
    if not os.path.getsize(path):
        return []
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        names = set(_locations(data, 0, len(data), "model"))
    return sorted(os.path.join(os.path.dirname(os.path.abspath(path)), name) for name in names)


def _locations(data: mmap.mmap, start: int, end: int, kind: str) -> Iterator[str]:
    inside = _INSIDE[kind]
    for field, first, last in _fields(data, start, end):
        if inside.get(field) == "entry":
            pair = {number: data[a:b] for number, a, b in _fields(data, first, last)}
            if pair.get(1) == b"location":
                yield pair.get(2, b"").decode()
        elif field in inside:
            yield from _locations(data, first, last, inside[field])


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, first and last byte of every field that has a length."""
    while at < end:
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == _BYTES:
            size, at = _varint(data, at)
            if at + size > end:
                raise ValueError("not a model: a field is longer than its message")
            yield tag >> 3, at, at + size
            at += size
        elif wire == _VARINT:
            _, at = _varint(data, at)
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"not a model: wire type {wire}")


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data):
            raise ValueError("not a model: it ends too soon")
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
