"""Times of calls through onnx-dl and in-process, on the same inputs and in turns.

Both have their slices of the same seconds, so a machine that becomes busy slows down both alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np

from onnx_dl.demo.assets import LARGE_WIDTH, SMALL_MODELS, load_samples, model_path
from onnx_dl.demo.work import Array, Session
from onnx_dl.host.model_host import ModelHost

LARGE_BATCH: Final = 16
_PROVIDERS: Final = ["CPUExecutionProvider"]
_SLICES: Final = 8
_SMALL_CALLS: Final = 50
_LARGE_CALLS: Final = 2
_WARM_CALLS: Final = 1
"""Calls at the start of a slice that are not counted."""
_PAUSE: Final = 0.02
"""Seconds between slices.  onnxruntime's threads spin for a while after a call, which disturbs the other."""
_ENOUGH: Final = 2.5
"""Seconds after which no more slices are begun."""


class CallTimes(NamedTuple):
    """Medians of one model and one batch, in seconds."""

    model: str
    batch: int
    ours: float
    theirs: float


def compare(large: str) -> list[CallTimes]:
    """Loads all models both ways, one after the other, and times their calls."""
    samples = load_samples()
    found = []
    with ModelHost() as host:
        for name in SMALL_MODELS:
            feed = {samples[name].input_name: samples[name].inputs[:1]}
            found.append(_compare_model(host, name, str(model_path(name)), feed, _SMALL_CALLS))
        data = np.random.default_rng(1).standard_normal((LARGE_BATCH, LARGE_WIDTH), dtype=np.float32)
        found.append(_compare_model(host, "large", large, {"X": data}, _LARGE_CALLS))
    return found


def _compare_model(host: ModelHost, name: str, path: str, feed: dict[str, Array], calls: int) -> CallTimes:
    import onnxruntime

    theirs = onnxruntime.InferenceSession(path, providers=_PROVIDERS)
    with host.open(path, providers=_PROVIDERS) as ours:
        ours.load()
        batch = len(next(iter(feed.values())))
        return CallTimes(name, batch, *medians(ours, theirs, feed, calls))


def medians(
    ours: Session,
    theirs: Session,
    feed: dict[str, Array],
    calls: int,
    clock: Callable[[], float] = time.perf_counter,
    pause: Callable[[float], object] = time.sleep,
) -> tuple[float, float]:
    """Seconds of the median call of each, from slices of ``calls`` calls in turns; two slices at least."""
    times: tuple[list[float], list[float]] = ([], [])
    begun = clock()
    for number in range(_SLICES):
        if number > 1 and clock() - begun > _ENOUGH:
            break
        for side in (0, 1) if number % 2 else (1, 0):  # neither is always the first
            session, kept = (ours, theirs)[side], times[side]
            pause(_PAUSE)
            for call in range(_WARM_CALLS + calls):
                started = clock()
                session.run(None, feed)
                if call >= _WARM_CALLS:
                    kept.append(clock() - started)
    return statistics.median(times[0]), statistics.median(times[1])
