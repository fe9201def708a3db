"""The least that a process boundary can cost in Python: a wake-up each way, and arrays in shared memory.

No arena, no leases, no errors, no lifecycle: what is here in addition to in-process is two wake-ups and one
copy of the inputs; results are views that the next call overwrites.  The two ends are woken by a pipe, by a
socket pair, or not at all: they spin.  ``one_core``: both ends share a core while they are measured, where a
wake-up is cheapest (and nobody else may want that core); else the scheduler places them as it likes.
"""

from __future__ import annotations

import collections
import ctypes
import fcntl
import itertools
import json
import math
import mmap
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np

_PAGE: Final = 4096
_LOOKS: Final = 50_000
"""How often a spinning child looks for the next call before it sleeps: it must burn no core in the turns of
the other ways."""
_CALL, _ASLEEP = 0, 1  # words of the first page
GUARDED: Final = "guarded"
_ASKED, _BEGUN, _BUSY, _LAST_USED, _TOTAL, _FIRST = range(2, 8)  # words of it, with guarantees
_GET_MARK: Final = 11  # F_GETSIG

Feed = dict[str, np.ndarray]


class Lane:
    """The caller's end of one way into a child."""

    def __init__(self, feed: Feed, results: Sequence[np.ndarray], how: str) -> None:
        self.shapes = [(array.dtype.str, array.shape) for array in (*feed.values(), *results)]
        self._how = how
        self._read, self._write, *theirs = _ends(how)
        memory = os.memfd_create("floor")
        self.theirs = [memory, *theirs]
        os.ftruncate(memory, _size(self.shapes))
        self._words, *arrays = _views(memory, self.shapes)
        self._inputs = dict(zip(feed, arrays, strict=False))
        self._results = arrays[len(feed) :]

    def run(self, feed: Feed) -> list[np.ndarray]:
        """What is not in ``feed`` is as it was the last time."""
        for name, array in feed.items():
            np.copyto(self._inputs[name], array)
        if self._how == "spin":
            self._spin()
        else:
            os.write(self._write, b"1")
            self.heard()
        return self._results

    def _spin(self) -> None:
        self._words[_CALL] = 1
        if self._words[_ASLEEP]:
            os.write(self._write, b"1")
        looks = 0
        while self._words[_CALL]:
            looks += 1
            if not looks % _LOOKS and select.select([self._read], [], [], 0)[0]:
                self.heard()

    def heard(self) -> None:
        if not os.read(self._read, 1):
            raise RuntimeError("the child of a floor ended")

    def handed_over(self) -> None:
        """The child has its ends: ours would hide its death."""
        for fd in self.theirs:
            os.close(fd)
        self.theirs = []

    def close(self) -> None:
        self.handed_over()
        for fd in {self._read, self._write}:
            os.close(fd)


def _ends(how: str) -> tuple[int, int, int, int]:
    """To read from and to write to: for the caller, and for the child."""
    if how == "socket":
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fd, other = mine.detach(), theirs.detach()
        return fd, fd, other, os.dup(other)
    there, write = os.pipe()
    read, back = os.pipe()
    return read, write, there, back


class GuardedLane(Lane):
    """A pipe with one step for each guarantee that needs one, and with results that are the caller's own.

    The caller compares the call with the last one, has the lane for itself, checks that both descriptors are
    still its own (a program may have closed them), counts the call, and checks which call the answer is for.
    The child notes that it has begun the call, counts it in and out under a lock (draining, TTL), lets other
    threads end it (a token under a lock), and keeps the figures for ``ps`` (two clocks, a histogram).
    """

    def __init__(self, feed: Feed, results: Sequence[np.ndarray], how: str) -> None:
        super().__init__(feed, results, how)
        self._idle = collections.deque([self._write])
        self._marks = [fcntl.fcntl(fd, _GET_MARK) for fd in (self._write, self._read)]
        self._form = [(name, array.dtype, array.shape, self._inputs[name]) for name, array in feed.items()]
        self._calls = self._took = 0

    def run(self, feed: Feed) -> list[np.ndarray]:
        write, read, words = self._idle.pop(), self._read, self._words
        for (name, array), (known, dtype, shape, target) in zip(feed.items(), self._form, strict=True):
            if name != known or array.dtype is not dtype or array.shape != shape:
                raise ValueError("another call")
            target[...] = array
        began = time.perf_counter_ns()
        if [fcntl.fcntl(write, _GET_MARK), fcntl.fcntl(read, _GET_MARK)] != self._marks:
            raise RuntimeError("the descriptors are those of other files")
        self._calls = call = self._calls + 1
        words[_ASKED] = call
        os.write(write, b"1")
        if os.read(read, 1) != b"1" or words[_BEGUN] != call:
            raise RuntimeError("the child of a floor ended")
        results = [result.copy() for result in self._results]
        self._took = time.perf_counter_ns() - began
        self._idle.append(write)
        return results


class Floor:
    """One child with one session, and a thread for each lane.  ``how``: pipe, socket, spin or guarded."""

    def __init__(
        self,
        model: bytes,
        threads: int,
        feed: Feed,
        results: Sequence[np.ndarray],
        how: str,
        *,
        one_core: bool = False,
        lanes: int = 1,
    ) -> None:
        kind = "pipe with guarantees" if how == GUARDED else f"bare {how}"
        self.name = f"floor: {kind}" + (", one core" if one_core else "")
        self._one_core = one_core
        self._cores = os.sched_getaffinity(0)
        self._child: subprocess.Popen[bytes] | None = None
        self.lanes: list[Lane] = []
        try:
            for _ in range(lanes):
                self.lanes.append((GuardedLane if how == GUARDED else Lane)(feed, results, how))
            self._spawn(model, [threads, how, list(feed), self.lanes[0].shapes])
            for lane in self.lanes:
                lane.run(feed)
        except BaseException:
            self.close()
            raise

    def _spawn(self, model: bytes, orders: list[Any]) -> None:
        fds = [lane.theirs for lane in self.lanes]
        with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
            file.write(model)
            file.flush()
            command = [sys.executable, "-m", "benchmarks.floor", json.dumps([file.name, *orders, fds])]
            self._child = subprocess.Popen(command, pass_fds=[*itertools.chain(*fds)])
            for lane in self.lanes:
                lane.handed_over()
            for lane in self.lanes:
                lane.heard()  # the session is there

    def run(self, feed: Feed) -> list[np.ndarray]:
        """By the first lane; see :meth:`Lane.run`."""
        return self.lanes[0].run(feed)

    def begin(self) -> None:
        """A block begins."""
        if self._one_core and self._child is not None:
            here = {_current_core()}
            os.sched_setaffinity(0, here)
            os.sched_setaffinity(self._child.pid, here)

    def end(self) -> None:
        """It ends; the caller's thread may run anywhere again."""
        if self._one_core:
            os.sched_setaffinity(0, self._cores)

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        for lane in self.lanes:
            lane.close()
        self.lanes = []


def _current_core() -> int:
    return int(ctypes.CDLL(None).sched_getcpu())


def _offsets(shapes: Sequence[tuple[str, Sequence[int]]]) -> Iterator[int]:
    """Where each array begins, on pages of its own, and where the last one ends."""
    at = _PAGE
    yield at
    for dtype, shape in shapes:
        at += max(_PAGE, -(-np.dtype(dtype).itemsize * math.prod(shape) // _PAGE) * _PAGE)
        yield at


def _size(shapes: Sequence[tuple[str, Sequence[int]]]) -> int:
    return list(_offsets(shapes))[-1]


def _views(memory: int, shapes: Sequence[tuple[str, Sequence[int]]]) -> list[Any]:
    mapped = mmap.mmap(memory, _size(shapes), flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    arrays = [
        np.ndarray(tuple(shape), dtype, mapped, at)
        for (dtype, shape), at in zip(shapes, _offsets(shapes), strict=False)
    ]
    return [memoryview(mapped)[:_PAGE].cast("Q"), *arrays]


# --- the child -------------------------------------------------------------------------------------------


def _session(path: str, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _bind(session: Any, names: list[str], arrays: list[np.ndarray]) -> Any:
    """Its inputs and outputs where the caller has them."""
    binding = session.io_binding()
    for name, array in zip(names, arrays, strict=False):
        binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    for node, array in zip(session.get_outputs(), arrays[len(names) :], strict=True):
        binding.bind_output(node.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    return binding


def _main(
    path: str, threads: int, how: str, names: list[str], shapes: list[Any], fds: list[list[int]]
) -> None:
    session = _session(path, threads)
    for lane in fds[1:]:
        threading.Thread(target=_serve, args=(session, how, names, shapes, *lane), daemon=True).start()
    # The first lane is the main thread's, whose number is the process's: it can be told where to run.
    _serve(session, how, names, shapes, *fds[0])


def _serve(
    session: Any, how: str, names: list[str], shapes: list[Any], memory: int, read: int, write: int
) -> None:
    words, *arrays = _views(memory, shapes)
    binding = _bind(session, names, arrays)
    os.write(write, b"1")
    if how == GUARDED:
        _serve_guarded(session, binding, words, read, write)
    while how == "spin":
        _look(words, read)
        session.run_with_iobinding(binding)
        words[_CALL] = 0
    while os.read(read, 1):
        session.run_with_iobinding(binding)
        os.write(write, b"1")


def _serve_guarded(session: Any, binding: Any, words: memoryview, read: int, write: int) -> None:
    """See :class:`GuardedLane`."""
    gate, token, running, end = threading.Lock(), threading.Lock(), 0, None
    while os.read(read, 1):
        words[_BEGUN] = words[_ASKED]
        with gate:
            running += 1
            words[_BUSY] = running
        began = time.monotonic()
        with token:
            end = session
        session.run_with_iobinding(binding)
        with token:
            end = None
        os.write(write, b"1")
        now = time.monotonic()
        with gate:
            running -= 1
            took = int((now - began) * 1e9)
            words[_BUSY] = running
            words[_LAST_USED] = int(now * 1e9)
            words[_TOTAL] += took
            words[_FIRST + took.bit_length()] += 1
    del end


def _look(words: memoryview, read: int) -> None:
    """Until there is a call; after a while, asleep."""
    for _ in range(_LOOKS):
        if words[_CALL]:
            return
    words[_ASLEEP] = 1
    while not words[_CALL]:
        # Not without end: who calls may not have seen yet that this is asleep.
        if select.select([read], [], [], 0.01)[0] and not os.read(read, 1):
            raise SystemExit
    words[_ASLEEP] = 0


if __name__ == "__main__":
    _main(*json.loads(sys.argv[1]))
