"""Ends of workers: who is answered, whether a failed load is repeated, how long the next one has to wait.

Also recovers after a fact that could not be handled, because of a bug or of a figure that nobody expected.
The worker that it concerns is killed, and its end is an ordinary fact.  If that cannot be handled either,
its model is set to FAILED past the table of states: it has no worker any more, as FAILED means.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from onnx_dl.core.events import EventType
from onnx_dl.core.lifecycle import LifecycleEvent, ModelState
from onnx_dl.errors import WorkerDied
from onnx_dl.protocol import failures
from onnx_dl.supervisor.policy.capacity import Limits
from onnx_dl.supervisor.policy.fleet import Fleet
from onnx_dl.supervisor.policy.leases import Leases
from onnx_dl.supervisor.policy.measuring import Measurements
from onnx_dl.supervisor.policy.orders import WorkerOrders
from onnx_dl.supervisor.policy.outcomes import ExitStatus, Outcomes, exit_failure, ran_out_of_memory
from onnx_dl.supervisor.policy.records import ModelRecord, WorkerRecord
from onnx_dl.supervisor.policy.shutdown import ShutdownState

_LONGEST_BACKOFF: Final = 60.0
_HAVE_WORKERS: Final = (ModelState.LOADING, ModelState.READY, ModelState.DRAINING)


@dataclasses.dataclass(frozen=True, eq=False)
class WorkerExits:
    """Takes reaped workers out of the records, and answers everybody who waited for their end."""

    fleet: Fleet
    limits: Limits
    orders: WorkerOrders
    leases: Leases
    measurements: Measurements
    outcomes: Outcomes
    shutdown: ShutdownState

    def on_exited(
        self, worker_id: int, status: ExitStatus, stderr: str, now: float, exceeded: int = 0, *, runs: int = 0
    ) -> None:
        """A worker is reaped: its memory is free.  ``exceeded``: bytes for which it ended itself."""
        if (found := self.fleet.remove_worker(worker_id)) is None:
            return
        model, worker = found
        worker.exceeded = exceeded
        is_lost = worker.early and model.state is ModelState.LOADING
        if is_lost:  # its load has not failed: it does without the process
            model.step(LifecycleEvent.DRAIN_REQUESTED, now)
        model.step(LifecycleEvent.WORKER_EXITED, now)
        self.orders.outbox.extend(self.measurements.finish_worker(model, worker, runs, now))
        failure = exit_failure(model, worker, status, stderr)
        if worker.ready is not None or model.state is ModelState.UNLOADED:
            # A worker that drained has not failed; its end is still explained if it exceeded its memory.
            # What it said before, or why it was ended, is not why it exceeded it.
            detail = _said(failure) if exceeded else _said(worker.failure or failure) if is_lost else None
            self.orders.outbox.add(self.orders.announcements.unloaded(model, worker, detail, now))
        self.fleet.ledger.give_back(worker_id)
        if model.state is ModelState.FAILED:
            model.last_failure = worker.failure or failure
            self._handle_failure(model, worker, _may_succeed_later(model, worker, status, stderr), now)
            failure = model.with_retry(failure, now)
        self.outcomes.note(worker_id, None if worker.drained else failure)
        self.orders.answer_unloaders(model)
        if model.waiters:
            if worker.waits and worker.failure is not None and model.key in self.orders.admission.pending:
                is_lost = True  # then it was told to end, too
            self.orders.want(model, model.waiters[0][1].spec, now, lost=is_lost)
        self.orders.admit(now)
        self.fleet.forget_if_unused(model)
        self.shutdown.say_bye()

    def on_spawn_failed(
        self, worker_id: int, reason: str, now: float, failure: failures.Failure | None = None
    ) -> None:
        """No process came of a StartWorker.  ``failure``: the answer, if ``reason`` does not say enough."""
        if found := self.fleet.find(worker_id):
            model, worker = found
            why = reason.removesuffix(".")
            error = WorkerDied(f"No worker process could be started for {model.spec.name}: {why}.")
            worker.failure = failure or failures.describe(error)
        self.on_exited(worker_id, ExitStatus(), "", now)

    def on_broken(self, worker_id: int, failure: failures.Failure) -> None:
        """A fact about this worker could not be handled, or no message can be sent to it: it is killed."""
        if found := self.fleet.find(worker_id):
            worker = found[1]
            worker.failure = worker.failure or failure
            worker.kill_at = None
            self.orders.outbox.add(worker.kill())

    def on_lost(self, worker_id: int, failure: failures.Failure, now: float) -> None:
        """A worker is reaped, and that could not be handled.  All other models stay as they were."""
        self.fleet.remove_worker(worker_id)
        self.fleet.ledger.give_back(worker_id)
        self.outcomes.note(worker_id, failure)
        for model in self.fleet.models.values():
            if model.worker is None and model.state in _HAVE_WORKERS:
                model.state = ModelState.FAILED
                model.history.append(f"{now:.3f} given up")
                model.failures, model.retry_at = model.failures + 1, now
                model.last_failure, model.second_try = failure, False
                model.leases.clear()
                self.orders.admission.pending.pop(model.key, None)
                self.orders.outbox.deny_all(model.take_waiters(), failure)
                self.orders.answer_unloaders(model)
        self.shutdown.say_bye()

    def _handle_failure(self, model: ModelRecord, worker: WorkerRecord, later: bool, now: float) -> None:
        """Repeats the load of a model that became FAILED, or answers the waiters."""
        spec = model.waiters[0][1].spec if model.waiters else model.spec
        if worker.unsaved and model.waiters:
            self.measurements.forget_saved(model)
            self._announce_failure(model, worker, 0.0, now)
            self.orders.want(model, spec, now)
        elif later:
            self._announce_failure(model, worker, 0.0, now)
            again = self.orders.admission.want_again(model, spec, now, alone=not worker.outgrew)
            self.orders.carry_out(again)
        else:
            self._give_up(model, worker, now)

    def _give_up(self, model: ModelRecord, worker: WorkerRecord, now: float) -> None:
        """Denies those who wait, except for members of a group that were not in this load.  The next load may
        begin at once after the first failure, then after 1, 2, 4 ... seconds."""
        lived = now - worker.ready_at if worker.ready_at is not None else 0.0
        model.failures = 1 if lived > self.limits.settings.stable_after else model.failures + 1
        if worker.exceeded or worker.outgrew:  # due to a call's input, or to others: a wait would not help
            model.failures = 0
        delay = min(_LONGEST_BACKOFF, 2.0 ** (model.failures - 2)) if model.failures > 1 else 0.0
        model.second_try = False
        self._announce_failure(model, worker, delay, now)
        for client, ask in model.take_waiters(lambda _, ask: model.serves(ask)):
            self.leases.deny_failed(model, client, ask.ticket, now)

    def _announce_failure(self, model: ModelRecord, worker: WorkerRecord, delay: float, now: float) -> None:
        """Announces a failure after which the next load has to wait for ``delay`` seconds."""
        model.retry_at = now + delay
        failure = model.last_failure
        detail = None if failure is None else _said(failure)
        event = self.orders.announcements.event
        self.orders.outbox.add(event(EventType.FAILED, model, worker, now, detail=detail, retry_after=delay))


def _said(failure: failures.Failure) -> str:
    """The text of a failure."""
    return str(failure.args[0]) if failure.args else failure.name


def _may_succeed_later(model: ModelRecord, worker: WorkerRecord, status: ExitStatus, stderr: str) -> bool:
    """True if a load failed that may succeed when other models have made way."""
    if worker.ready is not None or model.second_try or not model.waiters:
        return False
    is_ours = worker.killed or worker.exceeded > 0
    return worker.outgrew or (not is_ours and ran_out_of_memory(worker.failure, status, stderr))
