"""The supervisor's only thread: polls, feeds the scheduler, carries out its commands.

The only writer of everything in this process.  What to do is decided by
:mod:`onnx_dl.supervisor.scheduler`; how processes start and end is :mod:`onnx_dl.supervisor.process`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import zmq

from onnx_dl import installation, machine
from onnx_dl.config import Settings
from onnx_dl.errors import ConfigError, InvalidTransition, ProtocolError
from onnx_dl.model import ModelSpec, Usage, blob_tag
from onnx_dl.rendezvous import Place
from onnx_dl.supervisor import store
from onnx_dl.supervisor.admission import Seen
from onnx_dl.supervisor.clients import Client, Clients
from onnx_dl.supervisor.commands import (
    Command,
    Emit,
    EndSaver,
    ForgetPeak,
    KillWorker,
    Remember,
    StartSaver,
    StartWorker,
    TellClient,
    TellWorker,
)
from onnx_dl.supervisor.metrics import Facts, Metrics
from onnx_dl.supervisor.needs import uses_gpu
from onnx_dl.supervisor.probe import Probe
from onnx_dl.supervisor.process import MOST_BLOBS, Processes
from onnx_dl.supervisor.records import HOST
from onnx_dl.supervisor.saving import Wish
from onnx_dl.supervisor.scheduler import Scheduler
from onnx_dl.transport import failures, sockets
from onnx_dl.transport import messages as m
from onnx_dl.transport.gauges import Reading
from onnx_dl.transport.sockets import Listener, Socket

if TYPE_CHECKING:
    from onnx_dl.supervisor.configured import Configuration
    from onnx_dl.supervisor.scrape import Scrape


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
    ) -> None:
        """``place``: where applications find it, if it serves more than the one that started it; it then
        stays for a while without clients, or, in the ``foreground``, until it is told to go.  ``firm``: the
        names of settings that the host's file does not change.

        Raises:
            OnnxDLError: what the settings or the file ask for cannot be had.
        """
        self._file = _file(settings.config)
        self._plain, self._firm = settings, firm
        settings = self._file.over(settings, firm) if self._file else settings
        self._scrape = _scrape(settings.metrics)  # may fail, so it comes first
        self._secret = secret
        self._processes = processes
        self._settings = settings
        self._place = place
        self._foreground = foreground
        self._returns = False
        epoch = time.time() - time.monotonic()
        self._store = store.of(settings)
        self._scheduler = Scheduler(settings, epoch, machine.memory(), self._store)
        self._context = sockets.context()
        self._control: Socket = sockets.router(self._context, f"{address}/control")
        processes.attach(f"{address}/control", self)
        self._clients = Clients(Listener(f"{address}/lifeline"), self._greet, self._client_gone)
        self._abandoned_at: float | None = time.monotonic() + settings.start_timeout
        """When to give up if no client comes; None once one has."""
        self._workers: dict[bytes, int] = {}
        self._identities: dict[int, bytes] = {}
        self._probe: Probe | None = None
        self._on_gpu: set[int] = set()
        """Workers whose models ask for a GPU."""
        self._runs_measured: dict[int, int] = {}
        """The runs that a worker had made when it was looked at."""
        self._metrics = Metrics()
        self._wakeup = _signals(foreground)

    # --- the loop -----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Until the last client is gone and all workers are reaped."""
        self._store.open()  # while the template still imports
        self._follow_file()
        while not self._scheduler.finished:
            self._mind_loneliness()
            deadlines = (self._scheduler.next_deadline(), self._abandoned_at)
            deadline = min((at for at in deadlines if at is not None), default=None)
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            self._take_in(sockets.wait(self._poller(), wait))
            now = time.monotonic()
            seen = self._look(now) if self._scheduler.wants_look(now) else {}
            self._carry_out(self._scheduler.on_tick(now, seen))
            if self._abandoned_at is not None and now >= self._abandoned_at:
                self._abandoned_at = None
                self._carry_out(self._scheduler.on_abandoned(now))
        if self._place is not None and not self._returns:
            self._place.withdraw()
        if self._scrape is not None:
            self._scrape.close()
        self._processes.close()
        # The last events and Bye may still be on their way; EOF on a lifeline must not overtake them.
        self._context.destroy(linger=500)
        self._clients.close()

    def _poller(self) -> zmq.Poller:
        poller = zmq.Poller()
        poller.register(self._control, zmq.POLLIN)
        fds = [self._wakeup, *self._processes.sources(), *self._clients.sources()]
        fds += [] if self._scrape is None else [self._scrape.fileno()]
        fds += [] if self._file is None else self._file.sources()
        for fd in fds:
            poller.register(fd, zmq.POLLIN)
        return poller

    def _take_in(self, ready: dict[Any, int]) -> None:
        # Workers first: what they say before they die must be known before their death is.
        if self._control in ready:
            self._hear_control()
        if self._wakeup in ready:
            self._heed_signals(_pending_signals(self._wakeup))
            self._hear_control()
            self._processes.reap()
        self._processes.handle(ready)
        if self._file is not None and any(fd in ready for fd in self._file.sources()):
            self._reload(asked=False)
        if self._scrape is not None and self._scrape.fileno() in ready:
            self._scrape.answer(self._facts)
        self._clients.handle(ready)

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
        """A shared host that nobody uses, and that has no models of its own, ends after a while."""
        if self._place is None:
            return
        used = self._foreground or self._scheduler.holds_any or any(self._clients.identities())
        if used:
            self._abandoned_at = None
        elif self._abandoned_at is None:
            self._abandoned_at = time.monotonic() + self._settings.linger

    def _carry_out(self, commands: Iterable[Command]) -> None:
        for command in commands:
            match command:
                case StartWorker(worker_id, spec):
                    identity = self._processes.spawn(worker_id, self._blobs(spec))
                    self._identities[worker_id] = identity
                    self._workers[identity] = worker_id
                    if uses_gpu(spec):
                        self._on_gpu.add(worker_id)
                case TellWorker(worker_id, message):
                    self._send(self._identities[worker_id], message)
                case TellClient(client, message) if client != HOST:
                    self._send(client, message)
                case TellClient(_, m.Denied(failure=failure)) if not self._scheduler.closing:
                    why = failure.args[0] if failure.args else failure.name
                    _complain(f"an eager model did not load: {why}")
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
                    if self._foreground:
                        with contextlib.suppress(OSError):  # nobody reads it any more
                            print(event, flush=True)
                    self._metrics.on_event(event)
                    for identity in self._clients.identities():
                        self._send(identity, m.Published(event=event))

    def _send(self, identity: bytes, message: m.Message) -> None:
        self._control.send_multipart([identity, m.encode(message)])

    # --- workers ------------------------------------------------------------------------------------------

    def spawned(self, worker_id: int, pid: int) -> None:
        if worker_id in self._on_gpu:
            self._meter().begin(pid)
        self._carry_out(self._scheduler.on_spawned(worker_id, pid))

    def spawn_failed(self, worker_id: int, reason: str) -> None:
        self._forget(worker_id)
        self._carry_out(self._scheduler.on_spawn_failed(worker_id, self._explain(reason), time.monotonic()))

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
        if worker_id in self._on_gpu and (pid := self._scheduler.pids().get(worker_id)) is not None:
            self._meter().end(pid)
        self._forget(worker_id, reading)
        now = time.monotonic()
        commands = self._scheduler.on_exited(
            worker_id, status, stderr, now, reading.exceeded, runs=reading.runs
        )
        self._carry_out(commands)

    def _start_saver(self, wish: Wish) -> None:
        blob = None if wish.blob is None else self._clients.blobs().get(wish.blob)
        started = False
        if wish.blob is None or blob is not None:  # else the application that gave it is gone
            with contextlib.suppress(OSError):  # out of processes or memory: the next load asks again
                self._processes.start_saver(wish.order, blob, wish.need.ram)
                started = True
        if not started:
            self.saver_ended(0)

    def saver_ended(self, status: int) -> None:
        self._carry_out(self._scheduler.on_saver_ended(status, time.monotonic()))

    def _forget(self, worker_id: int, reading: Reading = Reading()) -> None:  # noqa: B008 - is immutable
        self._metrics.on_gone(worker_id, reading)
        self._workers.pop(self._identities.pop(worker_id), None)
        self._on_gpu.discard(worker_id)
        self._runs_measured.pop(worker_id, None)

    def _heed_worker(self, worker_id: int, data: bytes) -> None:
        try:
            self._carry_out(self._from_worker(worker_id, m.from_worker(data)))
        except InvalidTransition:  # this worker is not to be trusted; the others have done nothing
            traceback.print_exc()
            self._processes.kill(worker_id)

    def _from_worker(self, worker_id: int, message: Any) -> list[Command]:
        if message.worker_id != worker_id:  # a worker speaks for itself only
            return []
        now = time.monotonic()
        scheduler = self._scheduler
        match message:
            case m.WorkerStarted():
                return scheduler.on_started(worker_id)
            case m.WorkerReady():
                self._runs_measured[worker_id] = 0
                if worker_id in self._on_gpu and (pid := scheduler.pids().get(worker_id)) is not None:
                    self._meter().loaded(pid)
                return scheduler.on_ready(message, self._measure(worker_id), now)
            case m.Saveable():
                return scheduler.on_saveable(message, now)
            case m.WorkerFailed():
                return scheduler.on_load_failed(message, now)
            case m.WorkerDraining():
                return scheduler.on_draining(worker_id, self._measure(worker_id), now, message.reason)
            case m.WorkerDrained():
                return scheduler.on_drained(worker_id, self._measure(worker_id), now)
        return []

    def _measure(self, worker_id: int) -> Usage:
        pid = self._scheduler.pids().get(worker_id)
        return Usage() if pid is None else self._meter().measure(pid)

    def _meter(self) -> Probe:
        if self._probe is None:
            self._probe = Probe()
        return self._probe

    def _look(self, now: float, *, fresh: bool = False) -> dict[int, Seen]:
        """Every worker: whether it is in use, and what it holds if it was since it was measured (1 ms each);
        ``fresh``: in any case."""
        readings = self._processes.readings()
        seen = {}
        for worker_id in self._scheduler.pids():
            reading = readings.get(worker_id, Reading())
            is_used = reading.busy or self._runs_measured.get(worker_id) != reading.runs
            seen[worker_id] = Seen(self._measure(worker_id) if fresh or is_used else None, reading)
            self._runs_measured[worker_id] = reading.runs
        for worker_id, pid in self._scheduler.ghosts(now).items():
            seen[worker_id] = Seen(Usage(gpu=self._meter().gpu_left(pid)))
        return seen

    def _refresh(self, now: float, *, fresh: bool = False) -> None:
        """Has the scheduler know what workers hold now."""
        for worker_id, seen in self._look(now, fresh=fresh).items():
            self._carry_out(self._scheduler.on_measured(worker_id, seen, now))

    # --- clients ------------------------------------------------------------------------------------------

    def _hear_control(self) -> None:
        """Every message that has come, from workers and clients."""
        while True:
            try:
                identity, data = self._control.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            except ValueError:  # not two frames: nobody we know
                continue
            try:
                if (worker_id := self._workers.get(identity)) is not None:
                    self._heed_worker(worker_id, data)
                # What it said on its lifeline, it said before: the bytes of a model, for one.
                elif client := self._clients.known(identity):
                    self._carry_out(self._from_client(client, m.from_client(data)))
            except ProtocolError as error:  # a peer that talks nonsense gets no answer
                _complain(str(error))

    def _from_client(self, client: Client, message: object) -> list[Command]:
        now = time.monotonic()
        scheduler = self._scheduler
        identity = client.identity or b""
        match message:
            case m.Acquire():
                self._prepare(message, now)
                return scheduler.on_acquire(identity, message, now)
            case m.Release(proxy=proxy):
                return scheduler.on_release(identity, proxy, now)
            case m.SetTtl(proxy=proxy, ttl=ttl):
                return scheduler.on_set_ttl(identity, proxy, ttl)
            case m.Unload():
                self._refresh(now)  # what is killed cannot be measured afterwards
                return scheduler.on_unload(identity, message, now)
            case m.AskFate():
                return scheduler.on_ask_fate(identity, message)
            case m.Shutdown():
                self._refresh(now)
                return scheduler.on_shutdown(identity, message, now, gently=self._place is not None)
            case m.AskStatus():
                return [TellClient(identity, self._status(message, now))]
            case m.AskModel(ticket=ticket, name=name):
                return [TellClient(identity, self._named(ticket, name))]
            case m.DropBlob(number=number):
                client.drop_blob(number)
        return []

    def _prepare(self, ask: m.Acquire, now: float) -> None:
        """Before a load is decided: what workers have grown by counts, and how large the GPUs are."""
        if self._scheduler.is_loaded(ask.spec.unit):
            return
        self._refresh(now)
        grouped = self._file.grouped().get(ask.spec.unit, []) if self._file else []
        if any(map(uses_gpu, (ask.spec, *ask.companions, *grouped))):
            self._scheduler.know_gpus(self._meter().gpu_total())

    def _named(self, ticket: int, name: str) -> m.Message:
        try:
            if self._file is None:
                raise ConfigError(f"There is no file {name!r}, and the host has no file that names models.")
            found = self._file.named(name)
        except ConfigError as error:
            return m.Denied(ticket=ticket, failure=failures.describe(error))
        return m.Named(ticket=ticket, spec=found.spec, ttl=found.ttl, pin=found.pin, priority=found.priority)

    def _status(self, ask: m.AskStatus, now: float) -> m.Status:
        if ask.measure:
            self._refresh(now, fresh=True)
        return m.Status(
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

    def _greet(self, hello: m.ClientHello) -> m.Message | None:
        if self._scheduler.closing:  # without a word: the next host is for it, in a moment
            return None
        if refusal := self._refusal(hello):
            return m.Refused(reason=refusal)
        self._abandoned_at = None
        return m.Welcome(build="" if self._place is None else installation.build())

    def _refusal(self, hello: m.ClientHello) -> str | None:
        if not secrets.compare_digest(hello.secret, self._secret):
            return "the secret is wrong"
        if hello.version != m.PROTOCOL_VERSION:
            return (
                f"the supervisor speaks protocol version {m.PROTOCOL_VERSION}, the client {hello.version}: "
                "run the same version of onnx-dl on both sides"
            )
        return None

    def _client_gone(self, identity: bytes) -> None:
        now = time.monotonic()
        self._refresh(now)
        self._carry_out(self._scheduler.on_client_gone(identity, now))
        if self._place is None and not any(self._clients.identities()):
            self._carry_out(self._scheduler.on_abandoned(now))


def _file(path: str) -> Configuration | None:
    """The host's file; what reads it is imported only if there is one."""
    if not path:
        return None
    from onnx_dl.supervisor.configured import Configuration

    return Configuration(path)


def _complain(text: str) -> None:
    """Says on stderr what nobody else is told."""
    with contextlib.suppress(OSError):  # nobody reads it any more
        print(f"onnx-dl: {text}", file=sys.stderr, flush=True)


def _scrape(address: str) -> Scrape | None:
    """Who serves metrics; what that needs is imported only if somebody wants them."""
    if not address:
        return None
    from onnx_dl.supervisor.scrape import Scrape

    return Scrape(address)


def _signals(foreground: bool) -> int:
    """A descriptor from which the numbers of arrived signals can be read."""
    read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if not (number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN):  # nohup
            signal.signal(number, lambda *_: None)
    if not foreground:
        # Ctrl-C goes to the whole group; it is the application's.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return read_end


def _pending_signals(fd: int) -> set[int]:
    try:
        return set(os.read(fd, 4096))
    except BlockingIOError:
        return set()
