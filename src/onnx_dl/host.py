"""The supervisor that serves this application: started with the first proxy, gone with the application.

Covers starting it, connecting to it, and telling the application what happens in it.  Tensors never come
here; one model's calls are :mod:`onnx_dl.client`'s.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import importlib
import json
import logging
import os
import queue
import secrets
import select
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Protocol, Self

import msgspec
import numpy as np
from numpy.typing import DTypeLike, NDArray

from onnx_dl import config
from onnx_dl.client import RemoteModel, SharedBlob
from onnx_dl.connection import TIDY_EVERY, Connection
from onnx_dl.errors import OnnxDLError, SupervisorDied, SupervisorError, SupervisorStartError
from onnx_dl.events import EventBus, EventStream, EventType, ModelEvent
from onnx_dl.model import ModelSpec, ModelStatus
from onnx_dl.transport import messages as m
from onnx_dl.transport.buffers import Buffers

logger = logging.getLogger("onnx_dl")

_BOOT: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from onnx_dl.supervisor.main import main; main()"
)
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
    gpu_memory_limit: int | None = None
    """The same of GPU memory; None: there is no limit, or nothing was to be loaded on a GPU so far."""
    gpu_memory_in_use: int = 0


class Preloadable(Protocol):
    """What :meth:`ModelHost.preload` takes: an InferenceSessionProxy."""

    def load(self) -> None: ...


class ModelHost:
    """One supervisor process and what this application has in it.

    Starts nothing until the first model is used or :meth:`start` is called.  Use it as a context manager, or
    :meth:`close` it; the interpreter's exit closes it too.
    """

    def __init__(
        self, *, memory_limit: int | str | None = None, gpu_memory_limit: int | str | None = None
    ) -> None:
        """``memory_limit``: bytes that all workers together may take, as a number or as text such as
        ``"2GiB"``; None: what ``ONNX_DL_MEMORY_LIMIT`` says, or four fifths of the machine's or its cgroup's.
        ``gpu_memory_limit``: the same of GPU memory (``ONNX_DL_GPU_MEMORY_LIMIT``); without it, four fifths
        of what all GPUs have, where NVML tells.

        Raises:
            ValueError: (as :class:`~onnx_dl.errors.ConfigError`) one is no size.
        """
        limits = {"memory_limit": memory_limit, "gpu_memory_limit": gpu_memory_limit}
        given = {name: str(config.parse_size(size)) for name, size in limits.items() if size is not None}
        self._settings = msgspec.structs.replace(config.settings(), **given)
        self._bus = EventBus()
        self._reset()
        _hosts.add(self)

    def _reset(self) -> None:
        """As if nothing was ever started; also in a forked child, where nothing of the parent's is ours."""
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._teller: threading.Thread | None = None
        self._models: weakref.WeakValueDictionary[str, RemoteModel] = weakref.WeakValueDictionary()
        self._blobs: weakref.WeakValueDictionary[str, SharedBlob] = weakref.WeakValueDictionary()
        self._events: queue.SimpleQueue[ModelEvent | None] = queue.SimpleQueue()
        self._buffers = Buffers()

    # --- the supervisor -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the supervisor now, so that the first use of a model need not wait for it.

        Raises:
            PlatformError: onnx-dl cannot run on this system.
            SupervisorStartError: the process did not come up.
        """
        with self._lock:
            self._connect()

    def _connect(self) -> Connection:
        """The live connection, to a new supervisor if there is none.  Called with the lock held."""
        if self._connection is not None and not self._connection.closed:
            return self._connection
        if sys.is_finalizing() or _exiting:
            raise SupervisorError("The interpreter is shutting down; no model can be loaded any more.")
        config.check_platform()
        self._bury()
        address, secret = config.fresh_address("host"), secrets.token_hex(16)
        self._process = _start_supervisor(address, secret, self._settings)
        self._events = queue.SimpleQueue()
        self._blobs = weakref.WeakValueDictionary()
        models = self._models = weakref.WeakValueDictionary()
        self._connection = Connection(
            address,
            secret,
            self._settings.start_timeout,
            self._on_event,
            lambda: _shut_all(models),
            lambda: _tidy(models, self._buffers),
        )
        self._teller = threading.Thread(
            target=self._tell, args=(self._events,), name="onnx-dl-events", daemon=True
        )
        self._teller.start()
        return self._connection

    def preload(
        self,
        proxies: Iterable[Preloadable],
        progress: Callable[[Preloadable, int, int], object] | None = None,
    ) -> None:
        """Loads models, all at the same time, and returns when all are ready.

        Args:
            proxies: proxies of this host; each holds its model from then on, as after its first call.
            progress: called in this thread as ``progress(proxy, ready, total)`` when one more is ready.

        Raises:
            ExceptionGroup: some did not load; it holds what each raised, with a note that names the model.
                The others are ready.
        """
        waiting = list(proxies)
        failed: list[Exception] = []
        with concurrent.futures.ThreadPoolExecutor(max(1, len(waiting)), "onnx-dl-preload") as threads:
            loads = {threads.submit(proxy.load): proxy for proxy in waiting}
            for ready, load in enumerate(concurrent.futures.as_completed(loads), 1):
                if (error := load.exception()) is None:
                    if progress is not None:
                        progress(loads[load], ready - len(failed), len(waiting))
                elif isinstance(error, Exception):
                    error.add_note(f"while {loads[load]!r} was loaded")
                    failed.append(error)
                else:
                    raise error
        if failed:
            raise ExceptionGroup(f"{len(failed)} of {len(waiting)} models did not load", failed)

    def close(self) -> None:
        """Ends all workers and the supervisor, and waits until they are gone.  May be called twice.

        Iterators from :meth:`events` end after the last event.
        """
        with self._lock:
            connection = self._connection
            if connection is not None:
                # Dead, or too busy to answer: then _bury() sees to it.
                with contextlib.suppress(SupervisorDied, TimeoutError):
                    connection.ask(lambda ticket: m.Shutdown(ticket=ticket), _FAREWELL)
                connection.close()
                self._connection = None
            self._bury()
            self._buffers.trim()
        if self._teller is not None and self._teller is not threading.current_thread():
            self._teller.join(_FAREWELL)
        self._bus.close()

    def _bury(self) -> None:
        """Reaps a supervisor that ends or is dead, and lets its listeners finish."""
        if self._process is not None:
            try:
                self._process.wait(_FAREWELL)
            except subprocess.TimeoutExpired:
                self._process.kill()  # its workers die with it: PR_SET_PDEATHSIG
                self._process.wait()
            self._process = None
            self._events.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- models -------------------------------------------------------------------------------------------

    def model(self, spec: ModelSpec, memory: Mapping[str, Callable[[], int]]) -> RemoteModel:
        """The one RemoteModel of this application for the spec, starting the supervisor if need be.

        ``memory``: for each of the spec's blobs, what makes a descriptor of it.
        """
        with self._lock:
            connection = self._connect()
            model = self._models.get(spec.key)
            if model is None:
                blobs = [self._blob(connection, name, memory[name]) for name in spec.blobs]
                model = RemoteModel(connection, spec, self._settings, blobs)
                self._models[spec.key] = model
            return model

    def open(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """A proxy of a model in this host: :class:`~onnx_dl.InferenceSessionProxy` with its arguments, for
        example ``host.open("a.onnx", ttl=60, pin=False, priority=0)``."""
        # By name: proxies are built upon hosts.
        return importlib.import_module("onnx_dl.session").InferenceSessionProxy(
            model, *args, host=self, **kwargs
        )

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
        blob = self._blobs.get(name)
        if blob is None:
            blob = self._blobs[name] = SharedBlob(connection, name, make)
        return blob

    def known_model(self, key: str) -> RemoteModel | None:
        """The RemoteModel if there is one and its supervisor lives.  Starts nothing."""
        model = self._models.get(key)
        return None if model is None or model.connection.closed else model

    # --- what happens -------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """All models now, measured now.  Starts and loads nothing and touches no timer."""
        connection = self._connection
        if connection is None or connection.closed:
            return Snapshot(seq=0, supervisor_pid=None, models=[])
        status = connection.ask(lambda ticket: m.AskStatus(ticket=ticket))
        return Snapshot(
            status.seq,
            status.supervisor_pid,
            status.models,
            status.host,
            status.memory_limit,
            status.memory_in_use,
            status.gpu_memory_limit,
            status.gpu_memory_in_use,
        )

    def events(self) -> EventStream:
        """An iterator over events from now on; ``get(timeout)`` waits for one, ``close()`` ends it."""
        return self._bus.stream()

    def on_event(self, callback: Callable[[ModelEvent], object]) -> Callable[[], None]:
        """Calls ``callback`` with each event, in a thread of its own; returns a function that ends that."""
        return self._bus.listen(callback)

    def _on_event(self, event: ModelEvent) -> None:
        """In the connection's thread: must not wait for anything."""
        if model := self._models.get(event.key):
            model.on_event(event)
        self._events.put(event)

    def _tell(self, events: queue.SimpleQueue[ModelEvent | None]) -> None:
        """The thread that tells the application, which may take its time or ask us something."""
        while (event := events.get()) is not None:
            level = logging.WARNING if event.type is EventType.THRASH else logging.INFO
            logger.log(level, "%s", event, extra={"onnx_dl_event": event})
            for callback, error in self._bus.publish(event):
                logger.error("An event callback failed: %r", callback, exc_info=error)


def _shut_all(models: weakref.WeakValueDictionary[str, RemoteModel]) -> None:
    for model in list(models.values()):
        model.shut()


def _tidy(models: weakref.WeakValueDictionary[str, RemoteModel], buffers: Buffers) -> bool:
    buffers.trim()
    left = [model.tidy(TIDY_EVERY) for model in list(models.values())]
    return any(left)


def _start_supervisor(address: str, secret: str, settings: config.Settings) -> subprocess.Popen[bytes]:
    """A supervisor process whose sockets are bound."""
    sys_path = [os.path.abspath(entry) for entry in sys.path]
    ready, ready_write = os.pipe()
    orders = {
        "address": address,
        "secret": secret,
        "sys_path": sys_path,
        "settings": msgspec.to_builtins(settings),
        "ready_fd": ready_write,
    }
    try:
        process = subprocess.Popen(
            # -P: a file named json.py in the current directory is not ours to import.
            [settings.python, "-P", "-c", _BOOT, json.dumps(sys_path)],
            stdin=subprocess.PIPE,
            pass_fds=[ready_write],
            # Ctrl-C in the terminal is the application's.  Not a session of its own: Linux schedules sessions
            # apart (autogroup), and a wake-up across them takes 40 µs instead of 10.
            process_group=0,
        )
    except (OSError, TypeError) as error:
        os.close(ready)
        raise SupervisorStartError(
            f"Cannot start {settings.python!r} ({error}). If this application embeds Python, set "
            "ONNX_DL_PYTHON to the path of an interpreter of the same version."
        ) from error
    finally:
        os.close(ready_write)
    return _await_ready(process, ready, json.dumps(orders).encode(), settings.start_timeout)


def _await_ready(
    process: subprocess.Popen[bytes], ready: int, orders: bytes, timeout: float
) -> subprocess.Popen[bytes]:
    """Gives the orders and waits for the byte that says that they are carried out."""
    assert process.stdin is not None
    try:
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(orders)
        poll = select.poll()
        poll.register(ready, select.POLLIN)
        if poll.poll(timeout * 1000) and os.read(ready, 1):
            return process
    finally:
        os.close(ready)
    process.kill()
    raise SupervisorStartError(
        f"The onnx-dl supervisor did not come up (exit status {process.wait()}); its stderr, above, says why."
    )


_hosts: weakref.WeakSet[ModelHost] = weakref.WeakSet()
_default: ModelHost | None = None
_default_lock = threading.Lock()
_exiting = False


def default_host() -> ModelHost:
    """The host of every proxy that names no other."""
    global _default
    with _default_lock:
        if _default is None:
            _default = ModelHost()
        return _default


def warm_up() -> threading.Thread:
    """Starts the default host's processes in the background, while the application is still busy.

    The first use of a model then need not wait for them.  What goes wrong is told to that first use.  Returns
    the thread that does it, for whoever wants to ``join()``.
    """
    host = default_host()

    def start() -> None:
        with contextlib.suppress(OnnxDLError):
            host.start()

    thread = threading.Thread(target=start, name="onnx-dl-warm-up", daemon=True)
    thread.start()
    return thread


def _close_all() -> None:
    global _exiting
    _exiting = True
    for host in list(_hosts):
        host.close()


def _after_fork() -> None:
    """A forked child starts a supervisor of its own when it uses a model."""
    global _default_lock
    _default_lock = threading.Lock()
    for host in list(_hosts):
        host._reset()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_after_fork)
