"""Notes when methods begin and end, in the caller and in the worker, by wrapping them at run time.

The code that is measured knows nothing of it.  In the worker, :data:`HOOK` sees to it: a ``sitecustomize``
on ``PYTHONPATH`` that wraps in every child that the template forks.  Both processes read the same clock.
"""

from __future__ import annotations

import functools
import importlib
import mmap
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

VARIABLE: Final = "ONNX_DL_BENCHMARK_STAMPS"
HOOK: Final = """
import os, sys

def wrap():
    if "onnx_dl.workers.worker" in sys.modules:
        from benchmarks import stamps
        stamps.patch(stamps.WORKER, stamps.Stamps(os.environ[stamps.VARIABLE]))

os.register_at_fork(after_in_child=wrap)
"""
_MOST: Final = 100_000


class Stamps:
    """A shared file of marks and times.  One thread of one process writes to it."""

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(fd, 16 * (_MOST + 1))
            self._words = memoryview(mmap.mmap(fd, 16 * (_MOST + 1))).cast("Q")
        finally:
            os.close(fd)

    def note(self, mark: int) -> None:
        """A mark at this time; none any more once the file is full."""
        words = self._words
        at = words[0]
        if at < _MOST:
            words[2 * at + 2] = time.perf_counter_ns()
            words[2 * at + 1] = mark
            words[0] = at + 1

    def take(self) -> list[tuple[int, int]]:
        """Time and mark of all, which are forgotten."""
        count, self._words[0] = self._words[0], 0
        return [(self._words[2 * i + 2], self._words[2 * i + 1]) for i in range(count)]


class Point(NamedTuple):
    """A method, and the marks to leave before and after it.  ``made``: not around the method, but around the
    ``run`` of what it returns."""

    module: str
    owner: str
    method: str
    before: int | None = None
    after: int | None = None
    made: bool = False


(CALL, READ, LANE, PACKED, RING, WOKEN, ASKED, RUN, RAN, ANSWER, HEARD, UNPACKED, RETURNED) = range(13)

CLIENT: Final = (
    Point("onnx_dl.session.inference_session", "InferenceSessionProxy", "run", CALL, RETURNED),
    Point("onnx_dl.client.remote_model", "RemoteModel", "run", READ),
    Point("onnx_dl.client.lane_pool", "LanePool", "take", None, LANE),
    Point("onnx_dl.tensors.call_codec", "CallCodec", "encode_call", None, PACKED),
    Point("onnx_dl.transport.doorbell", "CallerBell", "ring", RING),
    Point("onnx_dl.transport.call_channel", "CallerBellChannel", "next", None, HEARD),
    Point("onnx_dl.tensors.call_codec", "CallCodec", "decode", None, UNPACKED),
    # The same steps of a repeated call of small arrays.
    Point("onnx_dl.client.remote_model", "RemoteModel", "repeat", READ),
    Point("onnx_dl.tensors.repeated_call", "RepeatedCall", "fill", LANE, PACKED),
    Point("onnx_dl.transport.call_channel", "CallerBellChannel", "repeat", None, HEARD),
    Point("onnx_dl.tensors.repeated_call", "RepeatedCall", "results", None, UNPACKED),
)
WORKER: Final = (
    Point("onnx_dl.transport.call_channel", "WorkerBellChannel", "next", None, WOKEN),
    Point("onnx_dl.workers.prepared_calls", "PreparedCalls", "replay_number", ASKED),
    Point(
        "onnx_dl.workers.prepared_calls", "PreparedCalls", "replay", ASKED
    ),  # of inputs that lie in shared memory
    Point("onnx_dl.workers.engines.ort", "OnnxRuntimeBackend", "bind", RUN, RAN, made=True),
    Point("onnx_dl.transport.doorbell", "WorkerBell", "ring", ANSWER),
)


def _around(call: Callable[..., Any], point: Point, stamps: Stamps) -> Callable[..., Any]:
    note, before, after = stamps.note, point.before, point.after

    @functools.wraps(call)
    def stamped(*args: Any, **more: Any) -> Any:
        if before is not None:
            note(before)
        result = call(*args, **more)
        if after is not None:
            note(after)
        return result

    return stamped


def _around_made(make: Callable[..., Any], point: Point, stamps: Stamps) -> Callable[..., Any]:
    def stamped(*args: Any) -> Any:
        made = make(*args)
        return (
            None if made is None else made._replace(run=_around(functools.partial(made.run), point, stamps))
        )

    return stamped


def patch(points: Sequence[Point], stamps: Stamps) -> Callable[[], None]:
    """Wraps; returns what undoes it.

    Raises:
        AttributeError: a method has another name now.
    """
    undo: list[Callable[[], None]] = []
    for point in points:
        owner = getattr(importlib.import_module(point.module), point.owner)
        own = owner.__dict__.get(point.method)
        wrap = _around_made if point.made else _around
        setattr(owner, point.method, wrap(getattr(owner, point.method), point, stamps))
        undo.append(
            functools.partial(delattr, owner, point.method)
            if own is None  # inherited
            else functools.partial(setattr, owner, point.method, own)
        )
    return lambda: [take_back() for take_back in undo] and None
