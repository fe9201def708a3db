"""Orders to workers (loads that begin, TTLs, drains), and answers to clients.

Both are commands, which stay in the outbox until the loop takes them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from onnx_dl.core.events import EventType
from onnx_dl.core.lifecycle import LifecycleEvent, ModelState
from onnx_dl.core.spec import ModelSpec, Warmup
from onnx_dl.protocol import codec
from onnx_dl.protocol import control as m
from onnx_dl.protocol.failures import Failure
from onnx_dl.supervisor.policy.admission import Admission
from onnx_dl.supervisor.policy.announcements import Announcements
from onnx_dl.supervisor.policy.commands import Command, SendToClient, SendToWorker, StartWorker
from onnx_dl.supervisor.policy.decisions import (
    BeginLoad,
    ContinueLoad,
    Decision,
    DenyLoad,
    Evict,
    WithdrawStart,
)
from onnx_dl.supervisor.policy.gpu_devices import ordinals
from onnx_dl.supervisor.policy.records import HOST, ModelRecord, WorkerRecord

Reply = m.Granted | m.Denied | m.Unloaded | m.Outcome | m.Bye


@dataclasses.dataclass(eq=False)
class Outbox:
    """Commands in the order in which they were decided, until the loop takes them.

    If a fact fails half way, what was decided before stays here, and goes out with the next fact.
    """

    tickets: set[tuple[bytes, int]] = dataclasses.field(default_factory=set)
    """Open requests by client and ticket.  Each is answered once, or withdrawn by its client."""
    _commands: list[Command] = dataclasses.field(default_factory=list)

    def add(self, command: Command) -> None:
        self._commands.append(command)

    def extend(self, commands: Iterable[Command]) -> None:
        """Adds commands one by one, so that those before an exception are kept."""
        for command in commands:
            self._commands.append(command)

    def take(self) -> list[Command]:
        """Removes and returns all commands."""
        commands, self._commands = self._commands, []
        return commands

    def order(self, worker_id: int, message: codec.Message) -> None:
        """Sends a message to a worker."""
        self.add(SendToWorker(worker_id, message))

    def answer(self, client: bytes, reply: Reply) -> None:
        """Answers a request, unless it was withdrawn.  The host's own requests have no ticket."""
        request = (client, reply.ticket)
        if client == HOST or request in self.tickets:
            self.tickets.discard(request)
            self.add(SendToClient(client, reply))

    def deny(self, client: bytes, ticket: int, failure: Failure) -> None:
        """Answers an Acquire by a failure."""
        self.answer(client, m.Denied(ticket=ticket, failure=failure))

    def deny_all(self, waiters: Iterable[tuple[bytes, m.Acquire]], failure: Failure) -> None:
        for client, ask in waiters:
            self.deny(client, ask.ticket, failure)

    def forget_client(self, client: bytes) -> None:
        """Removes all requests of a client."""
        self.tickets = {request for request in self.tickets if request[0] != client}


@dataclasses.dataclass(eq=False)
class WorkerOrders:
    """Carries out decisions about workers, as commands."""

    admission: Admission
    announcements: Announcements
    outbox: Outbox
    warmups: Mapping[str, dict[str, Warmup]] = dataclasses.field(default_factory=dict)
    """Inputs of the run that a worker makes before it is ready, by key of the model."""

    def carry_out(self, decisions: Iterable[Decision]) -> None:
        """Turns decisions of :class:`~onnx_dl.supervisor.policy.admission.Admission` into commands."""
        for decision in decisions:
            match decision:
                case BeginLoad(model, worker):
                    self.outbox.add(StartWorker(worker.id, model.spec, model.thread_attributes))
                    event = self.announcements.event
                    self.outbox.add(event(EventType.LOADING, model, worker, worker.started))
                case ContinueLoad(model, worker):
                    self.order_load(model, worker)
                case WithdrawStart(model, at):
                    self.drain(model, "evicted", at)
                case DenyLoad(waiters, failure):
                    self.outbox.deny_all(waiters, failure)
                case Evict(worker_id):
                    self.outbox.order(worker_id, m.DrainIfIdle())
                case command:
                    self.outbox.add(command)

    def on_stuck(self, failure: Failure, now: float) -> None:
        """Admission failed: all pending loads are denied."""
        for model in self.admission.drop_all():
            self.outbox.deny_all(model.take_waiters(), failure)
            if model.worker is not None:  # it has started early
                self.drain(model, "evicted", now)

    def order_load(self, model: ModelRecord, worker: WorkerRecord) -> None:
        """Has a worker load that listens.  It waits for its process id, which the template may tell later:
        without one, it cannot be measured or named."""
        if not worker.listens or worker.pid is None:
            return
        if not worker.waits:
            worker.sent_ttl = model.ttl
            warmups = {key: self.warmups[key] for key in model.parts if key in self.warmups}
            mapped, early = worker.plan.mapped, worker.early
            load = m.Load(spec=model.spec, ttl=worker.sent_ttl, warmups=warmups, mapped=mapped, early=early)
            self.outbox.order(worker.id, load)
        elif worker.prepares:
            self.outbox.order(worker.id, m.Prepare(device_id=min(ordinals(model.spec))))

    def want(self, model: ModelRecord, spec: ModelSpec, now: float, *, lost: bool = False) -> None:
        """Loads the model as soon as there is memory.  ``lost``: see :meth:`.Admission.want`."""
        self.carry_out(self.admission.want(model, spec, now, lost=lost))

    def admit(self, now: float) -> None:
        """Begins pending loads that fit now."""
        self.carry_out(self.admission.admit(now))

    def start_early(self, now: float) -> None:
        """Starts the process of the first pending load if it fits beside a worker that is leaving."""
        self.carry_out(self.admission.start_early(now))

    def retime(self, model: ModelRecord) -> None:
        """Sends the worker the TTL in force, if it changed."""
        worker = model.worker
        if worker is None or not model.leases or worker.sent_ttl == model.ttl:
            return
        worker.sent_ttl = model.ttl
        if worker.ready is not None:
            self.outbox.order(worker.id, m.Retime(ttl=worker.sent_ttl))

    def begin_ttl(self, model: ModelRecord) -> None:
        """Counts the load as a use, so that the TTL runs though nobody is about to call the model: the host
        wanted it, or those who asked have timed out.  With a TTL of 0 it waits for its first call."""
        self.retime(model)
        worker = model.worker
        if worker is not None and worker.sent_ttl != 0:
            self.outbox.order(worker.id, m.Retime(ttl=worker.sent_ttl, used=True))

    def drain(self, model: ModelRecord, reason: str, now: float, *, kill: bool = False) -> None:
        """Unloads the model.  A worker that is still loading is killed: no call runs in it."""
        worker = model.worker
        assert worker is not None
        was_ready = model.state is ModelState.READY
        self.begin_drain(model, reason, now)
        if kill or worker.ready is None:
            self.outbox.add(worker.kill())
        elif was_ready:
            self.outbox.order(worker.id, m.Drain())

    def begin_drain(self, model: ModelRecord, reason: str, now: float) -> None:
        """Notes that the worker drains, and announces it the first time."""
        first = model.state is not ModelState.DRAINING
        model.step(LifecycleEvent.DRAIN_REQUESTED, now)
        if first:
            worker = model.worker
            assert worker is not None
            worker.reason = reason
            worker.check_at = now
            self.outbox.add(self.announcements.event(EventType.DRAINING, model, worker, now, reason=reason))

    def answer_unloaders(self, model: ModelRecord) -> None:
        """Answers those who waited for the end of the worker."""
        unloaders, model.unloaders = model.unloaders, []
        for client, ticket in unloaders:
            self.outbox.answer(client, m.Unloaded(ticket=ticket, was_loaded=True))
