"""Counts events and calls by model.  Pure: has no clock and no I/O."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from onnx_dl.core.events import EventType, ModelEvent
from onnx_dl.core.status import ModelStatus
from onnx_dl.transport.gauges import BUCKETS, Reading, bucket

REMEMBERED: Final = 1000
"""Models whose counts are kept; beyond that, those without a worker go, least recently used first.
A model that comes back counts from zero, which Prometheus takes for a restart."""


class Histogram:
    """Histogram of durations, with the buckets of :func:`onnx_dl.transport.gauges.bound` and the sum in
    seconds."""

    def __init__(self, counts: Sequence[int] = (0,) * BUCKETS, total: float = 0.0) -> None:
        self.counts = list(counts)
        self.total = total

    def add(self, seconds: float) -> None:
        """Counts one more duration."""
        self.counts[bucket(int(seconds * 1e9))] += 1
        self.total += seconds

    def take_in(self, reading: Reading) -> None:
        """Adds all calls of one worker."""
        for index, count in enumerate(reading.latencies):
            self.counts[index] += count
        self.total += reading.total

    def copy(self) -> Histogram:
        return Histogram(self.counts, self.total)


@dataclasses.dataclass(eq=False)
class ModelCounts:
    """Counts of one model since the supervisor started, or since they were dropped."""

    loads: Histogram = dataclasses.field(default_factory=Histogram)
    calls: Histogram = dataclasses.field(default_factory=Histogram)
    """Calls of ended workers; in :class:`Figures`, of all workers."""
    unloads: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Number of unloads by reason."""
    failures: int = 0
    freed: int = 0
    """Bytes that ended workers gave back."""

    def copy(self) -> ModelCounts:
        loads, calls = self.loads.copy(), self.calls.copy()
        return dataclasses.replace(self, loads=loads, calls=calls, unloads=self.unloads.copy())


class Figures(NamedTuple):
    """All figures of one moment.  They do not change any more, so another thread may read them."""

    totals: Mapping[str, ModelCounts]
    """Counts by model, with the calls of live workers."""
    models: Sequence[ModelStatus]
    evictions: int
    recycled: int
    thrash: int
    """Number of thrash warnings."""
    memory_limit: int | None
    """Bytes; None: there is no limit."""
    memory_in_use: int


class Metrics:
    """Counts events, and the calls of ended workers.  Counts never go down when a worker is replaced."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._totals: collections.OrderedDict[str, ModelCounts] = collections.OrderedDict()
        """Counts by model, most recently used last."""
        self._workers: dict[int, str] = {}
        """Models of live workers, by worker id."""
        self._ready: set[int] = set()
        """Workers that became ready, until their end is announced."""
        self._unloads: collections.Counter[str | None] = collections.Counter()
        self._thrash = 0

    def on_event(self, event: ModelEvent) -> None:
        """Counts an event of a model."""
        totals = self._of(event.model)
        match event.type:
            case EventType.LOADING:
                self._workers[event.worker_id] = event.model
            case EventType.READY:
                totals.loads.add(event.seconds or 0.0)
                self._ready.add(event.worker_id)
            case EventType.UNLOADED:
                totals.freed += event.freed or 0
                if event.reason != "evicted" or event.worker_id in self._ready:  # else it was no model yet
                    totals.unloads[event.reason or ""] += 1
                    self._unloads[event.reason] += 1
                self._ready.discard(event.worker_id)
            case EventType.FAILED:
                totals.failures += 1
            case EventType.THRASH:
                self._thrash += 1

    def on_gone(self, worker_id: int, reading: Reading) -> None:
        """Adds the last reading of a reaped worker."""
        if (model := self._workers.pop(worker_id, None)) is not None:
            self._of(model).calls.take_in(reading)

    def figures(
        self,
        models: Sequence[ModelStatus],
        readings: Mapping[int, Reading],
        memory_limit: int | None,
        memory_in_use: int,
    ) -> Figures:
        """The present figures; ``readings``: of live workers."""
        totals = {model: known.copy() for model, known in self._totals.items()}
        for worker_id, reading in readings.items():
            if worker_id in self._workers:
                totals[self._workers[worker_id]].calls.take_in(reading)
        return Figures(
            totals,
            models,
            self._unloads["evicted"],
            self._unloads["recycled"],
            self._thrash,
            memory_limit,
            memory_in_use,
        )

    def _of(self, model: str) -> ModelCounts:
        totals = self._totals.setdefault(model, ModelCounts())
        self._totals.move_to_end(model)
        if (surplus := len(self._totals) - self._remembered) > 0:
            kept = {model, *self._workers.values()}
            for oldest in [known for known in self._totals if known not in kept][:surplus]:
                del self._totals[oldest]
        return totals
