"""Handles the messages of clients: a table of handlers by type of message."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from onnx_dl.errors import ConfigError, ProtocolError
from onnx_dl.protocol import codec, control, failures
from onnx_dl.supervisor.boundary import as_failure, boundary, report, report_failure
from onnx_dl.supervisor.clients import Client, Clients
from onnx_dl.supervisor.lifetime import HostRole
from onnx_dl.supervisor.measure.sampler import Sampler
from onnx_dl.supervisor.policy.commands import Command, Run, SendToClient
from onnx_dl.supervisor.policy.scheduler import Scheduler
from onnx_dl.system import descriptor_limits

if TYPE_CHECKING:
    from onnx_dl.supervisor.hostfile.applied import AppliedFile


@dataclasses.dataclass
class ClientMessages:
    """Turns the messages of clients into facts for the scheduler, and answers questions.

    A failure in handling a message ends its client, except that a failed Acquire is answered by Denied.
    """

    scheduler: Scheduler
    clients: Clients
    sampler: Sampler
    role: HostRole
    file: AppliedFile | None
    metrics: str | None
    """Address of the page of metrics."""
    run: Run

    def __post_init__(self) -> None:
        scheduler = self.scheduler
        self._handlers: dict[type[codec.Message], Callable[[Client, bytes, Any, float], list[Command]]] = {
            control.Acquire: self._acquire,
            control.Withdraw: lambda _, name, ask, now: scheduler.on_withdraw(name, ask, now),
            control.Outdated: lambda _, name, ask, now: scheduler.on_outdated(name, ask, now),
            control.Release: lambda _, name, ask, now: scheduler.on_release(name, ask.proxy, now),
            control.SetTtl: lambda _, name, ask, now: scheduler.on_set_ttl(name, ask.proxy, ask.ttl),
            control.Unload: self._unload,
            control.AskOutcome: lambda _, name, ask, now: scheduler.on_ask_outcome(name, ask),
            control.Shutdown: self._shutdown,
            control.AskStatus: lambda _, name, ask, now: [SendToClient(name, self._status(ask, now))],
            control.AskEvents: lambda _, name, ask, now: [SendToClient(name, self._recent_events(ask))],
            control.AskModel: lambda _, name, ask, now: [SendToClient(name, self._named(ask))],
            control.DropBlob: self._drop_blob,
        }

    def receive(self, client: Client, data: bytes) -> None:
        """Handles one message of a client."""
        identity = client.identity or b""
        with boundary(f"the client of process {client.pid}", lambda error: self.clients.drop(identity)):
            try:
                message = control.from_client(data)
            except ProtocolError as error:  # a message that cannot be decoded is not answered
                report(str(error))
                return
            now = time.monotonic()
            try:
                self.run(self._handlers[type(message)](client, identity, message, now))
            except Exception as error:
                if not isinstance(message, control.Acquire):
                    raise
                report_failure(f"{message.spec.name} was not acquired", error)
                now, failure = time.monotonic(), as_failure(error)
                self.run(self.scheduler.on_not_acquired(identity, message, failure, now))

    def _acquire(self, client: Client, identity: bytes, ask: control.Acquire, now: float) -> list[Command]:
        """
        Raises:
            DescriptorsExhausted: the client handed over memory that could not be kept.
        """
        if client.is_short and not self.clients.blobs().keys() >= set(ask.spec.blobs):
            raise descriptor_limits.exhausted(f"The memory that {ask.spec.name} is loaded from")
        if self.role.is_shared:  # one application must not decide for the others
            ask.thread_attributes = None
        self.sampler.prepare_load(ask, now)
        return self.scheduler.on_acquire(identity, ask, now)

    def _unload(self, _: Client, identity: bytes, ask: control.Unload, now: float) -> list[Command]:
        self.sampler.refresh(now)  # killed workers cannot be measured afterwards
        return self.scheduler.on_unload(identity, ask, now)

    def _shutdown(self, _: Client, identity: bytes, ask: control.Shutdown, now: float) -> list[Command]:
        self.sampler.refresh(now)
        return self.scheduler.on_shutdown(identity, ask, now, gently=self.role.is_shared)

    def _drop_blob(self, client: Client, _: bytes, ask: control.DropBlob, now: float) -> list[Command]:
        client.drop_blob(ask.number)
        return []

    def _status(self, ask: control.AskStatus, now: float) -> control.Status:
        if ask.measure:
            self.sampler.refresh(now, all_workers=True)
        in_use = self.scheduler.in_use(now)
        return control.Status(
            ticket=ask.ticket,
            seq=self.scheduler.announcements.seq,
            supervisor_pid=os.getpid(),
            host=None if self.role.place is None else self.role.place.name,
            models=self.scheduler.snapshot(now, self.sampler.processes.readings()),
            memory_limit=self.scheduler.memory_limit,
            memory_in_use=in_use.ram,
            metrics=self.metrics,
            gpu_memory_limit=self.scheduler.gpu_memory_limit,
            gpu_memory_in_use=in_use.gpu,
            gpu_memory_limits=self.scheduler.limits.memory.devices,
            gpu_memory_in_use_on=in_use.devices,
        )

    def _recent_events(self, ask: control.AskEvents) -> control.RecentEvents:
        return control.RecentEvents(ticket=ask.ticket, events=self.scheduler.announcements.recent(ask.limit))

    def _named(self, ask: control.AskModel) -> control.Named | control.Denied:
        try:
            if self.file is None:
                raise ConfigError(
                    f"There is no file {ask.name!r}, and the host has no file that names models."
                )
            found = self.file.named(ask.name)
        except ConfigError as error:
            return control.Denied(ticket=ask.ticket, failure=failures.describe(error))
        return control.Named(ticket=ask.ticket, spec=found.spec, terms=found.terms)
