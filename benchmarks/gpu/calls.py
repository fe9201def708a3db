"""Warm calls: with arrays by one thread and by eight, and with everything on the device, by binding."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np

from benchmarks.calls import ARENA, LOW, OURS
from benchmarks.gpu.works import Work, proxy_of, session_of
from benchmarks.report import ADDED, Row
from benchmarks.timing import BASE, Times, Way, figure
from onnx_dl import ModelHost

THREADS: Final = 8
_ON_DEVICE: Final = 25.0
"""Microseconds that a call may take longer where nothing is copied."""
_SPINNING: Final = 0.05
_COLD: Final = 8
"""Calls after a pause that do not count."""


def settled(way: Way) -> Way:
    """A way whose blocks begin when onnxruntime's threads in this process no longer spin: those of a session
    in-process do so for 32 ms after its last call, on cores that a worker's calls need.  A program that uses
    workers has none."""

    def begin() -> None:
        time.sleep(_SPINNING)
        for _ in range(_COLD):
            way.call()

    return dataclasses.replace(way, begin=begin)


def measure(work: Work, rounds: int) -> list[Row]:
    """One thread."""
    with contextlib.ExitStack() as stack:
        ways = list(map(settled, _ways(work, stack)))
        check(ways)
        return _rows(work, Times(ways, work.calls, rounds))


def _ways(work: Work, stack: contextlib.ExitStack) -> Iterator[Way]:
    feed = {"x": work.x}
    session = session_of(work.model)
    yield Way(BASE, lambda: session.run(None, feed))
    host = stack.enter_context(ModelHost())
    proxy = stack.enter_context(proxy_of(work.model, host))
    yield Way(OURS, lambda: proxy.run(None, feed))
    if LOW in work.asked:
        low = stack.enter_context(proxy_of(work.model, host, latency="low"))
        yield Way(LOW, lambda: low.run(None, feed))
    if ARENA in work.asked:
        inside = proxy.empty(work.x.shape, work.x.dtype)
        inside[...] = work.x
        yield Way(ARENA, lambda: proxy.run(None, {"x": inside}))


def check(ways: Sequence[Way]) -> None:
    """That all compute the same, bit for bit, also once a call is prepared and its memory is pinned."""
    expected = None
    for way in ways:
        for _ in range(4):
            (result,) = way.call()
            expected = np.array(result) if expected is None else expected
            if not np.array_equal(result, expected):
                raise AssertionError(f"{way.name} computes something else than {BASE}")


def _rows(work: Work, found: Times) -> list[Row]:
    rows = [figure(work.name, BASE, found.by_round(BASE), "µs", p99=found.p99(BASE))]
    for way, limit in work.asked.items():
        values = found.added(way) if work.unit == ADDED else found.ratios(way)
        asked = None if math.isinf(limit) else limit
        rows.append(figure(work.name, way, values, work.unit, limit=asked, p99=found.p99(way)))
    return rows


# --- threads ---------------------------------------------------------------------------------------------


def threads(work: Work, rounds: int) -> list[Row]:
    """Calls per second of eight threads together, ours by those in-process."""
    feed = {"x": work.x}
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(THREADS))
        session = session_of(work.model)
        proxy = stack.enter_context(proxy_of(work.model, stack.enter_context(ModelHost())))
        ways = {BASE: lambda: session.run(None, feed), OURS: lambda: proxy.run(None, feed)}
        found: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds + 1):
            for name in ways if turn % 2 else reversed(ways):
                speed = _speed(pool, ways[name], work.calls)
                if turn:
                    found[name].append(speed)
    name = f"{work.name}, {THREADS} threads"
    ratios = [ours / base for ours, base in zip(found[OURS], found[BASE], strict=True)]
    return [
        *(figure(name, way, values, "/s") for way, values in found.items()),
        figure(name, f"{OURS}, by in-process", ratios, "x", limit=1.0, at_least=True),
    ]


def _speed(pool: concurrent.futures.ThreadPoolExecutor, call: Callable[[], object], count: int) -> float:
    """Calls per second; each thread's first ones, which open its lane, are not counted."""

    def work(calls: int) -> None:
        for _ in range(calls):
            call()

    time.sleep(_SPINNING)
    list(pool.map(work, [_COLD] * THREADS))
    started = time.perf_counter()
    list(pool.map(work, [count] * THREADS))
    return THREADS * count / (time.perf_counter() - started)


# --- all on the device -----------------------------------------------------------------------------------


def bound(work: Work, rounds: int) -> list[Row]:
    """Input and output are tensors of this process on the device."""
    name = f"{work.name.split(',')[0].removesuffix(' in and out')}, all on the device"
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(proxy_of(work.model, stack.enter_context(ModelHost())))
        (expected,) = (session := session_of(work.model)).run(None, {"x": work.x})
        ways = [_bound(BASE, session, work, expected), _bound(OURS, proxy, work, expected)]
        found = Times(list(map(settled, ways)), work.calls, rounds)
    return [
        figure(name, BASE, found.by_round(BASE), "µs", p99=found.p99(BASE)),
        figure(name, OURS, found.added(OURS), ADDED, limit=_ON_DEVICE, p99=found.p99(OURS)),
    ]


def _bound(name: str, session: Any, work: Work, expected: np.ndarray) -> Way:
    import onnxruntime

    value = onnxruntime.OrtValue
    x = value.ortvalue_from_numpy(work.x, "cuda", 0)
    y = value.ortvalue_from_numpy(np.zeros_like(expected), "cuda", 0)
    binding = session.io_binding()
    binding.bind_input("x", "cuda", 0, np.float32, list(work.x.shape), x.data_ptr())
    binding.bind_output("y", "cuda", 0, np.float32, list(expected.shape), y.data_ptr())

    def call(kept: tuple[Any, Any] = (x, y)) -> None:  # their memory is bound, not they
        session.run_with_iobinding(binding)

    for _ in range(3):
        call()
    if not np.array_equal(y.numpy(), expected):
        raise AssertionError(f"{name} computes something else by a binding")
    return Way(name, call)
