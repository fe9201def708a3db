"""Measurements of workers and of loads under way.

They change the ledger and the known requirements.  A load that takes more memory than there is, is ended.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final, NamedTuple

import msgspec

from onnx_dl.core.status import Usage
from onnx_dl.protocol import control as m
from onnx_dl.protocol import failures
from onnx_dl.supervisor.policy import requirements
from onnx_dl.supervisor.policy.cache_saves import CacheSaves
from onnx_dl.supervisor.policy.capacity import Capacity, Limits
from onnx_dl.supervisor.policy.commands import Command, EndSaver, ForgetPeak, Remember
from onnx_dl.supervisor.policy.eviction import LoadPlan
from onnx_dl.supervisor.policy.fleet import Fleet
from onnx_dl.supervisor.policy.memory_amount import NOTHING, UNLIMITED, MemoryAmount
from onnx_dl.supervisor.policy.records import ModelRecord, WorkerRecord
from onnx_dl.supervisor.policy.requirements import Peak, Requirement, RequirementHistory
from onnx_dl.transport.gauges import Reading

_DECAY_EVERY: Final = 30.0
"""Seconds with runs after which the peak of runs is lowered, if it did not come again."""
_FASTEST: Final = 5e9
"""Bytes that a load takes within a second at most: 2.4e9 were measured.  Pages of files that are in memory
already come faster, but few loads end with many of these."""
_PAUSE_MIN: Final = 0.005
_PAUSE_MAX: Final = 1.0
"""Seconds between two looks at a load that is near its bound, and far from it."""


class Sample(NamedTuple):
    """One look at a worker.  ``usage`` is None if nothing can have changed."""

    usage: Usage | None
    reading: Reading = Reading()


class LoadToWeigh(NamedTuple):
    """A load that is due to be measured."""

    worker_id: int
    pid: int
    nbytes: int
    """Bytes that it may have anyway.  Only above that the measurement must be exact."""


@dataclasses.dataclass(frozen=True, eq=False)
class Measurements:
    """Books what workers hold, and learns from it."""

    fleet: Fleet
    limits: Limits
    capacity: Capacity
    history: RequirementHistory
    epoch: float
    """Added to monotonic times to make Unix times."""

    def take_sample(self, worker_id: int, sample: Sample, now: float) -> Iterator[Command]:
        """Books a look at a worker, or at what the driver shows of one that is reaped."""
        if (found := self.fleet.find(worker_id)) is None:
            if sample.usage is not None and not sample.usage.gpu:
                self.fleet.ledger.release_gpu(worker_id)
            return
        model, worker = found
        if sample.usage is not None:
            self.take_usage(model, worker, sample.usage)
        is_due = worker.ready is not None and now - worker.marked_at >= _DECAY_EVERY
        if is_due and self._learn_runs(model, worker, sample.reading.runs, now):
            yield ForgetPeak(worker.id)

    def take_usage(self, model: ModelRecord, worker: WorkerRecord, usage: Usage) -> None:
        """Books what a worker holds."""
        if not _counts(worker, usage):
            return
        usage = self.capacity.placed(model, usage)
        self.fleet.ledger.book(worker.id, usage)
        known = self.capacity.requirement(model.requirement_key)
        if usage.pss and known is not None and worker.ready is not None:
            worker.peak = worker.peak.maximum(requirements.highest(usage))
            self._note(model, worker, requirements.grown(known, usage))

    def finish_load(
        self, model: ModelRecord, worker: WorkerRecord, ready: m.WorkerReady, usage: Usage, now: float
    ) -> Iterator[Command]:
        """Books a worker that is ready.  Ends it if its load took more than there is between two looks: for
        that figure, the next load would be refused."""
        worker.weigh_at, worker.marked_at = None, now
        if not _counts(worker, usage):
            return
        usage = self.capacity.placed(model, usage)
        self.fleet.ledger.book(worker.id, usage)
        self.fleet.ledger.reserve(worker.id, NOTHING)
        if usage.pss:
            known = self.capacity.requirement(model.requirement_key)
            self._note(model, worker, requirements.loaded(known, usage, ready.entry, mapped=ready.mapped))
            if not worker.plan.measured and not self.capacity.could_fit(requirements.highest(usage)):
                yield from self.end_load(model, worker, now)
                return
            yield ForgetPeak(worker.id)
        model.at_least, model.second_try = NOTHING, False

    def outgrow(self, model: ModelRecord, worker: WorkerRecord, nbytes: int, now: float) -> Iterator[Command]:
        """Ends a load that has more bytes than there are, and remembers that it needs more."""
        known = self.capacity.requirement(model.requirement_key)
        outgrown = requirements.outgrown(known, nbytes, mapped=worker.plan.mapped)
        self.history.note(model.requirement_key, outgrown)
        return self.end_load(model, worker, now)

    def end_load(self, model: ModelRecord, worker: WorkerRecord, now: float) -> Iterator[Command]:
        """Kills a worker whose load takes more memory than there is."""
        error = self.capacity.refusal(model, self.capacity.plan(model), now)
        worker.failure, worker.outgrew = failures.describe(error), True
        yield worker.kill()
        yield from self.store(model, now)

    def finish_worker(
        self, model: ModelRecord, worker: WorkerRecord, runs: int, now: float
    ) -> Iterator[Command]:
        """Learns from a worker that is reaped after so many runs."""
        if worker.drained or worker.killed:  # a crashed one was not measured after its last run
            self._learn_runs(model, worker, runs, now)
        if worker.ready is not None:
            yield from self.store(model, now)
        # It may have made its context since it was measured.
        promised = worker.early and worker.prepares and worker.pid is not None
        self.fleet.ledger.hold_gpu(worker.id, worker.pid, now, promised=promised)

    def store(self, model: ModelRecord, now: float) -> Iterator[Command]:
        """Stores the requirement for the next host, if it has changed."""
        key = model.requirement_key
        if (changed := self.history.to_store(key, now + self.epoch)) is not None:
            yield Remember(key, changed)

    def forget_saved(self, model: ModelRecord) -> None:
        """Notes that the load cache does not have the model any more, or not in a usable form."""
        key = model.requirement_key
        if (known := self.capacity.requirement(key)) is not None:
            self.history.note(key, msgspec.structs.replace(known, mapped=Peak(), entry=""))

    def _learn_runs(self, model: ModelRecord, worker: WorkerRecord, runs: int, now: float) -> bool:
        """Lowers the known peak towards that of the last runs, so that an extraordinary run does not keep
        others out for ever.  False: there were no runs."""
        known = self.capacity.requirement(model.requirement_key)
        if known is None or runs <= worker.marked_runs or worker.peak == NOTHING:
            return False
        self._note(model, worker, requirements.decayed(known, worker.peak))
        worker.marked_at, worker.marked_runs, worker.peak = now, runs, NOTHING
        return True

    def _note(self, model: ModelRecord, worker: WorkerRecord, requirement: Requirement) -> None:
        requirement = requirement.placed(self.limits.gpus.numbers(model.spec))
        self.history.note(model.requirement_key, requirement)
        self.fleet.ledger.reserve(worker.id, requirement.in_use(self.limits.memory))


@dataclasses.dataclass(frozen=True, eq=False)
class LoadWeighing:
    """Bounds the loads that are under way."""

    fleet: Fleet
    limits: Limits
    capacity: Capacity
    measurements: Measurements
    saves: CacheSaves

    def begin(self, worker: WorkerRecord, plan: LoadPlan, now: float) -> None:
        """Reserves memory for a load that begins, and schedules its first measurement."""
        worker.plan = plan
        self.fleet.ledger.reserve(worker.id, plan.need)
        if self.limits.memory.ram != UNLIMITED:
            worker.weigh_at = now + _pause(self._bound(worker, now))

    def to_weigh(self, now: float) -> list[LoadToWeigh]:
        """Loads that are due to be measured."""
        return [
            LoadToWeigh(worker.id, worker.pid, self.fleet.ledger.counted(worker.id).ram)
            for worker, at in self._scheduled()
            if at <= now and worker.pid
        ]

    def next_deadline(self) -> float | None:
        """Time when the next load is due."""
        return min((at for _, at in self._scheduled()), default=None)

    def weigh(self, worker_id: int, nbytes: int, now: float) -> Iterator[Command]:
        """Takes the measured size of a load, which no other load may need meanwhile."""
        if (found := self.fleet.find(worker_id)) is None:
            return
        model, worker = found
        if worker.ready is not None or worker.is_ending:
            return
        reserved = self.fleet.ledger.counted(worker.id).maximum(MemoryAmount(nbytes))
        self.fleet.ledger.reserve(worker.id, reserved)
        bound = self._bound(worker, now)
        if nbytes > bound and self.saves.end():  # the saver is the first to make way
            yield EndSaver()
        if nbytes > self._bound(worker, now, without=self.saves.taken):
            yield from self.measurements.outgrow(model, worker, nbytes, now)
        worker.weigh_at = now + _pause(bound - nbytes)

    def _scheduled(self) -> Iterator[tuple[WorkerRecord, float]]:
        for _, worker in self.fleet.workers():
            if worker.weigh_at is not None and worker.pid and not (worker.is_ending or worker.early):
                yield worker, worker.weigh_at

    def _bound(self, worker: WorkerRecord, now: float, without: MemoryAmount = NOTHING) -> int:
        """Bytes at which the load is ended, if nobody held the memory ``without``."""
        others = self.capacity.in_use(now) - self.fleet.ledger.counted(worker.id) - without
        return worker.plan.bound((self.limits.memory - others).ram)


def _counts(worker: WorkerRecord, usage: Usage) -> bool:
    """True if a measurement shows what the worker holds.  One that ends may have no memory any more."""
    return usage.rss > 0 and not worker.is_ending


def _pause(missing: int) -> float:
    """Seconds in which a load cannot take so many bytes."""
    return min(max(missing / _FASTEST, _PAUSE_MIN), _PAUSE_MAX)
