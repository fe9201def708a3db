"""Leases: who holds a model, and on which terms."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import msgspec

from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.terms import Terms
from onnx_dl.protocol import failures
from onnx_dl.protocol.control import Acquire, Granted
from onnx_dl.supervisor.policy.fleet import Fleet
from onnx_dl.supervisor.policy.orders import WorkerOrders
from onnx_dl.supervisor.policy.records import HOST, HOST_LEASE, ModelRecord, WorkerRecord


@dataclasses.dataclass(eq=False)
class Leases:
    """Grants models, and lets them go.  Knows what the host's file says of the models that the host holds."""

    _fleet: Fleet
    _orders: WorkerOrders
    _host_terms: Mapping[str, Terms] = dataclasses.field(default_factory=dict)
    """Terms of the host itself, by key of the model."""
    _grouped: Mapping[str, Sequence[ModelSpec]] = dataclasses.field(default_factory=dict)
    """The models that the host's file has in each group, by key of the group."""

    @property
    def holds_any(self) -> bool:
        """True if the host itself holds a model or waits for one."""
        return any(
            HOST_LEASE in model.leases or any(ask.for_host for _, ask in model.waiters)
            for model in self._fleet.models.values()
        )

    def model_for(self, client: bytes, ask: Acquire) -> ModelRecord:
        """Record of the model, or of its group, which the client joins."""
        model = self._fleet.model_for(ask.spec)
        model.join(client, ask, self._grouped.get(model.key, ()))
        return model

    def grant(self, model: ModelRecord, client: bytes, ask: Acquire) -> None:
        """Grants a model that is ready.  Denies a member of a group that did not load."""
        worker = model.worker
        assert worker is not None and worker.ready is not None
        ready = worker.ready
        description, key = ready.description, ask.spec.key
        if (failure := description.failed.get(key)) is not None:
            self._orders.outbox.deny(client, ask.ticket, msgspec.convert(failure, failures.Failure))
            return
        model.leases[HOST_LEASE if ask.for_host else (client, ask.proxy)] = ask.terms
        host_terms = model.host_terms(self._host_terms)
        if host_terms is not None and (client == HOST or HOST_LEASE not in model.leases):
            model.leases[HOST_LEASE] = host_terms
        if ask.for_host:
            self._orders.begin_ttl(model)
        granted = Granted(
            ticket=ask.ticket,
            worker_id=worker.id,
            pid=worker.pid or 0,
            address=ready.address,
            secret=ready.secret,
            description=description.members.get(key, description),
            model=key if model.spec.members else "",
        )
        self._orders.outbox.answer(client, granted)

    def deny_failed(self, model: ModelRecord, client: bytes, ticket: int, now: float) -> None:
        """Denies a model by its last failure."""
        assert model.last_failure is not None
        self._orders.outbox.deny(client, ticket, model.with_retry(model.last_failure, now))

    def serve_waiters(self, model: ModelRecord, worker: WorkerRecord, seconds: float, now: float) -> None:
        """Grants a model that became ready, after a load of so many seconds, to all who wait for it."""
        model.loads += 1
        self._orders.outbox.extend(self._orders.announcements.ready(model, worker, seconds, now))
        wanted = any((client, ask.ticket) in self._orders.outbox.tickets for client, ask in model.waiters)
        for client, ask in model.take_waiters(lambda _, ask: model.serves(ask)):
            self.grant(model, client, ask)
        self._orders.retime(model)
        if not wanted and model.leases:  # all who asked have timed out, so no call may come for long
            self._orders.begin_ttl(model)
        if model.waiters:  # for members that were named while it loaded
            self._orders.drain(model, "regrouped", now)
        elif not model.leases:  # all who asked have gone meanwhile
            self._orders.drain(model, "exit", now)

    def after_release(self, model: ModelRecord, reason: str, now: float) -> None:
        """Unloads a model that nobody holds or waits for any more, or adapts its TTL."""
        if model.leases or model.waiters:
            self._orders.retime(model)
        elif model.worker is not None:
            self._orders.drain(model, reason, now)
        self._fleet.forget_if_unused(model)

    def follow_file(
        self, terms: Mapping[str, Terms], grouped: Mapping[str, Sequence[ModelSpec]], now: float
    ) -> None:
        """Adapts the host's own leases to its file.  A model that the file no longer names is released.

        ``terms``: by key of the model; ``grouped``: the models of the file in each group, by its key.
        """
        before, self._host_terms, self._grouped = self._host_terms, terms, grouped
        for model in list(self._fleet.models.values()):
            had = model.host_terms(before)
            # The file may have lost one member of a group and gained another: each was asked for separately.
            released = bool(model.take_waiters(lambda who, ask: who == HOST and ask.spec.key not in terms))
            model.follow_file(before.keys() - terms.keys(), grouped.get(model.key, ()))
            own = model.host_terms(terms)
            if own is not None and model.leases:
                model.leases[HOST_LEASE] = own
                self._orders.retime(model)
            elif own is None and had is not None:
                released = model.leases.pop(HOST_LEASE, None) is not None or released
            if released:
                self.after_release(model, "request", now)
