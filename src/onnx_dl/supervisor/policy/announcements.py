"""What happens to models, in order, as the events that clients and metrics are told.

Pure.  The scheduler says what happened; who is told is :mod:`onnx_dl.supervisor.loop`'s.
"""

from __future__ import annotations

from typing import Any

from onnx_dl.core.events import EventType, ModelEvent
from onnx_dl.core.status import Usage
from onnx_dl.supervisor.policy.records import Model, Worker


class Chronicle:
    """Numbers the events.  ``epoch`` is added to monotonic times to make Unix times."""

    def __init__(self, epoch: float) -> None:
        self._epoch = epoch
        self.seq = 0
        """The number of the last event."""

    def event(
        self, kind: EventType, model: Model, worker: Worker, usage: Usage, now: float, **fields: Any
    ) -> ModelEvent:
        """``usage``: what the worker was last measured to hold; ``fields``: what only this kind has."""
        self.seq += 1
        return ModelEvent(
            seq=self.seq,
            type=kind,
            at=now + self._epoch,
            model=model.spec.name,
            key=model.key,
            worker_id=worker.id,
            pid=worker.pid,
            rss=usage.rss or None,
            gpu=usage.gpu,
            **fields,
        )

    def unloaded(
        self, model: Model, worker: Worker, freed: Usage, now: float, detail: str | None
    ) -> ModelEvent:
        """The worker is reaped, and what it held is the system's again."""
        since = worker.ready_at if worker.ready_at is not None else worker.started
        return self.event(
            EventType.UNLOADED,
            model,
            worker,
            freed,
            now,
            reason=worker.reason,
            seconds=now - since,
            freed=freed.private,
            detail=detail,
        )
