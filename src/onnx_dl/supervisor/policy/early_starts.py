"""Processes that start before there is memory for their loads: beside a worker that is leaving.  Pure.

On a GPU a worker takes half a second to end, and a part of the next load needs little memory: a process, and
CUDA's libraries and context.  So this part may run beside the worker that makes room, where both fit the
limits at once.  The load itself begins when that worker is gone, as without an early start.

No load fails for its early start.  If the process ends before the load has begun in it, the load waits on and
begins in another process (:mod:`onnx_dl.supervisor.policy.worker_exits`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final

from onnx_dl.core.lifecycle import ModelState
from onnx_dl.core.spec import ModelSpec
from onnx_dl.supervisor.policy import eviction
from onnx_dl.supervisor.policy.capacity import Capacity, Limits
from onnx_dl.supervisor.policy.decisions import BeginLoad, WithdrawStart
from onnx_dl.supervisor.policy.fleet import Fleet
from onnx_dl.supervisor.policy.memory_amount import NOTHING, MemoryAmount
from onnx_dl.supervisor.policy.records import ModelRecord

PROCESS: Final = MemoryAmount(eviction.BASE)
"""Memory of a process without a model."""
CONTEXT: Final = MemoryAmount(512 << 20, 704 << 20)
"""Memory of one with CUDA's libraries and context, at most.  The part on the GPU follows from what workers
and groups take (0.55 GB on an H100); the other part is a guess."""


@dataclasses.dataclass(frozen=True, eq=False)
class EarlyStarts:
    """Starts a process early, and ends it if its load does not come."""

    fleet: Fleet
    limits: Limits
    capacity: Capacity

    def begin(self, model: ModelRecord, spec: ModelSpec, now: float) -> Iterator[BeginLoad]:
        """Starts the process of the model that loads next, if that is possible now."""
        if not model.waiters or model.worker is not None:
            return
        if (part := self._affordable(model, now)) is not None:
            worker = self.fleet.start_worker(model, spec, now)
            worker.waits, worker.early, worker.prepares = True, True, part.gpu > 0
            self.fleet.ledger.reserve(worker.id, part)
            yield BeginLoad(model, worker)

    @staticmethod
    def withdraw(model: ModelRecord, now: float) -> Iterator[WithdrawStart]:
        """Ends the process, if it was started: there is no memory for it, or its load is refused."""
        if model.worker is not None and model.worker.waits and model.state is ModelState.LOADING:
            yield WithdrawStart(model, now)

    def make_way(self, model: ModelRecord, now: float) -> Iterator[WithdrawStart]:
        """Ends the process for another load.  One that is lost already ends as such, which tells why."""
        if model.worker is None or not model.worker.is_ending:
            yield from self.withdraw(model, now)

    def others(self, model: ModelRecord, now: float) -> MemoryAmount:
        """Memory in use without what the model's own process got for its early start."""
        own = NOTHING if model.worker is None else self.fleet.ledger.counted(model.worker.id)
        return self.capacity.in_use(now) - own

    def _affordable(self, model: ModelRecord, now: float) -> MemoryAmount | None:
        """Memory that the process may take until the load begins; None: the load waits, as others do.

        Only models on GPUs start early, and only if the driver tells what the leaving worker holds: an
        estimate by the memory of the whole device would be wrong if another worker ended meanwhile.
        """
        spec = model.waiters[0][1].spec
        devices = self.limits.gpus.numbers(spec)
        if not (devices and spec.isolation and spec.group is None and self.fleet.driver_tells(now)):
            return None  # a group may have other members when the load begins
        plan, in_use, limit = self.capacity.plan(model), self.capacity.in_use(now), self.limits.memory
        if not ((in_use + plan.need).over(limit) - self.capacity.leaving(now)).is_nothing:
            return None  # what leaves is not enough: it may be long until the load begins
        sizes = [PROCESS]
        if plan.measured and len(devices) == 1 and can_prepare(spec):  # an estimate may have no context in it
            sizes.insert(0, CONTEXT.placed(devices))
        parts = (size.minimum(plan.need) for size in sizes)
        return next((part for part in parts if (in_use + part).fits(limit)), None)


def can_prepare(spec: ModelSpec) -> bool:
    """True if a process may make a session of CUDA's provider before it has the model."""
    is_plain = spec.engine == "ort" and not (spec.pristine or spec.sandbox)
    return is_plain and "CUDAExecutionProvider" in spec.provider_names
