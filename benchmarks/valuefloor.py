"""The least that a process boundary can cost in Python where values are no tensors of numbers.

Like :mod:`benchmarks.floor`: two wake-ups by bare pipes, both ends on one core, and shared memory.  Text and
maps are msgpack in it; arrays of numbers are copied.  No errors, no lifecycle; no value may change its kind.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, Final

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import msgspec
import numpy as np

from benchmarks.floor import _current_core, _session

_ROOM: Final = 16 << 20
"""Bytes for each value."""
_LENGTH: Final = struct.Struct("=Q")
_DECODE: Final = msgspec.msgpack.Decoder().decode
_ENCODE: Final = msgspec.msgpack.Encoder().encode


class _Place:
    """Where one value lies."""

    def __init__(self, memory: mmap.mmap, index: int, form: Sequence[Any] | None) -> None:
        """``form``: dtype and shape of an array; dtype ``O`` is text; None: neither."""
        self._bytes = memoryview(memory)[index * _ROOM : (index + 1) * _ROOM]
        self._is_text = form is not None and form[0] == "O"
        self._array = None
        if form is not None and not self._is_text:
            self._array = np.ndarray(tuple(form[1]), form[0], memory, index * _ROOM)

    def put(self, value: Any) -> None:
        if self._array is not None:
            self._array[...] = value
            return
        data = _ENCODE(value.tolist() if self._is_text else value)
        _LENGTH.pack_into(self._bytes, 0, len(data))
        self._bytes[8 : 8 + len(data)] = data

    def get(self) -> Any:
        if self._array is not None:
            return self._array
        (nbytes,) = _LENGTH.unpack_from(self._bytes, 0)
        value = _DECODE(self._bytes[8 : 8 + nbytes])
        return np.array(value, object) if self._is_text else value


def _places(memory: int, forms: Sequence[Any]) -> list[_Place]:
    mapped = mmap.mmap(memory, _ROOM * len(forms))
    return [_Place(mapped, index, form) for index, form in enumerate(forms)]


def _form(value: Any) -> list[Any] | None:
    if not isinstance(value, np.ndarray):
        return None
    return ["O" if value.dtype == object else value.dtype.str, value.shape]


class ValueFloor:
    """One child with one session."""

    name = "floor: bare pipe, one core"

    def __init__(self, model: bytes, feed: dict[str, Any], results: Sequence[Any]) -> None:
        forms = list(map(_form, (*feed.values(), *results)))
        there, self._write = os.pipe()
        self._read, back = os.pipe()
        memory = os.memfd_create("floor")
        os.ftruncate(memory, _ROOM * len(forms))
        places = _places(memory, forms)
        self._inputs, self._results = places[: len(feed)], places[len(feed) :]
        self._cores = os.sched_getaffinity(0)
        theirs = [memory, there, back]
        with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
            file.write(model)
            file.flush()
            orders = json.dumps([file.name, list(feed), forms, *theirs])
            self._child = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.valuefloor", orders], pass_fds=theirs
            )
            for fd in theirs:
                os.close(fd)
            os.read(self._read, 1)  # the session is there

    def run(self, feed: dict[str, Any]) -> list[Any]:
        """Arrays of numbers in the results are views that the next call overwrites."""
        for place, value in zip(self._inputs, feed.values(), strict=True):
            place.put(value)
        os.write(self._write, b"1")
        if not os.read(self._read, 1):
            raise RuntimeError("the child of a floor ended")
        return [place.get() for place in self._results]

    def begin(self) -> None:
        """A block begins."""
        here = {_current_core()}
        os.sched_setaffinity(0, here)
        os.sched_setaffinity(self._child.pid, here)

    def end(self) -> None:
        """It ends; the caller's thread may run anywhere again."""
        os.sched_setaffinity(0, self._cores)

    def close(self) -> None:
        self._child.kill()
        self._child.wait()
        for fd in (self._read, self._write):
            os.close(fd)


def _main(path: str, names: list[str], forms: list[Any], memory: int, read: int, write: int) -> None:
    session = _session(path, 1)
    places = _places(memory, forms)
    inputs, outputs = dict(zip(names, places, strict=False)), places[len(names) :]
    wanted = [node.name for node in session.get_outputs()]
    os.write(write, b"1")
    while os.read(read, 1):
        feed = {name: place.get() for name, place in inputs.items()}
        for place, result in zip(outputs, session._sess.run(wanted, feed, None), strict=True):
            place.put(result)
        os.write(write, b"1")


if __name__ == "__main__":
    _main(*json.loads(sys.argv[1]))
