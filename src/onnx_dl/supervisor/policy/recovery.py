"""How the scheduler comes back to a state that is allowed, when a fact could not be taken in.

That is a bug, or a figure that nobody thought of.  It ends the model, the client or the wishes that it
concerns; all others are as they were.  Pure like the scheduler.

A worker that lives is killed, and its end is an ordinary fact.  Only where that cannot be taken in either,
the model is set to FAILED past the table: it has no worker any more, which is what FAILED means.
"""

from __future__ import annotations

from onnx_dl.core.lifecycle import ModelState
from onnx_dl.protocol import control, failures
from onnx_dl.supervisor.policy.admission import Admission
from onnx_dl.supervisor.policy.commands import Command
from onnx_dl.supervisor.policy.outcomes import Fates
from onnx_dl.supervisor.policy.records import Model, Worker
from onnx_dl.supervisor.policy.tickets import Tickets

_HAVE_WORKERS = (ModelState.LOADING, ModelState.READY, ModelState.DRAINING)


class Mending(Admission):
    """The scheduler's part that clears up."""

    _fates: Fates
    tickets: Tickets

    def _done(self) -> list[Command]:
        raise NotImplementedError

    def _kill_now(self, worker: Worker) -> None:
        raise NotImplementedError

    def _answer_unloaders(self, model: Model) -> None:
        raise NotImplementedError

    def _say_bye(self) -> None:
        raise NotImplementedError

    def _after_release(self, model: Model, reason: str, now: float) -> None:
        raise NotImplementedError

    def on_broken(self, worker_id: int, failure: failures.Failure) -> list[Command]:
        """Something about this worker could not be taken in, or it cannot be spoken to: it is to go."""
        model = self._by_worker.get(worker_id)
        if model is not None and (worker := model.worker) is not None:
            worker.failure = worker.failure or failure
            worker.kill_at = None
            self._kill_now(worker)
        return self._done()

    def on_lost(self, worker_id: int, failure: failures.Failure, now: float) -> list[Command]:
        """A worker is reaped, and that could not be taken in."""
        if (model := self._by_worker.pop(worker_id, None)) is not None:
            model.worker = None
        self.ledger.give_back(worker_id)
        for client, told in self._fates.note(worker_id, failure):
            self._tell(client, told)
        for model in self._models.values():
            if model.worker is None and model.state in _HAVE_WORKERS:
                self._lose(model, failure, now)
        self._say_bye()
        return self._done()

    def _lose(self, model: Model, failure: failures.Failure, now: float) -> None:
        model.state = ModelState.FAILED
        model.history.append(f"{now:.3f} given up")
        model.failures, model.retry_at = model.failures + 1, now
        model.last_failure, model.second_try = failure, False
        for held in (model.leases, model.pins, model.priorities):
            held.clear()
        self._turn_away(model, failure)
        self._answer_unloaders(model)

    def _turn_away(self, model: Model, failure: failures.Failure) -> None:
        """Nobody waits for this model any more."""
        self._wishes.pop(model.key, None)
        waiters, model.waiters = model.waiters, []
        for client, ask in waiters:
            self._tell(client, control.Denied(ticket=ask.ticket, failure=failure))

    def forget_client(self, client: bytes) -> list[Command]:
        """A client is gone, and that could not be taken in: what it held is let go, and nothing else done."""
        self.tickets.client_gone(client)
        for model in self._models.values():
            for lease in [lease for lease in model.leases if lease[0] == client]:
                model.let_go(lease)
            model.waiters = [waiter for waiter in model.waiters if waiter[0] != client]
            model.unloaders = [unloader for unloader in model.unloaders if unloader[0] != client]
            model.named.pop(client, None)
        return self._done()

    def on_not_acquired(
        self, client: bytes, ask: control.Acquire, failure: failures.Failure, now: float
    ) -> list[Command]:
        """A proxy asked for its model, and that could not be taken in: it is told, and waits no more."""
        for model in list(self._models.values()):
            waiting = [waiter for waiter in model.waiters if waiter == (client, ask)]
            if waiting:
                model.waiters = [waiter for waiter in model.waiters if waiter not in waiting]
                self._after_release(model, "request", now)
        self._tell(client, control.Denied(ticket=ask.ticket, failure=failure))
        return self._done()

    def on_stuck(self, failure: failures.Failure) -> list[Command]:
        """It could not be decided who gets room: those who wait for it are told, and nobody waits."""
        self._look_at = self._saving.look_at = None
        self._looking, self._idle = False, {}
        for key in list(self._wishes):
            if (model := self._models.get(key)) is not None:
                self._turn_away(model, failure)
        self._wishes.clear()
        return self._done()
