"""Announcements of what happens to models, as numbered events for clients and metrics."""

from __future__ import annotations

import collections
from typing import Final, NamedTuple

import msgspec

from onnx_dl.core.events import EventType, ModelEvent
from onnx_dl.supervisor.policy.commands import Emit
from onnx_dl.supervisor.policy.fleet import Ledger
from onnx_dl.supervisor.policy.records import ModelRecord, WorkerRecord

_WINDOW: Final = 30.0
_SHARE: Final = 0.1
"""Share of the time.  Callers who wait less than this for reloads are not worth a warning."""
_REMEMBERED: Final = 4096
KEPT: Final = 300
"""Number of past events that a host keeps."""


class Announcements:
    """Numbers the events, and keeps the last ones.

    ``epoch`` is added to monotonic times to make Unix times.
    """

    def __init__(self, ledger: Ledger, epoch: float) -> None:
        self._ledger = ledger
        self._epoch = epoch
        self._reloads = ReloadWatch()
        self.seq = 0
        """Number of the last event."""
        self._kept: collections.deque[ModelEvent] = collections.deque(maxlen=KEPT)

    def event(
        self,
        kind: EventType,
        model: ModelRecord,
        worker: WorkerRecord,
        now: float,
        **fields: float | str | None,
    ) -> Emit:
        """``fields``: those that only this kind of event has."""
        usage = self._ledger.of(worker.id)
        self.seq += 1
        event = ModelEvent(
            seq=self.seq,
            type=kind,
            at=now + self._epoch,
            model=model.spec.name,
            key=model.key,
            worker_id=worker.id,
            pid=worker.pid,
            rss=usage.rss or None,
            gpu=usage.gpu,
            isolated=model.spec.isolation,
        )
        event = msgspec.structs.replace(event, **fields)
        self._kept.append(event)
        return Emit(event)

    def recent(self, limit: int) -> list[ModelEvent]:
        """The last events, ``limit`` at most, oldest first."""
        return list(self._kept)[-limit:] if limit > 0 else []

    def ready(self, model: ModelRecord, worker: WorkerRecord, seconds: float, now: float) -> list[Emit]:
        """``seconds``: duration of the load.  A second event warns of models that evict each other."""
        emits = [self.event(EventType.READY, model, worker, now, seconds=seconds)]
        if warning := self._reloads.loaded(model.key, model.spec.name, model.wanted_at, now):
            emits.append(self.event(EventType.THRASH, model, worker, now, detail=warning))
        return emits

    def unloaded(self, model: ModelRecord, worker: WorkerRecord, detail: str | None, now: float) -> Emit:
        """Announces a reaped worker, before the ledger gives back what it held."""
        if worker.reason == "evicted" and worker.ready_at is not None:  # else it was no model yet
            self._reloads.evicted(model.key)
        seconds = now - (worker.started if worker.ready_at is None else worker.ready_at)
        freed, event, reason = self._ledger.of(worker.id).private, EventType.UNLOADED, worker.reason
        return self.event(
            event, model, worker, now, reason=reason, seconds=seconds, freed=freed, detail=detail
        )


class _Reload(NamedTuple):
    began: float
    ended: float
    model: str


class ReloadWatch:
    """Warns of models that evict each other: the host mostly reloads what it has just evicted.

    Only evicted models count, so a TTL that is short on purpose causes no warning.
    """

    def __init__(self) -> None:
        self._evicted: dict[str, None] = {}
        self._reloads: collections.deque[_Reload] = collections.deque()
        self._quiet_until = 0.0

    def evicted(self, key: str) -> None:
        """Notes that the model was evicted."""
        self._evicted[key] = None
        if len(self._evicted) > _REMEMBERED:
            del self._evicted[next(iter(self._evicted))]

    def loaded(self, key: str, model: str, since: float, now: float) -> str | None:
        """Notes that the model is ready, for which callers have waited since ``since``.  Returns a warning,
        at most one within 30 seconds, or None."""
        if key not in self._evicted:
            return None
        del self._evicted[key]
        self._reloads.append(_Reload(since, now, model))
        while self._reloads[0].ended < now - _WINDOW:
            self._reloads.popleft()
        share = self._waited(now) / _WINDOW
        if share <= _SHARE or now < self._quiet_until:
            return None
        self._quiet_until = now + _WINDOW
        names = ", ".join(sorted({reload.model for reload in self._reloads}))
        return (
            f"{names} were evicted for other models and loaded again {len(self._reloads)} times within "
            f"{_WINDOW:.0f} s, which took {share:.0%} of that time; raise memory_limit (or "
            "gpu_memory_limit), use fewer models at a time, or pin some"
        )

    def _waited(self, now: float) -> float:
        """Seconds of the window in which at least one reload was waited for."""
        waited, reached = 0.0, now - _WINDOW
        for reload in sorted(self._reloads):
            waited += max(0.0, reload.ended - max(reload.began, reached))
            reached = max(reached, reload.ended)
        return waited
