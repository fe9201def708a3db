"""Requests of clients: acquire, release, unload, and the end of a client."""

from __future__ import annotations

import dataclasses

import msgspec

from onnx_dl.core.events import EventType
from onnx_dl.core.lifecycle import ModelState
from onnx_dl.errors import ProxyClosedError
from onnx_dl.protocol import control as m
from onnx_dl.protocol import failures
from onnx_dl.supervisor.policy.fleet import Fleet
from onnx_dl.supervisor.policy.leases import Leases
from onnx_dl.supervisor.policy.live_proxies import LiveProxies
from onnx_dl.supervisor.policy.orders import WorkerOrders
from onnx_dl.supervisor.policy.outcomes import Outcomes
from onnx_dl.supervisor.policy.records import HOST
from onnx_dl.supervisor.policy.shutdown import ShutdownState


@dataclasses.dataclass(frozen=True, eq=False)
class ClientRequests:
    """One method for each request.  Times are monotonic seconds."""

    fleet: Fleet
    orders: WorkerOrders
    leases: Leases
    outcomes: Outcomes
    shutdown: ShutdownState
    proxies: LiveProxies

    def on_acquire(self, client: bytes, ask: m.Acquire, now: float) -> None:
        """A proxy needs its model."""
        if client != HOST:  # which waits for no answer
            self.orders.outbox.tickets.add((client, ask.ticket))
        if self.shutdown.closing:
            self.shutdown.refuse(client, ask)
            return
        if client != HOST:
            self.proxies.add(client, ask.proxy)
        model = self.leases.model_for(client, ask)
        if model.state is ModelState.READY and model.serves(ask):
            self.leases.grant(model, client, ask)
            self.orders.retime(model)
        elif model.state is ModelState.READY:
            model.waiters.append((client, ask))
            self.orders.drain(model, "regrouped", now)
        elif model.state is ModelState.FAILED and now < model.retry_at and model.serves(ask):
            self.leases.deny_failed(model, client, ask.ticket, now)
        else:
            model.waiters.append((client, ask))
            if model.state in (ModelState.UNLOADED, ModelState.FAILED):
                self.orders.want(model, ask.spec, now)

    def on_release(self, client: bytes, proxy: int, now: float) -> None:
        """A proxy is closed or collected.  Another thread of it may still wait for the model."""
        self.proxies.remove(client, proxy)
        for model in list(self.fleet.models.values()):
            waiting = model.take_waiters(lambda who, ask: (who, ask.proxy) == (client, proxy))
            for _, ask in waiting:
                error = ProxyClosedError(f"The proxy of {ask.spec.name} was closed while its model loaded.")
                self.orders.outbox.deny(client, ask.ticket, failures.describe(error))
            if model.leases.pop((client, proxy), None) is not None or waiting:
                self.leases.after_release(model, "request", now)
        self.orders.admit(now)

    def on_outdated(self, client: bytes, outdated: m.Outdated, now: float) -> None:
        """A file has changed since a worker read it.  The proxy leaves this worker; those that used it before
        keep it."""
        found = self.fleet.find(outdated.worker_id)
        if found is not None and found[1].ready is not None:
            model, worker = found
            if not worker.outdated:
                worker.outdated = True
                event = self.orders.announcements.event
                self.orders.outbox.add(event(EventType.OUTDATED, model, worker, now, detail=outdated.path))
            if model.leases.pop((client, outdated.proxy), None) is not None:
                self.leases.after_release(model, "request", now)
                self.orders.admit(now)

    def on_withdraw(self, client: bytes, ask: m.Withdraw, now: float) -> None:
        """The client does not wait for the answer to an Acquire any more."""
        self.orders.outbox.tickets.discard((client, ask.ticket))
        for model in list(self.fleet.models.values()):
            waiting = any((who, other.ticket) == (client, ask.ticket) for who, other in model.waiters)
            if waiting and not ask.keep:
                model.take_waiters(lambda who, other: (who, other.ticket) == (client, ask.ticket))
                self.leases.after_release(model, "request", now)
            elif not waiting and (client, ask.proxy) in model.leases:  # the answer crossed this
                self.orders.begin_ttl(model)
        self.orders.admit(now)

    def on_set_ttl(self, client: bytes, proxy: int, ttl: float) -> None:
        """A proxy's TTL was changed."""
        for model in self.fleet.models.values():
            if (terms := model.leases.get((client, proxy))) is not None:
                model.leases[client, proxy] = msgspec.structs.replace(terms, ttl=ttl)
                self.orders.retime(model)
            model.waiters = [
                (who, _with_ttl(ask, ttl) if (who, ask.proxy) == (client, proxy) else ask)
                for who, ask in model.waiters
            ]

    def on_unload(self, client: bytes, ask: m.Unload, now: float) -> None:
        """A client wants a model unloaded."""
        self.orders.outbox.tickets.add((client, ask.ticket))
        model = self.fleet.models.get(ask.key)
        if model is None or model.worker is None:
            self.orders.outbox.answer(client, m.Unloaded(ticket=ask.ticket, was_loaded=False))
        else:
            model.unloaders.append((client, ask.ticket))
            self.orders.drain(model, "request", now, kill=ask.force)

    def on_ask_outcome(self, client: bytes, ask: m.AskOutcome) -> None:
        """A client lost its worker.  Answered when the worker is reaped."""
        self.orders.outbox.tickets.add((client, ask.ticket))
        if ask.worker_id in self.fleet.by_worker:
            self.outcomes.wait(ask.worker_id, client, ask.ticket)
        else:
            failure = self.outcomes.of(ask.worker_id)
            self.orders.outbox.answer(client, m.Outcome(ticket=ask.ticket, failure=failure))

    def on_client_gone(self, client: bytes, now: float) -> None:
        """A client's process ended, or it said goodbye: all that it held is released."""
        self.orders.outbox.forget_client(client)
        self.proxies.forget_client(client)
        for model in list(self.fleet.models.values()):
            if model.forget_client(client):
                self.leases.after_release(model, "exit", now)
        self.orders.admit(now)

    # --- recovery: a fact could not be handled, because of a bug or a figure that nobody expected ---------

    def forget_client(self, client: bytes) -> None:
        """The end of a client could not be handled: what it held is released, and nothing else is done."""
        self.orders.outbox.forget_client(client)
        self.proxies.forget_client(client)
        for model in self.fleet.models.values():
            model.forget_client(client)

    def on_not_acquired(self, client: bytes, ask: m.Acquire, failure: failures.Failure, now: float) -> None:
        """An Acquire could not be handled: it is denied."""
        for model in list(self.fleet.models.values()):
            if model.take_waiters(lambda *waiter: waiter == (client, ask)):
                self.leases.after_release(model, "request", now)
        self.orders.outbox.deny(client, ask.ticket, failure)


def _with_ttl(ask: m.Acquire, ttl: float) -> m.Acquire:
    return msgspec.structs.replace(ask, terms=msgspec.structs.replace(ask.terms, ttl=ttl))
