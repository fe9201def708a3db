"""What happened in a supervisor, counted by model.

Pure: events and workers' last readings come in, plain figures go out.  How they are written for Prometheus is
:mod:`onnx_dl.supervisor.metrics.families`, who asks for them :mod:`onnx_dl.supervisor.metrics.endpoint`.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from onnx_dl.core.events import EventType, ModelEvent
from onnx_dl.core.status import ModelStatus
from onnx_dl.transport.gauges import BUCKETS, Reading, bucket

REMEMBERED: Final = 1000
"""Models whose counts are kept; beyond that, those go that were heard of least recently and have no worker.
One that comes back counts from zero, which Prometheus takes for a restart."""


class Times:
    """How often something was done and how long it took: a histogram with the buckets of
    :func:`onnx_dl.transport.gauges.bound`, and the sum in seconds."""

    def __init__(self, counts: Sequence[int] = (0,) * BUCKETS, total: float = 0.0) -> None:
        self.counts = list(counts)
        self.total = total

    def add(self, seconds: float) -> None:
        """It was done once more."""
        self.counts[bucket(int(seconds * 1e9))] += 1
        self.total += seconds

    def take_in(self, reading: Reading) -> None:
        """All calls of one worker."""
        for index, count in enumerate(reading.latencies):
            self.counts[index] += count
        self.total += reading.total

    def copy(self) -> Times:
        return Times(self.counts, self.total)


class Totals:
    """What happened to one model since the supervisor started, or since it was last forgotten."""

    def __init__(self) -> None:
        self.loads = Times()
        self.calls = Times()
        """Of workers that are gone; in :class:`Facts`, of all."""
        self.unloads: collections.Counter[str] = collections.Counter()
        """By reason."""
        self.failures = 0
        self.freed = 0
        """Bytes that were given back."""

    def copy(self) -> Totals:
        twin = Totals()
        twin.loads, twin.calls = self.loads.copy(), self.calls.copy()
        twin.unloads = self.unloads.copy()
        twin.failures, twin.freed = self.failures, self.freed
        return twin


class Facts(NamedTuple):
    """All figures of one moment; nobody changes them any more, so another thread may read them."""

    totals: Mapping[str, Totals]
    """By model, live workers' calls included."""
    models: Sequence[ModelStatus]
    evictions: int
    recycled: int
    thrash: int
    """Warnings."""
    memory_limit: int | None
    """Bytes; None: there is no limit."""
    memory_in_use: int


class Metrics:
    """Counts what it is told.  Counts never go down, however often a model's worker is another one."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._totals: collections.OrderedDict[str, Totals] = collections.OrderedDict()
        """The model that was heard of last comes last."""
        self._workers: dict[int, str] = {}
        """The models of live workers."""
        self._unloads: collections.Counter[str | None] = collections.Counter()
        self._thrash = 0

    def on_event(self, event: ModelEvent) -> None:
        """Something happened to a model."""
        totals = self._of(event.model)
        match event.type:
            case EventType.LOADING:
                self._workers[event.worker_id] = event.model
            case EventType.READY:
                totals.loads.add(event.seconds or 0.0)
            case EventType.UNLOADED:
                totals.unloads[event.reason or ""] += 1
                totals.freed += event.freed or 0
                self._unloads[event.reason] += 1
            case EventType.FAILED:
                totals.failures += 1
            case EventType.THRASH:
                self._thrash += 1

    def on_gone(self, worker_id: int, reading: Reading) -> None:
        """A worker is reaped, and this is what it told last: it is told by nobody else from now on."""
        if (model := self._workers.pop(worker_id, None)) is not None:
            self._of(model).calls.take_in(reading)

    def facts(
        self,
        models: Sequence[ModelStatus],
        readings: Mapping[int, Reading],
        memory_limit: int | None,
        memory_in_use: int,
    ) -> Facts:
        """How things stand; ``readings``: of live workers."""
        totals = {model: known.copy() for model, known in self._totals.items()}
        for worker_id, reading in readings.items():
            if worker_id in self._workers:
                totals[self._workers[worker_id]].calls.take_in(reading)
        return Facts(
            totals,
            models,
            self._unloads["evicted"],
            self._unloads["recycled"],
            self._thrash,
            memory_limit,
            memory_in_use,
        )

    def _of(self, model: str) -> Totals:
        totals = self._totals.setdefault(model, Totals())
        self._totals.move_to_end(model)
        if (surplus := len(self._totals) - self._remembered) > 0:
            kept = {model, *self._workers.values()}
            for oldest in [known for known in self._totals if known not in kept][:surplus]:
                del self._totals[oldest]
        return totals
