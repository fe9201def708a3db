"""Warm calls by one thread: in-process, the floors, onnx-dl, and what a user would pick instead.

The outputs of all ways are compared bit for bit before anything is timed.  Several threads at a time are
:mod:`benchmarks.crowd`'s.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np

from benchmarks.floor import GUARDED, Floor
from benchmarks.models import Case, identity
from benchmarks.others import OTHERS, make_session
from benchmarks.report import ADDED, ALL_WAYS, Row
from benchmarks.timing import BASE, Times, Way, figure
from onnx_dl import InferenceSessionProxy, ModelHost

PROVIDERS: Final = ["CPUExecutionProvider"]
COPY: Final = "one copy of the input"
OURS, NORMAL, LOW = "onnx-dl", "onnx-dl, latency normal", "onnx-dl, latency low"
ARENA, CHAINED = "onnx-dl, input in arena", "onnx-dl, chained"
NO_COPY: Final = ", no copy"
SMALL: Final = 64 << 10
"""Bytes of input below which the wake-ups are what counts, and above which a copy does."""

Run = Callable[[dict[str, Any]], list[Any]]


def options(threads: int) -> Any:
    """What every way gives its session."""
    import onnxruntime

    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads = threads
    made.inter_op_num_threads = 1
    return made


def proxy_of(
    model: bytes | str, host: ModelHost, *, threads: int = 2, latency: str = "auto", ttl: float = -1
) -> InferenceSessionProxy:
    return InferenceSessionProxy(
        model, options(threads), providers=PROVIDERS, host=host, latency=latency, ttl=ttl
    )


def measure(case: Case, rounds: int) -> list[Row]:
    """In-process, the floors and onnx-dl."""
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(ModelHost())
        ways = [
            *_base(case),
            *_floors(case, stack),
            *_ours(case, host, stack),
            *_zero_copy(case, host, stack),
        ]
        _check(ways)
        return _rows(case, case.name, Times(ways, case.calls, rounds))


def against_others(case: Case, rounds: int) -> list[Row]:
    """In-process, onnx-dl and what a user would pick instead: apart, because these have processes of their
    own that are never quite idle.  Nothing is asked here."""
    work = f"{case.name}{ALL_WAYS}"
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(ModelHost())
        others, missing = _others(case, stack)
        ours = [*_ours(case, host, stack), *_zero_copy(case, host, stack)]
        ways = [*_base(case), *_floors(case, stack), *ours, *others]
        _check(ways)
        found = Times(ways, max(5, case.calls // 4), rounds)
    rows = [_added(work, way.name, found, None, None) for way in ways if way.name not in (BASE, COPY)]
    return [*rows, *(Row(work, name, None, note="not installed") for name in missing)]


# --- the ways --------------------------------------------------------------------------------------------


def _caller(case: Case, run: Run) -> Callable[[], list[Any]]:
    """The call of one way; a stream has a state of its own."""
    feed = dict(case.feed)
    if "state" not in feed:
        return lambda: run(feed)

    def call() -> list[Any]:
        results = run(feed)
        feed["state"] = results[1]
        return results

    return call


def _base(case: Case) -> Iterator[Way]:
    session = make_session(case.model, case.threads)
    yield Way(BASE, _caller(case, lambda feed: session.run(None, feed)))
    if case.nbytes > SMALL:
        (data,) = case.feed.values()
        target = np.ones_like(data)
        yield Way(COPY, lambda: np.copyto(target, data))


def _floors(case: Case, stack: contextlib.ExitStack) -> Iterator[Way]:
    results = make_session(case.model, case.threads).run(None, case.feed)
    kinds = [("pipe", False), ("pipe", True)]
    if case.nbytes <= SMALL:  # else it is not the wake-ups that count
        kinds += [("socket", False), ("socket", True), ("spin", False), (GUARDED, False), (GUARDED, True)]
    for how, one_core in kinds:
        floor = Floor(case.model, case.threads, case.feed, results, how, one_core=one_core)
        stack.callback(floor.close)
        yield Way(floor.name, _caller(case, floor.run), floor.begin, floor.end)
        if case.nbytes > SMALL:
            yield Way(floor.name + NO_COPY, functools.partial(floor.run, {}), floor.begin, floor.end)


def _ours(case: Case, host: ModelHost, stack: contextlib.ExitStack) -> Iterator[Way]:
    for name, latency in ((OURS, "auto"), (NORMAL, "normal"), (LOW, "low")):
        yield Way(name, _caller(case, _running(_proxy(case.model, case, host, stack, latency))))


def _running(proxy: InferenceSessionProxy) -> Run:
    return lambda feed: proxy.run(None, feed)


def _proxy(
    model: bytes, case: Case, host: ModelHost, stack: contextlib.ExitStack, latency: str = "auto"
) -> InferenceSessionProxy:
    return stack.enter_context(proxy_of(model, host, threads=case.threads, latency=latency))


def _zero_copy(case: Case, host: ModelHost, stack: contextlib.ExitStack) -> Iterator[Way]:
    """Where the input need not be copied, because it lies in shared memory already."""
    if case.nbytes <= SMALL:
        return
    ((name, data),) = case.feed.items()
    proxy = _proxy(case.model, case, host, stack)
    inside = proxy.empty(data.shape, data.dtype)
    inside[...] = data
    yield Way(ARENA, lambda: proxy.run(None, {name: inside}))
    before = _proxy(identity(data.shape), case, host, stack)
    for _ in range(3):  # from the second time on, results are computed in shared memory
        result = before.run(None, {"x": data})[0]
    yield Way(CHAINED, lambda: proxy.run(None, {name: result}))


def _others(case: Case, stack: contextlib.ExitStack) -> tuple[list[Way], list[str]]:
    """Those that are installed, started; and the names of those that are not."""
    ways = []
    for kind in OTHERS:
        if kind.is_installed():
            other = kind(case.model, case.threads)
            stack.callback(other.stop)
            other.start()
            ways.append(Way(other.name, _caller(case, other.call)))
    return ways, [kind.name for kind in OTHERS if not kind.is_installed()]


def _check(ways: Sequence[Way]) -> None:
    """That all compute the same, bit for bit, three times in a row."""
    expected = None
    for way in ways:
        if way.name == COPY:
            continue
        found = [_bits(way.call()) for _ in range(3)]
        expected = expected or found
        if found != expected:
            raise AssertionError(f"{way.name} computes something else than {BASE}")


def _bits(results: list[Any]) -> list[tuple[Any, ...]]:
    return [(array.dtype, array.shape, array.tobytes()) for array in results]


# --- the figures -----------------------------------------------------------------------------------------


def _rows(case: Case, work: str, found: Times) -> list[Row]:
    copies = found.by_round(COPY) if COPY in found.names else []
    limits = _limits(case, statistics.median(copies) if copies else 0.0)
    rows = [figure(work, BASE, found.by_round(BASE), "µs", p99=found.p99(BASE))]
    if copies:
        rows.append(figure(work, COPY, copies, "µs", p99=found.p99(COPY)))
    added = [
        _added(work, name, found, limits.get(name), _floor_of(name, found))
        for name in found.names
        if name not in (BASE, COPY)
    ]
    return [*rows, *added, *_ratios(case, work, found)]


def _limits(case: Case, copy: float) -> dict[str, float]:
    """What is asked, in added microseconds."""
    if case.key == "tiny":
        return {OURS: 12.0, LOW: 6.0}
    if case.key == "shaped":
        return {OURS: 18.0}
    return {OURS: 1.5 * copy + 25, ARENA: 40.0, CHAINED: 40.0} if case.key in ("5mb", "64mb") else {}


def _added(work: str, name: str, found: Times, limit: float | None, floor: float | None) -> Row:
    return figure(work, name, found.added(name), ADDED, limit=limit, floor=floor, p99=found.p99(name))


def _floor_of(name: str, found: Times) -> float | None:
    """The least that any floor added that waits in the same manner and copies as much."""
    if not name.startswith(OURS):
        return None
    floors = [n for n in found.names if n.startswith("floor")]
    if name == LOW and any("spin" in n for n in floors):
        floors = [n for n in floors if "spin" in n]
    else:
        copies = name not in (ARENA, CHAINED)
        floors = [n for n in floors if "spin" not in n and n.endswith(NO_COPY) != copies]
    return min((statistics.median(found.added(n)) for n in floors), default=None)


def _ratios(case: Case, work: str, found: Times) -> list[Row]:
    """What is asked as a ratio to the call in-process."""
    asked = {
        "conv": [(OURS, 0.5, 1.02)],
        "vad": [(OURS, 0.5, 1.3), (OURS, 0.99, 2.0), (LOW, 0.5, 1.15), (LOW, 0.99, 2.0)],
    }
    rows = []
    for name, share, limit in asked.get(case.key, []):
        added, base = _floor_of(name, found), statistics.median(found.by_round(BASE))
        floor = None if added is None or share != 0.5 else 1 + added / base
        label = f"{name}, p{share * 100:.0f} ratio"
        rows.append(figure(work, label, found.ratios(name, share), "x", limit=limit, floor=floor))
    return rows
