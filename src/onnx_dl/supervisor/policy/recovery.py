"""Recovery after a fact could not be handled, so that the records are in a legal state again.

The cause is a bug, or a figure that nobody expected.  The model, the client or the pending loads that it
concerns end; all others stay as they were.

A live worker is killed, and its end is an ordinary fact.  Only if that cannot be handled either, the model is
set to FAILED past the table of states: it has no worker any more, as FAILED means.
"""

from __future__ import annotations

import dataclasses

from onnx_dl.core.lifecycle import ModelState
from onnx_dl.protocol import failures
from onnx_dl.protocol.control import Acquire
from onnx_dl.supervisor.policy.commands import Command
from onnx_dl.supervisor.policy.fleet import Fleet
from onnx_dl.supervisor.policy.leases import Leases
from onnx_dl.supervisor.policy.outcomes import Outcomes
from onnx_dl.supervisor.policy.records import ModelRecord
from onnx_dl.supervisor.policy.shutdown import Shutdown
from onnx_dl.supervisor.policy.tickets import Outbox
from onnx_dl.supervisor.policy.worker_control import WorkerControl

_HAVE_WORKERS = (ModelState.LOADING, ModelState.READY, ModelState.DRAINING)


@dataclasses.dataclass(frozen=True, eq=False)
class Recovery:
    """One method for each kind of fact that failed."""

    fleet: Fleet
    outbox: Outbox
    control: WorkerControl
    leases: Leases
    outcomes: Outcomes
    shutdown: Shutdown

    def on_broken(self, worker_id: int, failure: failures.Failure) -> list[Command]:
        """A fact about this worker could not be handled, or no message can be sent to it: it is killed."""
        if found := self.fleet.find(worker_id):
            worker = found[1]
            worker.failure = worker.failure or failure
            worker.kill_at = None
            self.outbox.add(worker.kill())
        return self.outbox.take()

    def on_lost(self, worker_id: int, failure: failures.Failure, now: float) -> list[Command]:
        """A worker is reaped, and that could not be handled."""
        self.fleet.remove_worker(worker_id)
        self.fleet.ledger.give_back(worker_id)
        for client, reply in self.outcomes.note(worker_id, failure):
            self.outbox.answer(client, reply)
        for model in self.fleet.models.values():
            if model.worker is None and model.state in _HAVE_WORKERS:
                self._give_up(model, failure, now)
        self.shutdown.say_bye()
        return self.outbox.take()

    def forget_client(self, client: bytes) -> list[Command]:
        """The end of a client could not be handled: what it held is released, and nothing else is done."""
        self.outbox.tickets.client_gone(client)
        for model in self.fleet.models.values():
            model.forget_client(client)
        return self.outbox.take()

    def on_not_acquired(
        self, client: bytes, ask: Acquire, failure: failures.Failure, now: float
    ) -> list[Command]:
        """An Acquire could not be handled: it is denied."""
        for model in list(self.fleet.models.values()):
            if model.take_waiters(lambda *waiter: waiter == (client, ask)):
                self.leases.after_release(model, "request", now)
        self.outbox.deny(client, ask.ticket, failure)
        return self.outbox.take()

    def on_stuck(self, failure: failures.Failure) -> list[Command]:
        """Admission failed: all pending loads are denied."""
        for model in self.control.admission.drop_all():
            self._deny_waiters(model, failure)
        return self.outbox.take()

    def _give_up(self, model: ModelRecord, failure: failures.Failure, now: float) -> None:
        model.state = ModelState.FAILED
        model.history.append(f"{now:.3f} given up")
        model.failures, model.retry_at = model.failures + 1, now
        model.last_failure, model.second_try = failure, False
        model.leases.clear()
        self.control.admission.drop(model)
        self._deny_waiters(model, failure)
        self.control.answer_unloaders(model)

    def _deny_waiters(self, model: ModelRecord, failure: failures.Failure) -> None:
        for client, ask in model.take_waiters():
            self.outbox.deny(client, ask.ticket, failure)
