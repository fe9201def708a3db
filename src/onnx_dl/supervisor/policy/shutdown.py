"""The end of a host: all workers end, and everybody who waits is answered."""

from __future__ import annotations

import dataclasses

from onnx_dl.errors import HostClosing
from onnx_dl.protocol import control as m
from onnx_dl.protocol import failures
from onnx_dl.supervisor.policy.cache_saves import CacheSaves
from onnx_dl.supervisor.policy.capacity import Limits
from onnx_dl.supervisor.policy.fleet import Fleet
from onnx_dl.supervisor.policy.orders import WorkerOrders


@dataclasses.dataclass(eq=False)
class ShutdownState:
    """Knows whether the host is closing, and who asked for that."""

    _fleet: Fleet
    _limits: Limits
    _saves: CacheSaves
    _orders: WorkerOrders
    _askers: list[tuple[bytes, int]] = dataclasses.field(default_factory=list)
    closing: bool = False
    """The host takes no new work."""

    @property
    def finished(self) -> bool:
        """True if the host is closing and every worker is reaped."""
        return self.closing and not self._fleet.by_worker

    def on_shutdown(self, client: bytes, ask: m.Shutdown, now: float, *, gently: bool = False) -> None:
        """Ends every worker, at once or like :meth:`on_stop`.  Answered by Bye when all are reaped."""
        self._orders.outbox.tickets.add((client, ask.ticket))
        self._askers.append((client, ask.ticket))
        if gently:
            self.on_stop(now)
        else:
            self.on_abandoned(now)

    def on_stop(self, now: float) -> None:
        """Ends the host.  Calls under way may finish within the time that a worker has to leave."""
        self._refuse_all()
        for model, worker in self._fleet.workers():
            self._orders.drain(model, "exit", now)
            worker.kill_at = now + self._limits.settings.exit_grace
        self.say_bye()

    def on_abandoned(self, now: float) -> None:
        """Ends every worker at once, because no client is left."""
        self._refuse_all()
        for model, worker in self._fleet.workers():
            self._orders.begin_drain(model, "exit", now)
            self._orders.outbox.add(worker.kill())
        self.say_bye()

    def refuse(self, client: bytes, ask: m.Acquire) -> None:
        """Denies a load, because the host is closing."""
        error = HostClosing(f"The host of {ask.spec.name} is shutting down; a new host can load it.")
        self._orders.outbox.deny(client, ask.ticket, failures.describe(error))

    def say_bye(self) -> None:
        """Answers those who asked for the end, once all workers are reaped."""
        if self.finished:
            askers, self._askers = self._askers, []
            for client, ticket in askers:
                self._orders.outbox.answer(client, m.Bye(ticket=ticket))

    def _refuse_all(self) -> None:
        """Denies all waiters, and ends the saver."""
        self.closing = True
        self._orders.admission.drop_all()
        self._saves.close()
        self._orders.carry_out(self._orders.admission.end_saver())
        for model in self._fleet.models.values():
            for client, ask in model.take_waiters():
                self.refuse(client, ask)
