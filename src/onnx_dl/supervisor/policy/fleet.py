"""All models and workers of one supervisor, and the memory that each worker holds."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Final, NamedTuple

from onnx_dl.core.lifecycle import LifecycleEvent, ModelState
from onnx_dl.core.spec import ModelSpec, group_spec
from onnx_dl.core.status import Usage
from onnx_dl.supervisor.policy.memory_amount import NOTHING, MemoryAmount
from onnx_dl.supervisor.policy.records import ModelRecord, WorkerRecord
from onnx_dl.supervisor.policy.requirements import present

_LINGERING: Final = 2.0
"""Seconds within which a driver takes back the GPU memory of a process that ended: mostly 0.5 to 1.5."""


class _HeldGpu(NamedTuple):
    """GPU memory of a reaped worker, which may not be back yet."""

    pid: int | None
    """None: the driver does not show the process."""
    held: MemoryAmount
    until: float


class Ledger:
    """Bytes by worker.  They are booked when it is measured and given back in one place, when it is reaped;
    those on a GPU when the driver has taken them back."""

    def __init__(self) -> None:
        self._booked: dict[int, Usage] = {}
        self._reserved: dict[int, MemoryAmount] = {}
        self._held_gpu: dict[int, _HeldGpu] = {}

    def reserve(self, worker_id: int, held: MemoryAmount) -> None:
        """Sets what the worker will need for its load or in a run.  It counts until more is measured."""
        self._reserved[worker_id] = held

    def counted(self, worker_id: int) -> MemoryAmount:
        """Memory of the worker that counts towards the limits."""
        return present(self.of(worker_id)).maximum(self._reserved.get(worker_id, NOTHING))

    def book(self, worker_id: int, usage: Usage) -> None:
        """Replaces what is booked for the worker."""
        self._booked[worker_id] = usage

    def of(self, worker_id: int) -> Usage:
        """Usage booked for the worker; zeros if it was never measured."""
        return self._booked.get(worker_id, Usage())

    def give_back(self, worker_id: int) -> Usage:
        """Removes a reaped worker.  Returns what was booked for it."""
        self._reserved.pop(worker_id, None)
        return self._booked.pop(worker_id, Usage())

    # --- GPU memory, which outlives its process -----------------------------------------------------------

    def hold_gpu(self, worker_id: int, pid: int | None, now: float, *, promised: bool = False) -> None:
        """Keeps counting the GPU memory of a worker that was reaped at ``now`` for a while.

        ``promised``: also what it was promised, not only what was measured.
        """
        usage = self.of(worker_id)
        held = self.counted(worker_id) if promised else MemoryAmount(0, usage.gpu or 0, usage.gpus)
        if held.gpu:
            shown = None if usage.gpu_estimated else pid
            held = dataclasses.replace(held, ram=0)
            self._held_gpu[worker_id] = _HeldGpu(shown, held, now + _LINGERING)

    def release_gpu(self, worker_id: int) -> None:
        """Stops counting: the driver no longer shows the worker."""
        self._held_gpu.pop(worker_id, None)

    def lingering_pids(self, now: float) -> dict[int, int]:
        """Process ids of reaped workers that the driver may still show, by worker id."""
        self._expire(now)
        return {worker_id: held.pid for worker_id, held in self._held_gpu.items() if held.pid is not None}

    def lingering(self, now: float) -> MemoryAmount:
        """GPU memory of reaped workers that may not be back yet."""
        self._expire(now)
        return sum((held.held for held in self._held_gpu.values()), NOTHING)

    def _expire(self, now: float) -> None:
        self._held_gpu = {worker_id: held for worker_id, held in self._held_gpu.items() if held.until > now}


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

    def preparing(self) -> set[int]:
        """Workers that may be making contexts on their GPUs before their loads begin."""
        return {worker.id for _, worker in self.workers() if worker.waits and worker.prepares}

    def is_loaded(self, key: str) -> bool:
        """True if the model has a worker, so that a use of it needs no more memory."""
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

    def driver_tells(self, now: float) -> bool:
        """True if the driver tells the GPU memory of a worker that is leaving, or has just left."""
        if self.ledger.lingering_pids(now):
            return True
        leaving = (w for w, model in self.by_worker.items() if model.state is ModelState.DRAINING)
        return any(usage.gpu and not usage.gpu_estimated for usage in map(self.ledger.of, leaving))

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
