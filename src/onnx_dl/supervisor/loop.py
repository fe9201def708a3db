"""The supervisor's only thread: polls, feeds the scheduler, carries out its commands.

The only writer of everything in this process.  What to do is decided by
:mod:`onnx_dl.supervisor.policy.scheduler`; how processes start and end is :mod:`onnx_dl.supervisor.processes.worker_processes`.  A
failure ends the client, the worker or the command that it concerns (:mod:`onnx_dl.supervisor.boundary`).
"""

from __future__ import annotations

import collections
import contextlib
import errno
import functools
import os
import secrets
import signal
import time
from collections.abc import Container, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from onnx_dl.core.events import ModelEvent
from onnx_dl.core.settings import Settings
from onnx_dl.core.spec import ModelSpec, blob_tag
from onnx_dl.core.status import Usage
from onnx_dl.core.thread_attributes import Standing
from onnx_dl.errors import ConfigError, OnnxDLError, ProtocolError, SupervisorError, WorkerDied
from onnx_dl.protocol import codec, control, failures
from onnx_dl.supervisor.boundary import boundary, tell, tell_failure
from onnx_dl.supervisor.clients import Client, Clients
from onnx_dl.supervisor.measure import requirement_store
from onnx_dl.supervisor.measure.memory_probe import Probe
from onnx_dl.supervisor.metrics.counters import Facts, Metrics
from onnx_dl.supervisor.outlet import Outlet
from onnx_dl.supervisor.policy.cache_saves import SaveRequest
from onnx_dl.supervisor.policy.commands import (
    Command,
    Emit,
    EndSaver,
    ForgetPeak,
    KillWorker,
    Remember,
    SendToClient,
    SendToWorker,
    StartSaver,
    StartWorker,
)
from onnx_dl.supervisor.policy.idle_shutdown import IdleExit
from onnx_dl.supervisor.policy.measuring import Sample
from onnx_dl.supervisor.policy.records import HOST
from onnx_dl.supervisor.policy.requirements import uses_gpu
from onnx_dl.supervisor.policy.scheduler import Scheduler
from onnx_dl.supervisor.processes import exit_status
from onnx_dl.supervisor.processes.worker_process import MOST_BLOBS, Birth, WorkerProcess
from onnx_dl.supervisor.processes.worker_processes import RESERVE, Processes
from onnx_dl.supervisor.relay import MOST_UNREAD, Relay
from onnx_dl.supervisor.signals import Wakeups
from onnx_dl.system import descriptor_limits, installation, procfs, resources
from onnx_dl.transport import running_hosts, sockets
from onnx_dl.transport.addresses import same_secret
from onnx_dl.transport.gauges import Reading
from onnx_dl.transport.rendezvous import Place
from onnx_dl.transport.router import Router

if TYPE_CHECKING:
    from onnx_dl.supervisor.hostfile.applied import Configuration
    from onnx_dl.supervisor.metrics.endpoint import Scrape


_LINGER: Final = 0.5
"""Seconds for the last messages to be taken."""


class Supervisor:
    """Serves clients until the last one is gone."""

    def __init__(
        self,
        processes: Processes,
        address: str,
        secret: str,
        settings: Settings,
        place: Place | None = None,
        foreground: bool = False,
        firm: Sequence[str] = (),
        application: int | None = None,
        stderr: Relay | None = None,
    ) -> None:
        """``place``: where applications find it, if it serves more than the one that started it; it then
        stays for a while without clients, or, in the ``foreground``, until it is told to go.  ``firm``: the
        names of settings that the host's file does not change.  ``application``: a descriptor that is
        readable when the only application is gone that this serves.  ``stderr``: takes what workers write.

        Raises:
            OnnxDLError: what the settings or the file ask for cannot be had.
        """
        self._file = _file(settings.config)
        self._plain, self._firm = settings, firm
        settings = self._file.over(settings, firm) if self._file else settings
        if settings.memory_limit and not procfs.is_mounted():
            raise procfs.missing("memory_limit")
        self._scrape = _scrape(settings.metrics)  # may fail, so it comes first
        self._secret = secret
        self._processes = processes
        self._settings = settings
        self._place = place
        self._stderr = stderr or Relay(Outlet(2))
        self._foreground = foreground
        self._returns = False
        epoch = time.time() - time.monotonic()
        self._store = requirement_store.of(settings)
        self._scheduler = Scheduler(settings, epoch, resources.memory(), self._store, self._store.is_saved)
        self._control = Router(f"{address}/control", RESERVE // 2, self._is_expected)
        processes.attach(f"{address}/control", self)
        self._clients = Clients(f"{address}/lifeline", self._greet, self._client_gone)
        self._application = application
        self._abandoned_at: float | None = time.monotonic() + settings.start_timeout
        """When to give up if no client comes; None once one has."""
        self._solitude = IdleExit(settings.linger, self._abandoned_at, managed=foreground)
        self._workers: dict[bytes, int] = {}
        self._identities: dict[int, bytes] = {}
        self._probe: Probe | None = None
        self._on_gpu: set[int] = set()
        """Workers whose models ask for a GPU."""
        self._runs_measured: dict[int, int] = {}
        """The runs that a worker had made when it was looked at."""
        self._metrics = Metrics()
        self._wakeups = Wakeups(foreground)
        self._todo: collections.deque[Command] = collections.deque()
        self._carrying = False

    # --- the loop -----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until the last client is gone and all workers are reaped."""
        self._store.open()  # while the template still imports
        self._follow_file()
        self._processes.reap()  # one may have ended before signals were heard
        while not self._scheduler.finished:
            self._mind_loneliness()
            self._take_in(sockets.readable(self._sources(), self._patience()))
            self._pass_time(time.monotonic())
            self._pass_on()
        if self._place is not None and not self._returns:
            self._place.withdraw()
        if self._scrape is not None:
            self._scrape.close()
        self._processes.close()
        # The last events and Bye may still be on their way; EOF on a lifeline must not overtake them.
        self._control.close(_LINGER)
        self._clients.close()

    def _patience(self) -> float | None:
        """Seconds until there is something to do; None: not before something comes."""
        deadlines = (
            self._scheduler.next_deadline(),
            self._processes.next_deadline(),
            self._clients.next_deadline(),
            self._control.next_deadline(),
            None if self._scheduler.closing else self._solitude.look_at,
            self._abandoned_at,
        )
        deadline = min((at for at in deadlines if at is not None), default=None)
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    def _sources(self) -> list[int]:
        """Descriptors to poll."""
        fds = [
            self._control.fileno(),
            self._wakeups.fileno(),
            *self._processes.sources(),
            *self._clients.sources(),
        ]
        fds += [] if self._application is None else [self._application]
        fds += [] if self._scrape is None else [self._scrape.fileno()]
        fds += [] if self._file is None else self._file.sources()
        return fds

    def _take_in(self, ready: Container[object]) -> None:
        # Workers first: what they say before they die must be known before their death is.
        if self._control.fileno() in ready:
            self._hear_control()
        if self._wakeups.fileno() in ready:
            self._heed_signals(self._wakeups.arrived())
            self._hear_control()
            self._processes.reap()
        self._processes.handle(ready)
        if self._file is not None and any(fd in ready for fd in self._file.sources()):
            self._reload(asked=False)
        if self._scrape is not None and self._scrape.fileno() in ready:
            with boundary("the page of metrics"):
                self._scrape.answer(self._facts)
        self._clients.handle(ready, time.monotonic())
        if self._application is not None and self._application in ready:
            self._application_gone(self._application)

    def _application_gone(self, application: int) -> None:
        """The only one that this serves, whether it has connected or not."""
        self._application = None
        os.close(application)
        self._carry_out(self._scheduler.on_abandoned(time.monotonic()))

    def _pass_time(self, now: float) -> None:
        self._processes.on_tick()
        self._clients.on_tick(now)
        self._control.on_tick(now)
        with boundary("the search for room", self._end_search):
            self._weigh(now)
            self._check_draining(now)
            seen = self._look(now) if self._scheduler.wants_look(now) else {}
            self._carry_out(self._scheduler.on_tick(now, seen))
        if self._abandoned_at is not None and now >= self._abandoned_at:
            self._abandoned_at = None
            if self._solitude.follower is not None:
                self._say(f"the host ends, because {self._solitude.follower}")
            self._carry_out(self._scheduler.on_abandoned(now))

    def _end_search(self, error: Exception) -> None:
        self._carry_out(self._scheduler.on_stuck(_failure(error)))

    def _heed_signals(self, signals: set[int]) -> None:
        now = time.monotonic()
        if signals - {signal.SIGCHLD}:
            self._refresh(now)  # what is killed cannot be measured afterwards
        if signal.SIGHUP in signals and self._file is not None:
            self._reload(asked=True)
        if self._place is None:
            if signal.SIGTERM in signals or (signal.SIGHUP in signals and self._file is None):
                self._carry_out(self._scheduler.on_abandoned(now))
        elif signals & self._endings():
            # SIGTERM is a service manager's, which may start the next one; a second signal does not wait.
            self._returns = self._foreground and not signals & {signal.SIGINT, signal.SIGHUP}
            again = self._scheduler.closing
            self._carry_out(self._scheduler.on_abandoned(now) if again else self._scheduler.on_stop(now))

    def _endings(self) -> set[int]:
        """The signals that end a shared host.  That of a closed terminal does where it means nothing else."""
        closed = {signal.SIGHUP} if self._foreground and self._file is None else set()
        return {signal.SIGTERM, signal.SIGINT} | closed

    def _reload(self, *, asked: bool) -> None:
        with boundary("the host's file"):  # what was in force before stays
            if self._file is not None and self._file.refresh(asked=asked) and not self._scheduler.closing:
                self._follow_file()

    def _follow_file(self) -> None:
        """What the host's file says is in force from now on."""
        file = self._file
        if file is None:
            return
        settings = file.over(self._plain, self._firm)
        now = time.monotonic()
        self._scheduler.warmups = file.warmups()
        self._carry_out(self._scheduler.on_configured(settings, file.terms(), file.grouped(), now))
        for ask in file.wanted():
            self._prepare(ask, now)
            self._carry_out(self._scheduler.on_acquire(HOST, ask, now))

    def _mind_loneliness(self) -> None:
        """A shared host that nobody uses ends after a while, or when another follows it."""
        if self._place is None or self._scheduler.closing:
            return
        self._abandoned_at = self._solitude.ends_at(
            time.monotonic(),
            clients=any(self._clients.identities()),
            models=self._scheduler.holds_any,
            look=functools.partial(running_hosts.follower, self._place),
        )

    def _carry_out(self, commands: Iterable[Command]) -> None:
        """In the order in which they were decided, also where one leads to others."""
        self._todo.extend(commands)
        if self._carrying:
            return
        self._carrying = True
        try:
            while self._todo:
                self._perform_safely(self._todo.popleft())
        finally:
            self._carrying = False

    def _perform_safely(self, command: Command) -> None:
        """A command that fails is told, and becomes the fact that it was not carried out."""
        with boundary(f"{type(command).__name__} failed", lambda error: self._undo(command, error)):
            self._perform(command)

    def _perform(self, command: Command) -> None:
        match command:
            case StartWorker(worker_id, spec, standing):
                self._start_worker(worker_id, spec, standing)
            case SendToWorker(worker_id, message):
                self._send(self._identities[worker_id], message)
            case SendToClient(client, message) if client != HOST:
                self._pass_on()  # what was written before comes before
                self._send(client, message)
            case SendToClient(_, control.Denied(failure=failure)) if not self._scheduler.closing:
                why = failure.args[0] if failure.args else failure.name
                tell(f"an eager model did not load: {why}")
            case KillWorker(worker_id):
                self._processes.kill(worker_id)
            case ForgetPeak(worker_id):
                if (pid := self._scheduler.pids().get(worker_id)) is not None:
                    self._meter().forget_peak(pid)
            case Remember(key, need):
                self._store.put(key, need)
            case StartSaver(wish):
                self._start_saver(wish)
            case EndSaver():
                self._processes.end_saver()
            case Emit(event):
                self._publish(event)

    def _undo(self, command: Command, error: Exception) -> None:
        """What follows for whom a command concerned that failed."""
        match command:
            case StartWorker(worker_id) if worker_id in self._identities:
                failure = _failure(_exhausted(error) if isinstance(error, OSError) else error)
                self.spawn_failed(worker_id, str(error), failure)
            case SendToWorker(worker_id):
                self._carry_out(self._scheduler.on_broken(worker_id, _failure(error)))
            case SendToClient(client) if client != HOST:
                self._clients.drop(client)
            case StartSaver():
                self.saver_ended(0)

    def _publish(self, event: ModelEvent) -> None:
        if self._foreground:
            self._say(str(event))
        self._metrics.on_event(event)
        for identity in list(self._clients.identities()):
            self._perform_safely(SendToClient(identity, control.Published(event=event)))

    def _say(self, text: str) -> None:
        """To who keeps the host, or to the log of one in the background."""
        with contextlib.suppress(OSError):  # nobody reads it any more
            print(text, flush=True)

    def _send(self, identity: bytes, message: codec.Message) -> None:
        self._control.send(identity, codec.encode(message))

    def _pass_on(self) -> None:
        """What this process and workers have written on stderr since the last time."""
        self._stderr.pour(self._told_to_application)

    def _told_to_application(self, wrote: control.Wrote) -> bool:
        """Whether there is one that has this supervisor for itself, and reads."""
        identity = next(self._clients.identities(), None) if self._place is None else None
        unread = None if identity is None else self._control.unread(identity)
        if identity is None or unread is None or unread > MOST_UNREAD:
            return False
        self._send(identity, wrote)
        return True

    def _start_worker(self, worker_id: int, spec: ModelSpec, standing: Standing | None) -> None:
        identity = self._identities[worker_id] = secrets.token_bytes(16)
        self._workers[identity] = worker_id
        if uses_gpu(spec):
            self._on_gpu.add(worker_id)
        birth = Birth(spec.name, spec.pristine, standing, spec.environment)
        self._processes.spawn(worker_id, identity, self._blobs(spec), birth)

    # --- workers ------------------------------------------------------------------------------------------

    def spawned(self, worker_id: int, pid: int) -> None:
        with self._about(worker_id):
            if worker_id in self._on_gpu:
                self._meter().begin(pid)
            self._carry_out(self._scheduler.on_spawned(worker_id, pid))

    def _about(self, worker_id: int) -> contextlib.AbstractContextManager[None]:
        """Around what concerns one worker: if it fails, that one is not to be trusted; the others have done
        nothing."""
        return boundary(
            f"worker {worker_id}",
            lambda error: self._carry_out(self._scheduler.on_broken(worker_id, _failure(error))),
        )

    def spawn_failed(self, worker_id: int, reason: str, failure: failures.Failure | None = None) -> None:
        with self._about_the_end_of(worker_id):
            self._forget(worker_id)
            now = time.monotonic()
            self._carry_out(self._scheduler.on_spawn_failed(worker_id, self._explain(reason), now, failure))

    def _about_the_end_of(self, worker_id: int) -> contextlib.AbstractContextManager[None]:
        return boundary(
            f"the end of worker {worker_id}",
            lambda error: self._carry_out(
                self._scheduler.on_lost(worker_id, _failure(error), time.monotonic())
            ),
        )

    def _explain(self, reason: str) -> str:
        """With what stands in the log of a host in the background, which the application does not see."""
        if self._place is None or self._foreground:
            return reason
        with contextlib.suppress(OSError):
            reason += (
                f". The end of {self._place.log}:\n{self._place.log.read_text(errors='replace')[-2000:]}"
            )
        return reason

    def exited(self, worker_id: int, status: int, stderr: str, reading: Reading) -> None:
        self._hear_control()
        with self._about_the_end_of(worker_id):
            if worker_id in self._on_gpu and (pid := self._scheduler.pids().get(worker_id)) is not None:
                self._meter().end(pid)
            self._forget(worker_id, reading)
            now = time.monotonic()
            commands = self._scheduler.on_exited(
                worker_id, exit_status.decode(status), stderr, now, reading.exceeded, runs=reading.runs
            )
            self._carry_out(commands)

    def wrote(self, process: WorkerProcess, text: bytes, *, last: bool = False) -> None:
        worker_id, pid = process.worker_id, process.pid or 0
        self._stderr.put(
            control.Wrote(worker_id=worker_id, model=process.model, pid=pid, text=text, last=last)
        )

    def _start_saver(self, wish: SaveRequest) -> None:
        blob = None if wish.blob is None else self._clients.blobs().get(wish.blob)
        if wish.blob is not None and blob is None:  # the application that gave it is gone
            self.saver_ended(0)
        else:
            self._processes.start_saver(wish.order, blob, wish.need.ram, wish.environment)

    def saver_ended(self, status: int) -> None:
        with boundary("the end of a saver", self._end_search):
            self._carry_out(self._scheduler.on_saver_ended(exit_status.decode(status), time.monotonic()))

    def _forget(self, worker_id: int, reading: Reading = Reading()) -> None:  # noqa: B008 - is immutable
        self._metrics.on_gone(worker_id, reading)
        identity = self._identities.pop(worker_id)
        self._workers.pop(identity, None)
        self._control.forget(identity)
        self._on_gpu.discard(worker_id)
        self._runs_measured.pop(worker_id, None)

    def _heed_worker(self, worker_id: int, data: bytes) -> None:
        with self._about(worker_id):
            self._carry_out(self._from_worker(worker_id, control.from_worker(data)))

    def _from_worker(self, worker_id: int, message: Any) -> list[Command]:
        if message.worker_id != worker_id:  # a worker speaks for itself only
            return []
        now = time.monotonic()
        scheduler = self._scheduler
        match message:
            case control.WorkerStarted():
                self._processes.greeted(worker_id)
                return scheduler.on_started(worker_id)
            case control.WorkerReady():
                self._processes.drain(worker_id)
                self._runs_measured[worker_id] = 0
                if worker_id in self._on_gpu and (pid := scheduler.pids().get(worker_id)) is not None:
                    self._meter().loaded(pid)
                return scheduler.on_ready(message, self._measure(worker_id), now)
            case control.Saveable():
                return scheduler.on_saveable(message, now)
            case control.WorkerFailed():
                self._processes.drain(worker_id)
                return scheduler.on_load_failed(message, now)
            case control.WorkerDraining():
                return scheduler.on_draining(worker_id, self._measure(worker_id), now, message.reason)
            case control.WorkerDrained():
                return scheduler.on_drained(worker_id, self._measure(worker_id), now)
        return []

    def _measure(self, worker_id: int) -> Usage:
        pid = self._scheduler.pids().get(worker_id)
        return Usage() if pid is None else self._meter().measure(pid)

    def _meter(self) -> Probe:
        if self._probe is None:
            self._probe = Probe()
        return self._probe

    def _look(self, now: float, *, fresh: bool = False) -> dict[int, Sample]:
        """Every worker: whether it is in use, and what it holds if it was since it was measured (1 ms each);
        ``fresh``: in any case."""
        readings = self._processes.readings()
        seen = {}
        for worker_id in self._scheduler.pids():
            reading = readings.get(worker_id, Reading())
            is_used = reading.busy or self._runs_measured.get(worker_id) != reading.runs
            seen[worker_id] = Sample(self._measure(worker_id) if fresh or is_used else None, reading)
            self._runs_measured[worker_id] = reading.runs
        for worker_id, pid in self._scheduler.lingering_pids(now).items():
            seen[worker_id] = Sample(Usage(gpu=self._meter().gpu_left(pid)))
        return seen

    def _weigh(self, now: float) -> None:
        """Has the scheduler know what loads have taken so far (20 µs each)."""
        for load in self._scheduler.to_weigh(now):
            nbytes = self._meter().weigh(load.pid, load.nbytes)
            self._carry_out(self._scheduler.on_weighed(load.worker_id, nbytes, now))

    def _check_draining(self, now: float) -> None:
        """Has the scheduler know what workers do that are to end."""
        if due := self._scheduler.to_check(now):
            readings = self._processes.readings()
            for worker_id in due:
                busy = readings.get(worker_id, Reading()).busy
                self._carry_out(self._scheduler.on_checked(worker_id, busy, now))

    def _refresh(self, now: float, *, fresh: bool = False) -> None:
        """Has the scheduler know what workers hold now."""
        for worker_id, seen in self._look(now, fresh=fresh).items():
            self._carry_out(self._scheduler.on_measured(worker_id, seen, now))

    # --- clients ------------------------------------------------------------------------------------------

    def _hear_control(self) -> None:
        """Every message that has come, from workers and clients."""
        for identity, data in self._control.receive(time.monotonic()):
            if (worker_id := self._workers.get(identity)) is not None:
                self._heed_worker(worker_id, data)
            # What it said on its lifeline, it said before: the bytes of a model, for one.
            elif client := self._clients.known(identity):
                self._heed_client(client, data)

    def _heed_client(self, client: Client, data: bytes) -> None:
        with boundary(f"the client of process {client.pid}", lambda error: self._clients.drop(identity)):
            identity = client.identity or b""
            try:
                message = control.from_client(data)
            except ProtocolError as error:  # a peer that talks nonsense gets no answer
                tell(str(error))
                return
            try:
                self._carry_out(self._from_client(client, message))
            except Exception as error:
                if not isinstance(message, control.Acquire):
                    raise
                tell_failure(f"{message.spec.name} was not acquired", error)
                now, failure = time.monotonic(), _failure(error)
                self._carry_out(self._scheduler.on_not_acquired(identity, message, failure, now))

    def _from_client(self, client: Client, message: object) -> list[Command]:
        now = time.monotonic()
        scheduler = self._scheduler
        identity = client.identity or b""
        match message:
            case control.Acquire():
                self._check_blobs(client, message)
                if self._place is not None:  # applications would decide for each other
                    message.standing = None
                self._prepare(message, now)
                return scheduler.on_acquire(identity, message, now)
            case control.Withdraw():
                return scheduler.on_withdraw(identity, message, now)
            case control.Outdated():
                return scheduler.on_outdated(identity, message, now)
            case control.Release(proxy=proxy):
                return scheduler.on_release(identity, proxy, now)
            case control.SetTtl(proxy=proxy, ttl=ttl):
                return scheduler.on_set_ttl(identity, proxy, ttl)
            case control.Unload():
                self._refresh(now)  # what is killed cannot be measured afterwards
                return scheduler.on_unload(identity, message, now)
            case control.AskOutcome():
                return scheduler.on_ask_outcome(identity, message)
            case control.Shutdown():
                self._refresh(now)
                return scheduler.on_shutdown(identity, message, now, gently=self._place is not None)
            case control.AskStatus():
                return [SendToClient(identity, self._status(message, now))]
            case control.AskModel(ticket=ticket, name=name):
                return [SendToClient(identity, self._named(ticket, name))]
            case control.DropBlob(number=number):
                client.drop_blob(number)
        return []

    def _check_blobs(self, client: Client, ask: control.Acquire) -> None:
        """
        Raises:
            DescriptorsExhausted: the client gave memory that could not be kept.
        """
        if client.is_short and not self._clients.blobs().keys() >= set(ask.spec.blobs):
            raise descriptor_limits.exhausted(f"The memory that {ask.spec.name} is loaded from")

    def _prepare(self, ask: control.Acquire, now: float) -> None:
        """Before a load is decided: what workers have grown by counts, and how large the GPUs are."""
        if self._scheduler.is_loaded(ask.spec.unit):
            return
        self._refresh(now)
        grouped = self._file.grouped().get(ask.spec.unit, []) if self._file else []
        if any(map(uses_gpu, (ask.spec, *ask.companions, *grouped))):
            self._scheduler.know_gpus(self._meter().gpu_total())

    def _named(self, ticket: int, name: str) -> codec.Message:
        try:
            if self._file is None:
                raise ConfigError(f"There is no file {name!r}, and the host has no file that names models.")
            found = self._file.named(name)
        except ConfigError as error:
            return control.Denied(ticket=ticket, failure=failures.describe(error))
        return control.Named(
            ticket=ticket, spec=found.spec, ttl=found.ttl, pin=found.pin, priority=found.priority
        )

    def _status(self, ask: control.AskStatus, now: float) -> control.Status:
        if ask.measure:
            self._refresh(now, fresh=True)
        return control.Status(
            ticket=ask.ticket,
            seq=self._scheduler.seq,
            supervisor_pid=os.getpid(),
            host=None if self._place is None else self._place.name,
            models=self._scheduler.snapshot(now, self._processes.readings()),
            memory_limit=self._scheduler.memory_limit,
            memory_in_use=self._scheduler.in_use(now).ram,
            metrics=None if self._scrape is None else self._scrape.address,
            gpu_memory_limit=self._scheduler.gpu_memory_limit,
            gpu_memory_in_use=self._scheduler.in_use(now).gpu,
        )

    def _facts(self) -> Facts:
        now = time.monotonic()
        self._refresh(now, fresh=True)
        scheduler, readings = self._scheduler, self._processes.readings()
        models = scheduler.snapshot(now, readings)
        return self._metrics.facts(models, readings, scheduler.memory_limit, scheduler.in_use(now).ram)

    def _blobs(self, spec: ModelSpec) -> dict[str, int]:
        """The memory that a model is loaded from, by tag, as far as somebody has it and one message
        takes it."""
        kept = self._clients.blobs()
        found = [(blob_tag(name), kept[name]) for name in spec.blobs if name in kept]
        return dict(found[:MOST_BLOBS])

    def _is_expected(self, identity: bytes) -> bool:
        return identity in self._workers or self._clients.known(identity) is not None

    def _greet(self, hello: control.ClientHello) -> codec.Message | None:
        if self._scheduler.closing:  # without a word: the next host is for it, in a moment
            return None
        if refusal := self._refusal(hello):
            return control.Refused(reason=refusal)
        self._abandoned_at = None
        self._solitude.on_client()
        return control.Welcome(build="" if self._place is None else installation.build())

    def _refusal(self, hello: control.ClientHello) -> str | None:
        if not same_secret(hello.secret, self._secret):
            return "the secret is wrong"
        if hello.version != codec.PROTOCOL_VERSION:
            return (
                f"the supervisor speaks protocol version {codec.PROTOCOL_VERSION}, the client {hello.version}: "
                "run the same version of onnx-dl on both sides"
            )
        return None

    def _client_gone(self, identity: bytes) -> None:
        self._control.forget(identity)
        now = time.monotonic()
        with boundary(
            "the end of a client",
            lambda error: self._carry_out(self._scheduler.forget_client(identity)),
        ):
            self._refresh(now)
            self._carry_out(self._scheduler.on_client_gone(identity, now))
        if self._place is None and not any(self._clients.identities()):
            self._carry_out(self._scheduler.on_abandoned(now))


def _file(path: str) -> Configuration | None:
    """The host's file; what reads it is imported only if there is one."""
    if not path:
        return None
    from onnx_dl.supervisor.hostfile.applied import Configuration

    return Configuration(path)


def _failure(error: Exception) -> failures.Failure:
    """What a caller is told whom a failure of the host concerns: always an error of ours."""
    if not isinstance(error, OnnxDLError):
        error = SupervisorError(
            f"The host failed ({type(error).__name__}: {error}); its stderr says where. This is a bug in "
            "onnx-dl. What else is loaded goes on."
        )
    return failures.describe(error)


def _exhausted(error: OSError) -> Exception:
    """The error for what the system refused to give a worker."""
    if isinstance(error, OnnxDLError):
        return error
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return descriptor_limits.exhausted("A worker process")
    return WorkerDied(f"No worker process could be started: {error}.")


def _scrape(address: str) -> Scrape | None:
    """Who serves metrics; what that needs is imported only if somebody wants them."""
    if not address:
        return None
    from onnx_dl.supervisor.metrics.endpoint import Scrape

    return Scrape(address)
