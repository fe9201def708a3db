"""Calls by four threads at a time to one model: how many a second."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from benchmarks.calls import OURS, proxy_of
from benchmarks.floor import Floor
from benchmarks.models import Case
from benchmarks.others import Manager, make_session
from benchmarks.report import Row
from benchmarks.timing import BASE, figure
from onnx_dl import ModelHost

THREADS: Final = 4
_PIPES: Final = f"floor: {THREADS} bare pipes, one child"
_CHILDREN: Final = f"floor: {THREADS} bare pipes, a child each"
_INTRA: Final = 1
"""Intra-op threads: the callers fill the cores."""

Call = Callable[[], Any]


def measure(case: Case, count: int, rounds: int) -> list[Row]:
    """``count`` calls by each thread make a block."""
    work = f"{case.name}, {THREADS} threads"
    with contextlib.ExitStack() as stack:
        threads = stack.enter_context(concurrent.futures.ThreadPoolExecutor(THREADS))
        ways = _ways(case, stack)
        found: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds + 1):
            for name, calls in ways.items():
                speed = _speed(threads, calls, count)
                if turn:
                    found[name].append(speed)
    rows = [figure(work, name, values, "/s") for name, values in found.items()]
    return [*rows, *_judged(case, work, found)]


def _ways(case: Case, stack: contextlib.ExitStack) -> dict[str, list[Call]]:
    """By name, the call of each thread."""
    session = make_session(case.model, _INTRA)
    proxy = proxy_of(case.model, stack.enter_context(ModelHost()), threads=_INTRA)
    stack.callback(proxy.close)
    manager = Manager(case.model, _INTRA)
    stack.callback(manager.stop)
    manager.start()
    return {
        BASE: [lambda: session.run(None, case.feed)] * THREADS,
        OURS: [lambda: proxy.run(None, case.feed)] * THREADS,
        Manager.name: [lambda: manager.call(case.feed)] * THREADS,
        _PIPES: _pipes(case, session.run(None, case.feed), stack, children=1),
        _CHILDREN: _pipes(case, session.run(None, case.feed), stack, children=THREADS),
    }


def _pipes(case: Case, results: list[Any], stack: contextlib.ExitStack, *, children: int) -> list[Call]:
    """A pipe for each thread.  Several children have several interpreter locks and sessions, which no worker
    with one model has."""
    lanes = []
    for _ in range(children):
        floor = Floor(case.model, _INTRA, case.feed, results, "pipe", lanes=THREADS // children)
        stack.callback(floor.close)
        lanes += floor.lanes
    return [functools.partial(lane.run, case.feed) for lane in lanes]


def _speed(threads: concurrent.futures.ThreadPoolExecutor, calls: Sequence[Call], count: int) -> float:
    """Calls per second of all threads together."""

    def work(call: Call) -> None:
        for _ in range(count):
            call()

    for call in calls:  # lanes open, children wake
        call()
    started = time.perf_counter()
    list(threads.map(work, calls))
    return len(calls) * count / (time.perf_counter() - started)


def _judged(case: Case, work: str, found: dict[str, list[float]]) -> list[Row]:
    if case.key == "tiny":
        floor = statistics.median(found[_PIPES])
        ratios = [ours / pipes for ours, pipes in zip(found[OURS], found[_PIPES], strict=True)]
        return [
            figure(work, f"{OURS}, asked", found[OURS], "/s", limit=30_000, at_least=True, floor=floor),
            figure(work, f"{OURS}, by bare pipes", ratios, "x", limit=30 / 33, at_least=True),
        ]
    return [
        figure(
            work,
            f"{name}, by in-process",
            [mine / base for mine, base in zip(found[name], found[BASE], strict=True)],
            "x",
            limit=0.95 if name == OURS else None,
            at_least=True,
        )
        for name in (OURS, Manager.name, _PIPES, _CHILDREN)
    ]
