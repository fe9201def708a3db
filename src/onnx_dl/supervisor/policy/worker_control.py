"""Orders to workers: loads that begin, TTLs, drains."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from onnx_dl.core.events import EventType
from onnx_dl.core.lifecycle import LifecycleEvent, ModelState
from onnx_dl.core.spec import ModelSpec
from onnx_dl.protocol import control as m
from onnx_dl.supervisor.policy.admission import Admission, BeginLoad, Decision, DenyLoad, Evict
from onnx_dl.supervisor.policy.announcements import Announcements
from onnx_dl.supervisor.policy.commands import StartWorker
from onnx_dl.supervisor.policy.records import ModelRecord
from onnx_dl.supervisor.policy.tickets import Outbox


@dataclasses.dataclass(frozen=True, eq=False)
class WorkerControl:
    """Carries out decisions about workers, as commands."""

    admission: Admission
    announcements: Announcements
    outbox: Outbox

    def carry_out(self, decisions: Iterable[Decision]) -> None:
        """Turns decisions of :class:`~onnx_dl.supervisor.policy.admission.Admission` into commands."""
        for decision in decisions:
            match decision:
                case BeginLoad(model, worker):
                    self.outbox.add(StartWorker(worker.id, model.spec, model.thread_attributes))
                    self.outbox.add(
                        self.announcements.event(EventType.LOADING, model, worker, worker.started)
                    )
                case DenyLoad(waiters, failure):
                    for client, ask in waiters:
                        self.outbox.deny(client, ask.ticket, failure)
                case Evict(worker_id):
                    self.outbox.order(worker_id, m.DrainIfIdle())
                case command:
                    self.outbox.add(command)

    def want(self, model: ModelRecord, spec: ModelSpec, now: float) -> None:
        """Loads the model as soon as there is memory."""
        self.carry_out(self.admission.want(model, spec, now))

    def admit(self, now: float) -> None:
        """Begins pending loads that fit now."""
        self.carry_out(self.admission.admit(now))

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
