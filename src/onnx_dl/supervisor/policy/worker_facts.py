"""Facts about live workers: started, ready, draining, measured, due to be killed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final

from onnx_dl.core.lifecycle import LifecycleEvent, ModelState
from onnx_dl.core.status import Usage
from onnx_dl.errors import LoadTimeout
from onnx_dl.protocol import control as m
from onnx_dl.protocol import failures
from onnx_dl.supervisor.policy.capacity import Limits
from onnx_dl.supervisor.policy.fleet import Fleet
from onnx_dl.supervisor.policy.leases import Leases
from onnx_dl.supervisor.policy.measuring import Measurements, Sample
from onnx_dl.supervisor.policy.orders import WorkerOrders
from onnx_dl.supervisor.policy.records import ModelRecord, WorkerRecord

_SHORTEST_GRACE: Final = 1.0
"""Seconds that a worker has at least to say that it has drained."""


@dataclasses.dataclass(eq=False)
class WorkerFacts:
    """One method for each fact.  Facts about workers that are reaped already are ignored."""

    fleet: Fleet
    limits: Limits
    orders: WorkerOrders
    leases: Leases
    measurements: Measurements

    def on_spawned(self, worker_id: int, pid: int) -> None:
        """A worker has a process."""
        if found := self.fleet.find(worker_id):
            found[1].pid = pid
            self.orders.order_load(*found)

    def on_started(self, worker_id: int) -> None:
        """A worker listens."""
        if found := self.fleet.find(worker_id):
            found[1].listens = True
            self.orders.order_load(*found)

    def on_prepared(self, worker_id: int) -> None:
        """A process that was started early has done what it can before its load."""
        if found := self.fleet.find(worker_id):
            found[1].prepared = True

    def on_loading(self, worker_id: int) -> None:
        """The load begins in a process that was started early."""
        if found := self.fleet.find(worker_id):
            found[1].early = False

    def on_ready(self, ready: m.WorkerReady, usage: Usage, now: float) -> None:
        """A worker has loaded its model.  ``usage`` was measured before its first run."""
        found = self.fleet.find(ready.worker_id)
        if found is None or found[1].failure is not None:  # it was killed when this was on its way
            return
        model, worker = found
        self.orders.outbox.extend(self.measurements.finish_load(model, worker, ready, usage, now))
        if worker.failure is None:
            model.step(LifecycleEvent.WORKER_READY, now)
            worker.ready, worker.ready_at = ready, now
            if model.state is ModelState.DRAINING:
                self.orders.outbox.order(worker.id, m.Drain())
            else:
                self.leases.serve_waiters(model, worker, ready.seconds, now)
            # After the answers to waiters, because it is written to a disk.
            self.orders.outbox.extend(self.measurements.store(model, now))
            self.orders.admit(now)

    def on_load_failed(self, failed: m.WorkerFailed, now: float) -> None:
        """The engine refused the model.  The worker is told to leave."""
        if found := self.fleet.find(failed.worker_id):
            worker = found[1]
            worker.failure, worker.unsaved = failed.failure, failed.unsaved
            self._order_exit(worker, now)

    def on_draining(self, worker_id: int, usage: Usage, now: float, reason: str = "ttl") -> None:
        """A worker accepts no new calls, because its TTL ran out or for another reason."""
        if found := self.fleet.find(worker_id):
            self.measurements.take_usage(*found, usage)
            self.orders.begin_drain(found[0], reason, now)
            self.orders.start_early(now)

    def on_drained(self, worker_id: int, usage: Usage, now: float) -> None:
        """A worker has finished all its calls."""
        if found := self.fleet.find(worker_id):
            self.measurements.take_usage(*found, usage)
            found[1].drained = True
            self._order_exit(found[1], now)

    def _order_exit(self, worker: WorkerRecord, now: float) -> None:
        self.orders.outbox.order(worker.id, m.Exit())
        worker.kill_at = now + self.limits.settings.exit_grace

    def on_measured(self, worker_id: int, sample: Sample, now: float) -> None:
        """A worker was measured."""
        self.orders.outbox.extend(self.measurements.take_sample(worker_id, sample, now))

    def to_check(self, now: float) -> list[int]:
        """Draining workers for which :meth:`on_checked` is due."""
        return [worker.id for worker, at in self._checks() if at <= now]

    def on_checked(self, worker_id: int, busy: int, now: float) -> None:
        """A draining worker has so many calls and blocks under way.

        One without any that does not leave is stopped or hangs.  It is killed: no call is lost, and others
        wait for its end.
        """
        found = self.fleet.find(worker_id)
        if found is not None and (worker := found[1]).check_at is not None:
            grace = max(self.limits.settings.exit_grace, _SHORTEST_GRACE)
            worker.idle_since = None if busy else worker.idle_since or now
            worker.check_at = now + grace
            if worker.idle_since is not None and now >= worker.idle_since + grace:
                self.orders.outbox.add(worker.kill())

    def kill_overdue(self, now: float) -> None:
        """Kills workers that did not leave or did not load in time."""
        for model, worker in self.fleet.workers():
            at = self._kill_at(worker)
            if at is None or at > now:
                continue
            if worker.kill_at is None:
                worker.failure = failures.describe(self._too_late(model, worker))
            worker.kill_at = None
            self.orders.outbox.add(worker.kill())

    def next_deadline(self) -> float | None:
        """Time when the next worker is to be checked or killed."""
        kills = [at for _, worker in self.fleet.workers() if (at := self._kill_at(worker)) is not None]
        return min([*kills, *(at for _, at in self._checks())], default=None)

    def _too_late(self, model: ModelRecord, worker: WorkerRecord) -> LoadTimeout:
        name, seconds = model.spec.name, f"{self.limits.settings.load_timeout:g} seconds"
        if worker.early:
            return LoadTimeout(f"The load of {name} did not begin in its process within {seconds}.")
        return LoadTimeout(
            f"{name} did not load within {seconds}. "
            "Set ONNX_DL_LOAD_TIMEOUT to a larger number of seconds if it needs longer."
        )

    def _kill_at(self, worker: WorkerRecord) -> float | None:
        """Time when it is killed.  One that has started early has as long for its part of the load: what it
        prepares may hang.  When that is done, it waits for memory as long as its load does."""
        if worker.kill_at is None and not (worker.ready or worker.failure or worker.is_idle_early):
            return worker.started + self.limits.settings.load_timeout
        return worker.kill_at

    def _checks(self) -> Iterator[tuple[WorkerRecord, float]]:
        """Draining workers that have not said that they are done, and are not being ended."""
        for _, worker in self.fleet.workers():
            if worker.check_at is not None and worker.kill_at is None and not worker.is_ending:
                yield worker, worker.check_at
