"""The supervisor that serves this application: one of its own, or one that it shares with others.

Covers who connects to it and when, and which models this application has in it.  How one is started or found
is :mod:`onnx_dl.client.launcher`'s, which hosts a process has without being told :mod:`onnx_dl.host.connect`'s; tensors
never come here; one model's calls are :mod:`onnx_dl.client.remote_model`'s.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Protocol, Self, TypeVar

import msgspec
import numpy as np
from numpy.typing import DTypeLike, NDArray

from onnx_dl.client import launcher
from onnx_dl.client.acquisition import SharedBlob
from onnx_dl.client.connection import TIDY_EVERY, Connection, ConnectionListener
from onnx_dl.client.event_dispatch import EventDispatcher
from onnx_dl.client.event_stream import EventBus, EventStream
from onnx_dl.client.lease import Lease
from onnx_dl.client.remote_model import HostServices, RemoteModel, unload
from onnx_dl.client.worker_output import WorkerOutput
from onnx_dl.concurrency import waits
from onnx_dl.concurrency.background import Background
from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.concurrency.forking import Guard
from onnx_dl.concurrency.waits import Mailbox
from onnx_dl.core.events import ModelEvent
from onnx_dl.core.parsing import parse_size, parse_timeout, parse_worker_stderr
from onnx_dl.core.settings import settings
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelStatus
from onnx_dl.errors import ConfigError, OnnxDLError, SupervisorDied, SupervisorError, SupervisorStartError
from onnx_dl.protocol import control as m
from onnx_dl.protocol import failures
from onnx_dl.system import installation, process_setup
from onnx_dl.system.platform import check_platform
from onnx_dl.tensors.shared_arrays import SharedArrays

_T = TypeVar("_T")

_CLOSED: Final = "The host was closed while it started."

_FAREWELL: Final = 3.0
"""Seconds that the supervisor has to end all workers and itself when the application closes it."""


class Snapshot(msgspec.Struct, frozen=True):
    """All models at one moment; events with a larger ``seq`` came later."""

    seq: int
    supervisor_pid: int | None
    models: list[ModelStatus]
    host: str | None = None
    """The name of a shared host."""
    memory_limit: int | None = None
    """Bytes that all workers together may take."""
    memory_in_use: int = 0
    """Bytes of it that are taken or reserved: workers' PSS or, if that is more, what they are known to take
    in runs; loads in progress; workers on their way out."""
    metrics: str | None = None
    """Where the supervisor serves metrics (``ONNX_DL_METRICS``): host and port."""
    gpu_memory_limit: int | None = None
    """As ``memory_limit``; None: there is no limit, or nothing was to be loaded on a GPU so far."""
    gpu_memory_in_use: int = 0


class Preloadable(Protocol):
    """What :meth:`ModelHost.preload` takes: an InferenceSessionProxy."""

    def load_by(self, deadline: Deadline) -> None: ...


class Member(Protocol):
    """A proxy of a model that may be in a group."""

    @property
    def group(self) -> str | None: ...

    def companion(self) -> RemoteModel | None: ...


class ModelHost:
    """One supervisor process and what this application has in it.

    Starts nothing until the first model is used or :meth:`start` is called.  Use it as a context manager, or
    :meth:`close` it; the interpreter's exit closes it too.  One that several applications share comes from
    :func:`connect`.
    """

    name: str | None = None
    """Of a host that several applications share."""
    starts = True
    """Whether it is started if it does not run."""

    def __init__(
        self,
        *,
        memory_limit: int | str | None = None,
        gpu_memory_limit: int | str | None = None,
        config: str | os.PathLike[str] | None = None,
        worker_stderr: str | None = None,
    ) -> None:
        """``memory_limit``: bytes that all workers together may take, as a number or as text such as
        ``"2GiB"``; None: what ``ONNX_DL_MEMORY_LIMIT`` says, or four fifths of the machine's or its cgroup's.
        ``gpu_memory_limit``: the same of GPU memory (``ONNX_DL_GPU_MEMORY_LIMIT``); without it, four fifths
        of what all GPUs have, where NVML tells.

        ``config``: a file that says which models the host has and what they may take (docs/host-file.md);
        None: what ``ONNX_DL_CONFIG`` says.  It is read when the supervisor starts, which raises if it cannot
        be used, and again whenever it changes.

        ``worker_stderr``: where lines go that workers write on stderr: ``"inherit"``, to this application's
        stderr as it is at that moment; ``"log"``, to the logger ``onnx_dl.worker``; None: what
        ``ONNX_DL_WORKER_STDERR`` says.

        Raises:
            ValueError: (as :class:`~onnx_dl.errors.ConfigError`) one is no size, or ``worker_stderr`` neither
                of its two.
        """
        limits = {"memory_limit": memory_limit, "gpu_memory_limit": gpu_memory_limit}
        given: dict[str, int | str] = {
            name: parse_size(size) for name, size in limits.items() if size is not None
        }
        self._explicit = list(given)
        if config is not None:
            given["config"] = os.path.abspath(config)
        if worker_stderr is not None:
            given["worker_stderr"] = parse_worker_stderr(worker_stderr)
        self._settings = msgspec.structs.replace(settings(), **given)
        self._bus = EventBus()
        self._grouped: weakref.WeakValueDictionary[int, Member] = weakref.WeakValueDictionary()
        self._reset()
        _hosts[id(self)] = self

    def forget(self) -> None:
        """In a forked child: nothing of the parent's is ours."""
        if self._process is not None:
            self._process.returncode = 0  # no child of this process: subprocess must not warn of it
        self._reset()

    def _reset(self) -> None:
        """As if nothing was ever started."""
        self._lock = Guard()  # brief: guards what follows
        self._handing_over = Guard()
        self._starting: _Start | None = None
        self._connection: Connection | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._models: weakref.WeakValueDictionary[str, RemoteModel] = weakref.WeakValueDictionary()
        self._teller = EventDispatcher(self._bus)
        self._buffers = SharedArrays()

    # --- the supervisor -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the supervisor now, so that the first use of a model need not wait for it.

        Raises:
            PlatformError: onnx-dl cannot run on this system.
            SupervisorStartError: the process did not come up.
        """
        self._connect()

    def _connect(self, deadline: Deadline | None = None, *, start: bool = True) -> Connection:
        """The live connection, to a new supervisor if there is none.  One thread starts it, for all who wait.

        ``start``: whether a shared one may be started.

        Raises:
            DeadlinePassed: the deadline did; the start goes on.
        """
        may_start = start and self.starts
        while True:
            if (connection := self._alive) is not None:
                return connection
            if sys.is_finalizing() or _exiting:
                raise SupervisorError("The interpreter is shutting down; no model can be loaded any more.")
            check_platform()
            with self._lock.alone():
                if (connection := self._alive) is not None:
                    return connection
                if self._starting is None or self._starting.done:
                    self._starting = _Start(self, may_start)
                launcher = self._starting
            try:
                return launcher.wait(deadline, "the host to start")
            except SupervisorError:
                if launcher.may_start or not may_start:
                    raise
                # Another thread only looked for a host that runs.

    @property
    def _alive(self) -> Connection | None:
        connection = self._connection
        return connection if connection is not None and connection.usable else None

    def bring_up(self, this: _Start, deadline: Deadline) -> Connection:
        """In the thread of :class:`_Start`: a connection to a new supervisor."""
        try:
            return self._bring_up(this, deadline)
        except (DeadlinePassed, SupervisorError):
            if deadline.passed:  # close() ended it
                raise SupervisorError(_CLOSED) from None
            raise

    def _bring_up(self, this: _Start, deadline: Deadline) -> Connection:
        deadline.check("the host to start")
        process_setup.fill_standard_streams()
        _bury(*self._take())
        teller = EventDispatcher(self._bus)
        teller.start()  # first: where there is no thread for it, nothing is to be undone
        try:
            return self._bring_up_for(this, teller, deadline)
        except BaseException:
            teller.end()
            raise

    def _bring_up_for(self, this: _Start, teller: EventDispatcher, deadline: Deadline) -> Connection:
        models = self._models
        process: subprocess.Popen[bytes] | None = None
        link = functools.partial(self._link, teller, models)
        if self.name is not None:
            connection = launcher.reach(self.name, self._settings, link, deadline, start=this.may_start)
        else:
            process, address, secret = launcher.start_private(self._settings, self._explicit, deadline)
            try:
                connection = link(address, secret, deadline)
            except BaseException:
                _end(process)
                raise
        with self._lock:
            if wanted := self._starting is this:
                self._connection, self._process, self._teller = connection, process, teller
        if not wanted:  # closed meanwhile
            connection.close()
            _end(process)
            raise SupervisorError(_CLOSED)
        return connection

    def _present(self) -> Connection | None:
        """The live connection, after a restart to the next host if there is one by now.  Starts nothing."""
        connection = self._connection
        if connection is None or connection.usable:
            return connection
        if self.name is None or not launcher.is_running(self.name):
            return None
        with contextlib.suppress(SupervisorError):
            return self._connect(start=False)
        return None

    def _link(
        self,
        teller: EventDispatcher,
        models: weakref.WeakValueDictionary[str, RemoteModel],
        address: str,
        secret: str,
        deadline: Deadline,
    ) -> Connection:
        connection = Connection(
            address,
            secret,
            self._settings.start_timeout,
            ConnectionListener(
                functools.partial(_on_event, models, teller),
                functools.partial(_shut_all, models),
                lambda: _tidy(models, self._buffers),
                WorkerOutput(log=self._settings.worker_stderr == "log"),
            ),
            deadline,
        )
        if connection.build and connection.build != (ours := installation.build()):
            connection.close()
            raise SupervisorStartError(
                f"The host {self.name!r} runs {connection.build}, this application has {ours}: results could "
                "differ. Give connect() or ONNX_DL_HOST another name, and this application has another host."
            )
        return connection

    def preload(
        self,
        proxies: Iterable[Preloadable],
        progress: Callable[[Preloadable, int, int], object] | None = None,
        *,
        timeout: float | None = None,
    ) -> None:
        """Loads models, all at the same time, and returns when all are ready.

        Args:
            proxies: proxies of this host; each holds its model from then on, as after its first call.
            progress: called in this thread as ``progress(proxy, ready, total)`` when one more is ready.
            timeout: seconds for all of them; loads that take longer go on.

        Raises:
            ExceptionGroup: some did not load; it holds what each raised, LoadTimeout for one, with a note
                that names the model.  The others are ready.
        """
        waiting = list(proxies)
        failed: list[Exception] = []
        deadline = Deadline(parse_timeout(timeout), movable=True)
        ended: Mailbox[tuple[Preloadable, BaseException | None]] = Mailbox()
        loads = [
            Background(functools.partial(_load, proxy, deadline, ended), "onnx-dl-preload")
            for proxy in waiting
        ]
        try:
            for load in loads:
                load.begin()
            for ready in range(1, len(waiting) + 1):
                proxy, error = ended.get()
                if error is None:
                    if progress is not None:
                        progress(proxy, ready - len(failed), len(waiting))
                elif isinstance(error, Exception):
                    error.add_note(f"while {proxy!r} was loaded")
                    failed.append(error)
                else:
                    raise error
        finally:  # Ctrl-C, or what progress() raised: no thread waits on
            deadline.end()
            for load in loads:
                load.end(None)
        if failed:
            raise ExceptionGroup(f"{len(failed)} of {len(waiting)} models did not load", failed)

    def close(self) -> None:
        """Ends all workers and the supervisor, and waits until they are gone.  May be called twice.

        A shared host stays, but lets go of all that this application holds.  Iterators from :meth:`events`
        end after the last event.  A proxy of it that is used afterwards starts it again.
        """
        if (present := self._connection) is not None:
            present.check_thread()
        with self._lock.alone():
            # In one step: who uses a model from now on, a signal handler in this thread for one, has a new
            # supervisor, and that one is not to end here.
            connection, process, teller = self._connection, self._process, self._teller
            self._connection = self._process = launcher = None
            if self.name is None:  # of a shared one, other threads may look for the next one meanwhile
                launcher, self._starting = self._starting, None
        if launcher is not None:
            launcher.end(_FAREWELL)
        if connection is not None:
            if self.name is None:
                # Dead, or too busy to answer: then _bury() sees to it.
                with contextlib.suppress(SupervisorDied, TimeoutError):
                    connection.ask(lambda ticket: m.Shutdown(ticket=ticket), patience=_FAREWELL)
            connection.close()
        _bury(connection, process, teller)
        self._buffers.trim()
        teller.join(_FAREWELL)
        self._bus.close()

    def stop(self) -> None:
        """Ends the host and all its models, also for other applications; returns when it is gone.

        Calls that run have a few seconds (``ONNX_DL_EXIT_GRACE``) to end.

        Raises:
            TimeoutError: it is still there.
        """
        if self.name is None:
            self.close()
            return
        connection = self._present()
        if connection is not None:
            with contextlib.suppress(SupervisorDied):
                patience = self._settings.exit_grace + _FAREWELL
                connection.ask(lambda ticket: m.Shutdown(ticket=ticket), patience=patience)
        self.close()
        if connection is not None:  # calls that waited may have started the next one
            launcher.await_end(self.name, connection.supervisor_pid, _FAREWELL)

    def _take(self) -> tuple[Connection | None, subprocess.Popen[bytes] | None, EventDispatcher]:
        """The last supervisor, which is dead, from whoever would bury it, too."""
        with self._lock:
            process, self._process = self._process, None
            return self._connection, process, self._teller

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- models -------------------------------------------------------------------------------------------

    def model(
        self, spec: ModelSpec, memory: Mapping[str, Callable[[], int]], deadline: Deadline | None = None
    ) -> RemoteModel:
        """The one RemoteModel of this application for the spec, starting the supervisor if need be.

        ``memory``: for each of the spec's blobs, what makes a descriptor of it.

        Raises:
            DeadlinePassed: the host did not start in time; it goes on starting.
        """
        connection = self._connect(deadline)
        if (model := self._models.get(spec.key)) is None:
            made = self._made(connection, spec, memory)
            with self._lock.alone():
                model = self._models.setdefault(spec.key, made)  # another thread may have been faster
        self._move(model, connection, memory)
        return model

    def _made(
        self, connection: Connection, spec: ModelSpec, memory: Mapping[str, Callable[[], int]]
    ) -> RemoteModel:
        return RemoteModel(
            connection,
            spec,
            self._settings,
            HostServices(
                functools.partial(self._renew, memory),
                functools.partial(self._members, spec),
                self._close_idle_lanes,
                is_shared=self.name is not None,
            ),
            self._shared(connection, spec, memory),
        )

    def _move(
        self, model: RemoteModel, connection: Connection, memory: Mapping[str, Callable[[], int]]
    ) -> None:
        if model.connection is not connection:
            model.move(connection, self._shared(connection, model.spec, memory))

    def _close_idle_lanes(self) -> bool:
        """Closes the idle lanes of all models, because descriptors ran out; whether there were any."""
        pools = [pool for model in _alive(self._models) if (pool := model.worker.pool) is not None]
        closed = [pool.close_idle() for pool in pools]  # all of them, not until the first
        return any(closed)

    def join(self, proxy: Member) -> None:
        """A proxy was made; those of one group are loaded together."""
        if proxy.group is not None:
            self._grouped[id(proxy)] = proxy

    def _members(self, spec: ModelSpec) -> list[RemoteModel]:
        """Of its group, in this application.  One that cannot be had is left out; its callers hear why."""
        found: dict[str, RemoteModel] = {}
        for proxy in _alive(self._grouped) if spec.group is not None else ():
            with contextlib.suppress(OnnxDLError, OSError):
                if proxy.group != spec.group or (model := proxy.companion()) is None:
                    continue
                if model.spec.unit == spec.unit:
                    found[model.spec.key] = model
        return list(found.values())

    def _renew(
        self,
        memory: Mapping[str, Callable[[], int]],
        model: RemoteModel,
        failed: Connection,
        deadline: Deadline | None,
    ) -> None:
        """The host that this connection led to is gone or going: finds the next one, or starts it."""
        failed.end()
        self._move(model, self._connect(deadline), memory)

    def _shared(
        self, connection: Connection, spec: ModelSpec, memory: Mapping[str, Callable[[], int]]
    ) -> list[SharedBlob]:
        return [self._blob(connection, name, memory[name]) for name in spec.blobs]

    def open(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """A proxy of a model in this host: :class:`~onnx_dl.InferenceSessionProxy` with its arguments, for
        example ``host.open("a.onnx", ttl=60, pin=False, priority=0)``.

        A name that is no file is looked up in the host's own (``host.toml``), which says how the model is
        loaded; only ``ttl``, ``pin``, ``priority`` and ``latency`` may then be given, in its place.

        Raises: what the proxy's constructor raises.
        """
        # By name: proxies are built upon hosts.
        proxy = importlib.import_module("onnx_dl.session.inference_session").InferenceSessionProxy
        if self._has_names and isinstance(model, str) and not os.path.exists(model):
            named = self._named(model)
            terms = {"ttl": named.ttl, "pin": named.pin, "priority": named.priority} | kwargs
            return proxy.of_spec(named.spec, *args, host=self, **terms)
        return proxy(model, *args, host=self, **kwargs)

    @property
    def _has_names(self) -> bool:
        return bool(self.name or self._settings.config)

    def _named(self, name: str) -> m.Named:
        connection = self._connect()
        answer = connection.ask(lambda ticket: m.AskModel(ticket=ticket, name=name))
        if isinstance(answer, m.Denied):
            raise failures.rebuild(answer.failure)
        named: m.Named = answer
        return named

    def adopt(
        self,
        model: str,
        *,
        ttl: float | str | None = None,
        pin: bool | None = None,
        priority: int | None = None,
        environment: Mapping[str, str | None] | None = None,
    ) -> ModelStatus:
        """Loads a model and has the host itself hold it, also when this application is gone.

        Args:
            model: a path, or a name in the host's file.
            ttl: seconds without use after which it unloads all the same; -1: never; None: what the host's
                file says of a name, else never.
            pin, priority: as a proxy's; None: what the host's file says.
            environment: as a proxy's, of a path.

        Returns:
            How the model fares now.

        Raises: what the model's first call would raise.
        """
        terms = {"ttl": ttl, "pin": pin, "priority": priority, "environment": environment or None}
        given = {name: value for name, value in terms.items() if value is not None}
        with self.open(model, **given) as proxy:
            status: ModelStatus = proxy.adopt()
            return status

    def unload(self, model: str, *, force: bool = False, timeout: float | None = None) -> bool:
        """Ends the workers of a model, whoever uses it, and returns when their memory is back.

        Args:
            model: its name as in :meth:`snapshot` or in the host's file, or its path; of a model in a group,
                the group goes.
            force: do not wait for calls that run; their callers get WorkerDied.

        Returns:
            Whether there was one.

        Raises:
            UnloadTimeout: (a TimeoutError) calls still ran after ``timeout`` seconds; the unload happens when
                they end.
            SupervisorTimeout: the supervisor does not answer.
        """
        if (connection := self._present()) is None:
            return False
        names = {model, os.path.abspath(model)}
        if self._has_names:
            with contextlib.suppress(ConfigError):  # then it is no name in the host's file
                names.add(self._named(model).spec.name)
        models = self.snapshot().models
        keys = {status.key for status in models if names & {status.model, *status.members.values()}}
        deadline = Deadline.of(parse_timeout(timeout))
        answers = [unload(connection, key, model, force=force, deadline=deadline) for key in keys]
        return any(answer.was_loaded for answer in answers)

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """An array like ``numpy.empty``'s that any model of this host is fed without a copy.

        Raises:
            TypeError: the dtype has no fixed size.
            SharedMemoryError: the system has no memory for it.
        """
        if (connection := self._connection) is not None:
            connection.arm()  # memory of arrays that are gone by then is given back
        return self._buffers.empty(shape, dtype)

    def _blob(self, connection: Connection, name: str, make: Callable[[], int]) -> SharedBlob:
        """One for all who need it: a model of a gigabyte is not to be copied by each thread."""
        if self._handing_over.is_mine:
            # A signal handler has interrupted this thread below: one copy more.
            return SharedBlob(connection, name, make)
        with self._handing_over:
            blob: SharedBlob | None = connection.blobs.get(name)
            if blob is None:
                blob = connection.blobs[name] = SharedBlob(connection, name, make)
            return blob

    def known_model(self, key: str) -> RemoteModel | None:
        """The RemoteModel if there is one and its supervisor lives.  Starts nothing."""
        model = self._models.get(key)
        return model if model is not None and model.connection.usable else None

    def leave(self, lease: Lease) -> None:
        """A proxy is closed or collected.  Runs in finalizers, so it takes no lock and waits for nothing.

        The model is not asked: the garbage collector may have found both in one cycle, and then it has
        emptied the weak references to the model before it calls the finalizer of the proxy.
        """
        if (connection := self._connection) is not None:
            connection.send(m.Release(proxy=lease.id))

    # --- what happens -------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """All models now, measured now.  Starts and loads nothing and touches no timer."""
        try:
            if (connection := self._present()) is None:
                return Snapshot(seq=0, supervisor_pid=None, models=[])
            status = connection.ask(lambda ticket: m.AskStatus(ticket=ticket))
        except SupervisorDied:
            if self.name is None:
                raise
            return self.snapshot()  # there may be another
        return Snapshot(
            status.seq,
            status.supervisor_pid,
            status.models,
            status.host,
            status.memory_limit,
            status.memory_in_use,
            status.metrics,
            status.gpu_memory_limit,
            status.gpu_memory_in_use,
        )

    def events(self) -> EventStream:
        """An iterator over events from now on; ``get(timeout)`` waits for one, ``close()`` ends it."""
        return self._bus.stream()

    def on_event(self, callback: Callable[[ModelEvent], object]) -> Callable[[], None]:
        """Calls ``callback`` with each event, in a thread of its own; returns a function that ends that."""
        return self._bus.listen(callback)


def _load(
    proxy: Preloadable,
    deadline: Deadline,
    ended: Mailbox[tuple[Preloadable, BaseException | None]],
    _: Deadline,
) -> None:
    try:
        proxy.load_by(deadline)
    except BaseException as error:
        ended.put((proxy, error))
    else:
        ended.put((proxy, None))


class _Start(Background[Connection]):
    """The supervisor of a host comes up, or is found."""

    def __init__(self, host: ModelHost, may_start: bool) -> None:
        self.may_start = may_start
        super().__init__(lambda deadline: host.bring_up(self, deadline), "onnx-dl-start")


def _on_event(
    models: weakref.WeakValueDictionary[str, RemoteModel], teller: EventDispatcher, event: ModelEvent
) -> None:
    """In the connection's thread: must not wait for anything."""
    for model in _alive(models):
        model.worker.on_event(event)
    teller.put(event)


def _bury(
    connection: Connection | None, process: subprocess.Popen[bytes] | None, teller: EventDispatcher
) -> None:
    """Reaps the supervisor that this led to, which ends or is dead, and lets its listeners finish."""
    if process is not None and connection is not None and connection.lost:
        process.kill()  # it sees no end of its lifeline, on which an abandoned thread waits
    teller.end()
    _end(process)


def _end(process: subprocess.Popen[bytes] | None) -> None:
    """Waits for a supervisor that ends, and kills one that does not."""
    if process is None:
        return
    if not waits.ended(process, _FAREWELL):
        process.kill()  # its workers die with it: PR_SET_PDEATHSIG
        process.wait()


def _alive(known: weakref.WeakValueDictionary[Any, _T]) -> list[_T]:
    """In one step: to go through it fails if another thread adds to it meanwhile."""
    return [value for ref in known.valuerefs() if (value := ref()) is not None]


def _shut_all(models: weakref.WeakValueDictionary[str, RemoteModel], connection: Connection) -> None:
    for model in _alive(models):
        if model.connection is connection:  # else the model was moved meanwhile
            model.worker.leave()


def _tidy(models: weakref.WeakValueDictionary[str, RemoteModel], buffers: SharedArrays) -> bool:
    buffers.trim()
    pools = [pool for model in _alive(models) if (pool := model.worker.pool) is not None]
    left = [pool.tidy(TIDY_EVERY) for pool in pools]
    return any(left)


_hosts: weakref.WeakValueDictionary[int, ModelHost] = weakref.WeakValueDictionary()
_exiting = False


def _close_all() -> None:
    global _exiting
    _exiting = True
    for host in _alive(_hosts):
        host.close()


def _after_fork() -> None:
    """A forked child starts a supervisor of its own when it uses a model."""
    for host in _alive(_hosts):
        host.forget()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_after_fork)
