"""Ways to make one call that each take away something that may cost time, where no copy explains it.

A worker's thread has slept before each call, and so have onnxruntime's threads, or they spin beside it.  Each
row is one of these by the plain call in-process.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from benchmarks.calls import LOW, OURS
from benchmarks.gpu.calls import check, settled
from benchmarks.gpu.works import RATIO, Work, proxy_of, session_of
from benchmarks.report import Row
from benchmarks.timing import BASE, Times, Way, figure
from onnx_dl import ModelHost

_SLEEP: Final = 0.6e-3
"""Seconds that a worker's thread sleeps between two calls that take as long in the application."""
_SETTINGS: Final[dict[str, Callable[[Any], None]]] = {
    ", one thread": lambda options: setattr(options, "intra_op_num_threads", 1),
    ", no spinning": lambda options: options.add_session_config_entry("session.intra_op.allow_spinning", "0"),
}


def measure(work: Work, rounds: int) -> list[Row]:
    with contextlib.ExitStack() as stack:
        ways = list(map(settled, _ways(work, stack)))
        check(ways)
        found = Times(ways, work.calls, rounds)
    name = f"{work.name}, variants"
    return [
        figure(name, BASE, found.by_round(BASE), "µs", p99=found.p99(BASE)),
        *(figure(name, way, found.ratios(way), RATIO, p99=found.p99(way)) for way in found.names[1:]),
    ]


def _ways(work: Work, stack: contextlib.ExitStack) -> Iterator[Way]:
    feed = {"x": work.x}
    session = session_of(work.model)
    host = stack.enter_context(ModelHost())
    proxy = stack.enter_context(proxy_of(work.model, host))
    low = stack.enter_context(proxy_of(work.model, host, latency="low"))
    calls = {BASE: session.run, OURS: proxy.run, LOW: low.run}
    for setting in _SETTINGS:
        calls[BASE + setting] = session_of(work.model, _options(setting)).run
        other = stack.enter_context(proxy_of(work.model, host, options=_options(setting)))
        calls[OURS + setting] = other.run
    for name, run in calls.items():
        yield Way(name, functools.partial(run, None, feed))
    nap = functools.partial(time.sleep, _SLEEP)
    yield Way(f"{BASE}, after {_SLEEP * 1e3:g} ms of sleep", lambda: session.run(None, feed), before=nap)
    yield Way(f"{OURS}, after {_SLEEP * 1e3:g} ms of sleep", lambda: proxy.run(None, feed), before=nap)


def _options(setting: str) -> Any:
    import onnxruntime

    made = onnxruntime.SessionOptions()
    _SETTINGS[setting](made)
    return made
