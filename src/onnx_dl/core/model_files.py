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
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import msgspec

from onnx_dl import linux_only
from onnx_dl.core.wire import BYTES, Field, NotAMessage, WireReader

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
_LONGEST_NAME: Final = 4096
"""Largest number of bytes of a path, on Linux."""
_LOCATION: Final = b"location"
"""The key of the entry with the name of a tensor's file."""
_SEARCHED: Final = 64 << 10
"""Largest number of bytes of a message that is searched for the key before its fields are read."""


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
        reader = WireReader(
            functools.partial(linux_only.pread, file.fileno()), size, until=until, most_fields=sys.maxsize
        )
        try:
            yield from _locations(reader, 0, size, "model", 0)
        except NotAMessage as error:
            raise ValueError(f"not a model: {error}") from None


def _locations(reader: WireReader, start: int, end: int, kind: str, depth: int) -> Iterator[str]:
    if depth > _DEEPEST:
        raise ValueError(f"not a model: messages are nested deeper than {_DEEPEST}")
    inside = _INSIDE[kind]
    for field in reader.fields(start, end):
        number, wire, _, first, last = field
        if wire != BYTES or number not in inside:
            continue
        if inside[number] == "entry":
            # A field of another wire type is not known to protobuf, and does not replace one of this number.
            parts = (part for part in reader.fields(first, last) if part.wire == BYTES)
            pair = {part.number: _text(reader, part) for part in parts}
            if pair.get(1) == _LOCATION:
                yield pair.get(2, b"").decode()
        # A short message without the key is skipped.  That is so for most nodes.
        elif last - first > _SEARCHED or _LOCATION in reader.data(field):
            yield from _locations(reader, first, last, inside[number], depth + 1)


def _text(reader: WireReader, field: Field) -> bytes:
    """The bytes of a field, if they are short enough for a name."""
    return reader.data(field) if field.end - field.start <= _LONGEST_NAME else b""


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
