"""Ends of workers."""

from __future__ import annotations

import dataclasses

from onnx_dl.core.lifecycle import LifecycleEvent, ModelState
from onnx_dl.errors import WorkerDied
from onnx_dl.protocol import failures
from onnx_dl.protocol import failures as m
from onnx_dl.supervisor.policy.commands import Command
from onnx_dl.supervisor.policy.exit_reasons import ExitStatus
from onnx_dl.supervisor.policy.fleet import Fleet
from onnx_dl.supervisor.policy.load_failures import LoadFailures
from onnx_dl.supervisor.policy.measuring import Measurements
from onnx_dl.supervisor.policy.outcomes import Outcomes, exit_failure
from onnx_dl.supervisor.policy.records import ModelRecord, WorkerRecord
from onnx_dl.supervisor.policy.shutdown import Shutdown
from onnx_dl.supervisor.policy.tickets import Outbox
from onnx_dl.supervisor.policy.worker_control import WorkerControl


@dataclasses.dataclass(frozen=True, eq=False)
class WorkerExits:
    """Takes reaped workers out of the records, and answers everybody who waited for their end."""

    fleet: Fleet
    outbox: Outbox
    control: WorkerControl
    measurements: Measurements
    load_failures: LoadFailures
    outcomes: Outcomes
    shutdown: Shutdown

    def on_exited(
        self, worker_id: int, status: ExitStatus, stderr: str, now: float, exceeded: int = 0, *, runs: int = 0
    ) -> list[Command]:
        """A worker is reaped: its memory is free.

        Args:
            exceeded: bytes that it held when it ended itself for them.
            runs: number of its runs.
        """
        if (found := self.fleet.remove_worker(worker_id)) is None:
            return self.outbox.take()
        model, worker = found
        worker.exceeded = exceeded
        model.step(LifecycleEvent.WORKER_EXITED, now)
        self.outbox.extend(self.measurements.finish_worker(model, worker, runs, now))
        if worker.ready is not None or model.state is ModelState.UNLOADED:
            # A worker that drained has not failed; its end is still explained if it exceeded its memory.
            detail = str(exit_failure(model, worker, status, stderr).args[0]) if exceeded else None
            self.outbox.add(self.control.announcements.unloaded(model, worker, detail, now))
        self.fleet.ledger.give_back(worker_id)
        if model.state is ModelState.FAILED:
            self.load_failures.handle(model, worker, status, stderr, now)
        self._note_outcome(model, worker, status, stderr, now)
        self.control.answer_unloaders(model)
        if model.waiters:
            self.control.want(model, model.waiters[0][1].spec, now)
        self.control.admit(now)
        self.fleet.forget_if_unused(model)
        self.shutdown.say_bye()
        return self.outbox.take()

    def on_spawn_failed(
        self, worker_id: int, reason: str, now: float, failure: m.Failure | None = None
    ) -> list[Command]:
        """No process came of a StartWorker.  ``failure``: the answer, if ``reason`` does not say enough."""
        if found := self.fleet.find(worker_id):
            model, worker = found
            why = reason.removesuffix(".")
            error = WorkerDied(f"No worker process could be started for {model.spec.name}: {why}.")
            worker.failure = failure or failures.describe(error)
        return self.on_exited(worker_id, ExitStatus(), "", now)

    def _note_outcome(
        self, model: ModelRecord, worker: WorkerRecord, status: ExitStatus, stderr: str, now: float
    ) -> None:
        outcome = None
        if not worker.drained:
            outcome = exit_failure(model, worker, status, stderr)
            if model.state is ModelState.FAILED:
                outcome = model.with_retry(outcome, now)
        for client, reply in self.outcomes.note(worker.id, outcome):
            self.outbox.answer(client, reply)
