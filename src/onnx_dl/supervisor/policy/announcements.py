"""Announcements of what happens to models, as numbered events for clients and metrics."""

from __future__ import annotations

import msgspec

from onnx_dl.core.events import EventType, ModelEvent
from onnx_dl.supervisor.policy.commands import Emit
from onnx_dl.supervisor.policy.ledger import Ledger
from onnx_dl.supervisor.policy.records import ModelRecord, WorkerRecord
from onnx_dl.supervisor.policy.thrashing import ReloadWatch


class Announcements:
    """Numbers the events.  ``epoch`` is added to monotonic times to make Unix times."""

    def __init__(self, ledger: Ledger, epoch: float) -> None:
        self._ledger = ledger
        self._epoch = epoch
        self._reloads = ReloadWatch()
        self.seq = 0
        """Number of the last event."""

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
        )
        return Emit(msgspec.structs.replace(event, **fields))

    def ready(self, model: ModelRecord, worker: WorkerRecord, seconds: float, now: float) -> list[Emit]:
        """``seconds``: duration of the load.  A second event warns of models that evict each other."""
        emits = [self.event(EventType.READY, model, worker, now, seconds=seconds)]
        if warning := self._reloads.loaded(model.key, model.spec.name, model.wanted_at, now):
            emits.append(self.event(EventType.THRASH, model, worker, now, detail=warning))
        return emits

    def unloaded(self, model: ModelRecord, worker: WorkerRecord, detail: str | None, now: float) -> Emit:
        """Announces a reaped worker, before the ledger gives back what it held."""
        if worker.reason == "evicted":
            self._reloads.evicted(model.key)
        since = worker.ready_at if worker.ready_at is not None else worker.started
        freed = self._ledger.of(worker.id).private
        event, reason = EventType.UNLOADED, worker.reason
        return self.event(
            event, model, worker, now, reason=reason, seconds=now - since, freed=freed, detail=detail
        )
