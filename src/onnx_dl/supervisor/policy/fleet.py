"""All models and workers of one supervisor, and the memory that each worker holds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from onnx_dl.core.lifecycle import LifecycleEvent, ModelState
from onnx_dl.core.spec import ModelSpec, group_spec
from onnx_dl.supervisor.policy.ledger import Ledger
from onnx_dl.supervisor.policy.records import ModelRecord, WorkerRecord
from onnx_dl.supervisor.policy.requirements import NOTHING, MemoryAmount, present


class Fleet:
    """Owner of the records."""

    def __init__(self) -> None:
        self.models: dict[str, ModelRecord] = {}
        self.by_worker: dict[int, ModelRecord] = {}
        """The model of each worker that is not reaped."""
        self.ledger = Ledger()
        self._ids = itertools.count(1)

    def find(self, worker_id: int) -> tuple[ModelRecord, WorkerRecord] | None:
        """A worker and its model; None: the worker is reaped."""
        model = self.by_worker.get(worker_id)
        return None if model is None or model.worker is None else (model, model.worker)

    def model_for(self, spec: ModelSpec) -> ModelRecord:
        """Record of a model, or of its group."""
        return self.models.setdefault(spec.unit, ModelRecord(spec.unit, spec))

    def workers(self) -> Iterator[tuple[ModelRecord, WorkerRecord]]:
        """All workers that are not reaped."""
        for model in self.by_worker.values():
            if model.worker is not None:
                yield model, model.worker

    def pids(self) -> dict[int, int]:
        """Process ids of live workers by worker id."""
        return {worker.id: worker.pid for _, worker in self.workers() if worker.pid is not None}

    def is_loaded(self, key: str) -> bool:
        """Whether the model has a worker, so that a use of it needs no more memory."""
        model = self.models.get(key)
        return model is not None and model.worker is not None

    def start_worker(self, model: ModelRecord, spec: ModelSpec, now: float) -> WorkerRecord:
        """Adds a worker that loads ``spec``, or all members of the group."""
        model.spec = group_spec(list(model.members.values())) if model.members else spec
        model.step(LifecycleEvent.LOAD_REQUESTED, now)
        worker = model.worker = WorkerRecord(next(self._ids), now)
        self.by_worker[worker.id] = model
        return worker

    def remove_worker(self, worker_id: int) -> tuple[ModelRecord, WorkerRecord] | None:
        """Removes a reaped worker from its model, with the leases on it."""
        found = self.find(worker_id)
        if (model := self.by_worker.pop(worker_id, None)) is not None:
            model.worker = None
            model.leases.clear()
        return found

    def forget_if_unused(self, model: ModelRecord) -> None:
        """Drops the record of an unloaded model that nobody holds or waits for."""
        if model.state is ModelState.UNLOADED and not (model.waiters or model.leases):
            self.models.pop(model.key, None)

    def counted(self) -> MemoryAmount:
        """Memory that all workers hold or have reserved."""
        return sum(map(self.ledger.counted, self.by_worker), NOTHING)

    def draining(self) -> MemoryAmount:
        """The part of it whose workers are draining."""
        draining = (w for w, model in self.by_worker.items() if model.state is ModelState.DRAINING)
        return sum(map(self.ledger.counted, draining), NOTHING)

    def any_drains(self) -> bool:
        return any(model.state is ModelState.DRAINING for model in self.by_worker.values())

    def pinned(self) -> MemoryAmount:
        """Memory that pinned models hold now, which no eviction gives back."""
        return sum((present(self.ledger.of(worker_id)) for worker_id in self._pinned()), NOTHING)

    def pinned_peak(self) -> MemoryAmount:
        """Memory that pinned models are known to take in runs."""
        return sum(map(self.ledger.counted, self._pinned()), NOTHING)

    def _pinned(self) -> list[int]:
        return [worker_id for worker_id, model in self.by_worker.items() if model.is_pinned]
