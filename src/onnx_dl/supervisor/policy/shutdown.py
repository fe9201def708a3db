"""The end of a host: all workers end, and everybody who waits is answered."""

from __future__ import annotations

from onnx_dl.errors import HostClosing
from onnx_dl.protocol import control as m
from onnx_dl.protocol import failures
from onnx_dl.supervisor.policy.cache_saves import CacheSaves
from onnx_dl.supervisor.policy.capacity import Limits
from onnx_dl.supervisor.policy.commands import Command
from onnx_dl.supervisor.policy.fleet import Fleet
from onnx_dl.supervisor.policy.worker_control import WorkerControl


class Shutdown:
    """Knows whether the host is closing, and who asked for that."""

    def __init__(self, fleet: Fleet, limits: Limits, saves: CacheSaves, control: WorkerControl) -> None:
        self._fleet = fleet
        self._limits = limits
        self._saves = saves
        self._control = control
        self._outbox = control.outbox
        self._askers: list[tuple[bytes, int]] = []
        self.closing = False
        """The host takes no new work."""

    @property
    def finished(self) -> bool:
        """Whether the host is closing and every worker is reaped."""
        return self.closing and not self._fleet.by_worker

    def on_shutdown(
        self, client: bytes, ask: m.Shutdown, now: float, *, gently: bool = False
    ) -> list[Command]:
        """Ends every worker, at once or like :meth:`on_stop`.  Answered by Bye when all are reaped."""
        self._outbox.tickets.opened(client, ask.ticket)
        self._askers.append((client, ask.ticket))
        return self.on_stop(now) if gently else self.on_abandoned(now)

    def on_stop(self, now: float) -> list[Command]:
        """Ends the host.  Calls under way may finish within the time that a worker has to leave."""
        self._refuse_all()
        for model, worker in self._fleet.workers():
            self._control.drain(model, "exit", now)
            worker.kill_at = now + self._limits.settings.exit_grace
        self.say_bye()
        return self._outbox.take()

    def on_abandoned(self, now: float) -> list[Command]:
        """Ends every worker at once, because no client is left."""
        self._refuse_all()
        for model, worker in self._fleet.workers():
            self._control.begin_drain(model, "exit", now)
            self._outbox.add(worker.kill())
        self.say_bye()
        return self._outbox.take()

    def refuse(self, client: bytes, ask: m.Acquire) -> None:
        """Denies a load, because the host is closing."""
        error = HostClosing(f"The host of {ask.spec.name} is shutting down; a new host can load it.")
        self._outbox.deny(client, ask.ticket, failures.describe(error))

    def say_bye(self) -> None:
        """Answers those who asked for the end, once all workers are reaped."""
        if self.finished:
            askers, self._askers = self._askers, []
            for client, ticket in askers:
                self._outbox.answer(client, m.Bye(ticket=ticket))

    def _refuse_all(self) -> None:
        """Denies all waiters, and ends the saver."""
        self.closing = True
        self._control.admission.drop_all()
        self._saves.close()
        self._control.carry_out(self._control.admission.end_saver())
        for model in self._fleet.models.values():
            for client, ask in model.take_waiters():
                self.refuse(client, ask)
