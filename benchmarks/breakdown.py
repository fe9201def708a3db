"""Where the time of one tiny call goes, by step, as its caller sees it.

The steps of the caller are timed by wrapping the methods of a living lane.  What remains is the worker's: its
Python, the run itself and two wake-ups, of which a bare round trip of the same eventfd and pipe is shown
beside it.  Where both share a core, the worker runs as soon as the caller rings, and its time shows there.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.calls import figure, proxy_of
from benchmarks.models import cases
from benchmarks.report import Row
from onnx_dl import ModelHost

_STEPS = {
    "call": "caller: find the plan, copy the input",
    "again": "ring: worker and two wake-ups",
    "next": "wait for what is left of that",
    "result": "caller: copy the result",
}


def measure(rounds: int) -> list[Row]:
    """Medians over rounds of each step's median."""
    case = cases()[0]
    work = "one tiny call, by step"
    with ModelHost() as host:
        proxy = proxy_of(case.model, host)
        for _ in range(500):
            proxy.run(None, case.feed)
        lane = proxy._remote._lanes[-1]
        times: dict[str, list[float]] = {}
        for name, owner in (("call", lane), ("again", lane._calls), ("next", lane._calls), ("result", lane)):
            setattr(owner, name, _timed(getattr(owner, name), times.setdefault(name, [])))
        found: dict[str, list[float]] = {}
        for _ in range(rounds):
            whole = []
            for _ in range(400):
                started = time.perf_counter()
                proxy.run(None, case.feed)
                whole.append((time.perf_counter() - started) * 1e6)
            known = {_STEPS[name]: statistics.median(values[-400:]) for name, values in times.items()}
            total = statistics.median(whole)
            known |= {"caller: the rest": total - sum(known.values()), "all": total}
            for name, value in known.items():
                found.setdefault(name, []).append(value)
        proxy.close()
    rows = [figure(work, name, values, "µs") for name, values in found.items()]
    return [*rows, figure(work, "a bare round trip, near", [_round_trip() for _ in range(rounds)], "µs")]


def _timed(method: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            times.append((time.perf_counter() - started) * 1e6)

    return timed


def _round_trip(count: int = 500) -> float:
    """An eventfd there and a pipe back, the child on the caller's core."""
    eventfd, (read, write) = os.eventfd(0), os.pipe()
    child = os.fork()
    if not child:
        while True:
            os.eventfd_read(eventfd)
            os.write(write, b"1")
    os.sched_setaffinity(child, {_here()})
    times = []
    for _ in range(count):
        started = time.perf_counter()
        os.eventfd_write(eventfd, 1)
        os.read(read, 1)
        times.append((time.perf_counter() - started) * 1e6)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for fd in (eventfd, read, write):
        os.close(fd)
    return statistics.median(times)


def _here() -> int:
    import ctypes

    return int(ctypes.CDLL(None).sched_getcpu())
