"""The supervisor's only thread: polls descriptors, and hands what is ready to the part that owns it.

The loop connects the parts.  :mod:`onnx_dl.supervisor.policy.scheduler` decides, the command queue carries
out its commands, and a failure ends only what it concerns (:mod:`onnx_dl.supervisor.boundary`).
"""

from __future__ import annotations

import collections
import contextlib
import signal
import time
from collections.abc import Callable, Container, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from onnx_dl.core.settings import Settings
from onnx_dl.protocol import control as m
from onnx_dl.supervisor.boundary import boundary, report
from onnx_dl.supervisor.client_messages import ClientMessages
from onnx_dl.supervisor.clients import Clients, Greeter
from onnx_dl.supervisor.control import Control
from onnx_dl.supervisor.lifetime import HostRole, Lifetime, SignalPipe, reaction_to
from onnx_dl.supervisor.measure import requirement_store
from onnx_dl.supervisor.measure.sampler import Sampler
from onnx_dl.supervisor.outlet import Relay
from onnx_dl.supervisor.policy import commands
from onnx_dl.supervisor.policy.commands import Command, Emit, SendToClient
from onnx_dl.supervisor.policy.records import HOST
from onnx_dl.supervisor.policy.scheduler import Scheduler
from onnx_dl.supervisor.processes.worker_control import WorkerControl
from onnx_dl.supervisor.processes.worker_processes import WorkerProcesses
from onnx_dl.supervisor.template_ttl import TemplateTtl
from onnx_dl.system import resources
from onnx_dl.transport import sockets

if TYPE_CHECKING:
    from onnx_dl.supervisor.hostfile.applied import AppliedFile
    from onnx_dl.supervisor.metrics.endpoint import MetricsEndpoint

_C = TypeVar("_C", bound=Command)


class CommandQueue:
    """Carries out commands in the order in which they were decided, also where one leads to others."""

    def __init__(self) -> None:
        self._handlers: dict[type[object], Callable[[Any], object]] = {}
        self._failed: dict[type[object], Callable[[Any, Exception], object]] = {}
        self._waiting: collections.deque[Command] = collections.deque()
        self._running = False

    def on(
        self,
        kind: type[_C],
        handler: Callable[[_C], object],
        failed: Callable[[_C, Exception], object] = lambda command, error: None,
    ) -> None:
        """Registers the handler of a type of command.  ``failed`` is called if the handler raises."""
        self._handlers[kind], self._failed[kind] = handler, failed

    def run(self, commands: Iterable[Command]) -> None:
        """Carries out commands after those that wait.  Called by a handler, it only queues them."""
        self._waiting.extend(commands)
        if self._running:
            return
        self._running = True
        try:
            while self._waiting:
                self.perform(self._waiting.popleft())
        finally:
            self._running = False

    def perform(self, command: Command) -> None:
        """Carries out one command at once.  A failure is reported, and ends only what it concerns."""
        kind = type(command)
        with boundary(f"{kind.__name__} failed", lambda error: self._failed[kind](command, error)):
            self._handlers[kind](command)


class Supervisor:
    """Serves clients until the last one is gone."""

    def __init__(
        self,
        processes: WorkerProcesses,
        address: str,
        secret: str,
        settings: Settings,
        role: HostRole = HostRole(),  # noqa: B008 - is immutable
        stderr: Relay | None = None,
    ) -> None:
        """``stderr``: takes what workers write.

        Raises:
            OnnxDLError: the settings or the host's file ask for something that is not available.
        """
        self._role = role
        self._file = _open_file(settings, role)
        settings = settings if self._file is None else self._file.settings
        if settings.memory_limit is not None and not resources.is_proc_mounted():
            raise resources.proc_missing("memory_limit")
        self._metrics_page = _open_metrics_page(settings.metrics)  # may fail, so it comes before the rest
        self._processes = processes
        self._returns = False
        self._store = requirement_store.of(settings)
        epoch = time.time() - time.monotonic()
        self._scheduler = Scheduler(
            settings, epoch, resources.memory(), self._store.get, self._store.is_saved
        )
        expected_until = time.monotonic() + settings.start_timeout
        self._lifetime = Lifetime(role, settings.linger, expected_until)
        self._template_ttl = TemplateTtl(settings.template_ttl)
        greeter = Greeter(secret, self._scheduler, self._lifetime, role.is_shared)
        self._clients = Clients(f"{address}/lifeline", greeter.greet, self._client_gone)
        stderr = stderr or Relay(2)
        self._control = Control(f"{address}/control", self._clients, stderr, is_shared=role.is_shared)
        self._commands = CommandQueue()
        run = self._commands.run
        self._sampler = Sampler(self._scheduler, processes, self._file, run)
        self._workers = WorkerControl(
            self._scheduler, processes, self._control, self._clients, self._sampler, run
        )
        metrics_address = None if self._metrics_page is None else self._metrics_page.address
        messages = ClientMessages(
            self._scheduler, self._clients, self._sampler, role, self._file, metrics_address, run
        )
        self._control.attach(self._workers.receive, messages.receive)
        processes.attach(f"{address}/control", self._workers, stderr.put, self._control)
        self._register_handlers()
        self._signals = SignalPipe(role.foreground)

    def _register_handlers(self) -> None:
        on, workers = self._commands.on, self._workers
        on(commands.StartWorker, workers.start, workers.start_failed)
        on(commands.SendToWorker, workers.send, workers.send_failed)
        on(commands.KillWorker, lambda command: self._processes.kill(command.worker_id))
        on(SendToClient, self._tell_client, lambda command, _: self._clients.drop(command.client))
        on(commands.ForgetPeak, self._sampler.forget_peak)
        on(commands.Remember, lambda command: self._store.put(command.key, command.requirement))
        on(commands.StartSaver, workers.start_saver, lambda *_: workers.saver_ended(0))
        on(commands.EndSaver, lambda _: self._processes.end_saver())
        on(Emit, self._publish)

    # --- the loop -----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serves until the last client is gone and all workers are reaped."""
        self._store.open()  # while the template still imports
        self._apply_file()
        self._processes.reap()  # a child may have ended before signals were caught
        while not self._scheduler.shutdown.finished:
            if not self._scheduler.shutdown.closing:
                clients, models = any(self._clients.identities()), self._scheduler.leases.holds_any
                self._lifetime.update(time.monotonic(), clients=clients, models=models)
            self._handle(sockets.readable(self._sources(), self._timeout()))
            self._on_tick(time.monotonic())
            self._control.pass_on_stderr()
        if self._role.place is not None and not self._returns:
            self._role.place.withdraw()
        if self._metrics_page is not None:
            self._metrics_page.close()
        self._processes.close()
        # The last events and Bye may still be on their way: EOF on a lifeline must not overtake them.
        self._control.close()
        self._clients.close()

    def _timeout(self) -> float | None:
        """Seconds until there is something to do; None: until something arrives."""
        deadlines = (
            self._scheduler.next_deadline(),
            self._processes.next_deadline(),
            self._clients.next_deadline(),
            self._control.router.next_deadline(),
            self._lifetime.next_deadline(closing=self._scheduler.shutdown.closing),
            self._template_ttl.next_deadline(),
        )
        deadline = min((at for at in deadlines if at is not None), default=None)
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    def _sources(self) -> list[int]:
        fds = [
            self._control.router.fileno(),
            self._signals.fileno(),
            *self._processes.sources(),
            *self._clients.sources(),
        ]
        fds += [] if self._lifetime.application is None else [self._lifetime.application]
        fds += [] if self._metrics_page is None else [self._metrics_page.fileno()]
        fds += [] if self._file is None else self._file.sources()
        return fds

    def _handle(self, ready: Container[object]) -> None:
        # Workers first: messages that they sent before they died must be handled before their death.
        if self._control.router.fileno() in ready:
            self._control.receive()
        if self._signals.fileno() in ready:
            self._handle_signals(self._signals.arrived())
            self._control.receive()
            self._processes.reap()
        self._processes.handle(ready)
        if self._file is not None and any(fd in ready for fd in self._file.sources()):
            self._reload_file(asked=False)
        if self._metrics_page is not None and self._metrics_page.fileno() in ready:
            with boundary("the page of metrics"):
                self._metrics_page.answer(self._sampler.figures)
        self._clients.handle(ready, time.monotonic())
        if self._lifetime.application is not None and self._lifetime.application in ready:
            self._lifetime.on_application_gone()
            self._commands.run(self._scheduler.on_abandoned(time.monotonic()))

    def _on_tick(self, now: float) -> None:
        self._processes.on_tick()
        self._clients.on_tick(now)
        self._control.router.on_tick(now)
        with boundary("the search for room", self._workers.search_failed):
            self._sampler.on_tick(now)
        used, spare = self._scheduler.is_used, self._processes.spawn_queue.has_spare
        self._template_ttl.update(now, used=used, spare=spare)
        if self._template_ttl.is_over(now):
            self._processes.spawn_queue.end_spare()
        if self._lifetime.is_over(now):
            if self._lifetime.replaced_because is not None:
                _print(f"the host ends, because {self._lifetime.replaced_because}")
            self._commands.run(self._scheduler.on_abandoned(now))

    def _handle_signals(self, signals: set[int]) -> None:
        now = time.monotonic()
        if signals - {signal.SIGCHLD}:
            self._sampler.refresh(now)  # killed workers cannot be measured afterwards
        reaction = reaction_to(signals, self._role, has_file=self._file is not None)
        if reaction.reload:
            self._reload_file(asked=True)
        if reaction.end:
            self._returns = reaction.returns
            at_once = (
                not self._role.is_shared or self._scheduler.shutdown.closing
            )  # a second signal does not wait
            scheduler = self._scheduler
            self._commands.run(scheduler.on_abandoned(now) if at_once else scheduler.on_stop(now))

    # --- the host's file ----------------------------------------------------------------------------------

    def _reload_file(self, *, asked: bool) -> None:
        with boundary("the host's file"):  # on failure, the last good version stays in force
            if (
                self._file is not None
                and self._file.refresh(asked=asked)
                and not self._scheduler.shutdown.closing
            ):
                self._apply_file()

    def _apply_file(self) -> None:
        if self._file is not None:
            self._file.apply(self._scheduler, self._sampler.prepare_load, self._commands.run)

    # --- clients ------------------------------------------------------------------------------------------

    def _tell_client(self, command: SendToClient) -> None:
        if command.client != HOST:
            self._control.send_to_client(command.client, command.message)
        elif isinstance(command.message, m.Denied) and not self._scheduler.shutdown.closing:
            failure = command.message.failure
            report(f"an eager model did not load: {failure.args[0] if failure.args else failure.name}")

    def _client_gone(self, identity: bytes) -> None:
        self._control.router.forget(identity)
        now = time.monotonic()
        run = self._commands.run
        with boundary("the end of a client", lambda error: run(self._scheduler.forget_client(identity))):
            self._sampler.refresh(now)
            run(self._scheduler.on_client_gone(identity, now))
        if not self._role.is_shared and not any(self._clients.identities()):
            run(self._scheduler.on_abandoned(now))

    def _publish(self, command: Emit) -> None:
        if self._role.foreground:
            _print(str(command.event))
        self._sampler.metrics.on_event(command.event)
        for identity in list(self._clients.identities()):
            self._commands.perform(SendToClient(identity, m.Published(event=command.event)))


def _print(text: str) -> None:
    """Prints on stdout: in the foreground a terminal, else the log of the host."""
    with contextlib.suppress(OSError):  # nobody reads it any more
        print(text, flush=True)


def _open_file(settings: Settings, role: HostRole) -> AppliedFile | None:
    """Reads the host's file; its modules are imported only if there is one."""
    if not settings.config:
        return None
    from onnx_dl.supervisor.hostfile.applied import AppliedFile

    return AppliedFile(settings, role.explicit)


def _open_metrics_page(address: str) -> MetricsEndpoint | None:
    """Serves the page of metrics; its modules are imported only if it is wanted."""
    if not address:
        return None
    from onnx_dl.supervisor.metrics.endpoint import MetricsEndpoint

    return MetricsEndpoint(address)
