"""Where processes of ours misbehave on request: a host, a model in some state, and its callers."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil

from onnx_dl import EventType, ModelHost
from onnx_dl.client.cancellation import CancelWatch, not_begun
from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.core.spec import ModelSpec, file_identity, model_key
from onnx_dl.core.terms import Terms
from onnx_dl.errors import (
    LoadTimeout,
    MemoryLimitExceeded,
    ProtocolError,
    RunTimeout,
    SupervisorDied,
    SupervisorTimeout,
    UnloadTimeout,
    WorkerDied,
)
from onnx_dl.session.model_source import ModelSource
from onnx_dl.session.proxy import ModelProxy
from tests.support.waiting import DEADLINE, allowed, eventually

FOLDER: Final = Path(__file__).parent / "misbehaving"
X: Final = np.arange(4, dtype=np.float32)

OUTCOMES: Final[dict[type[Exception], str]] = {
    MemoryLimitExceeded: "memory",
    WorkerDied: "died",
    RunTimeout: "late",
    LoadTimeout: "late",
    UnloadTimeout: "late",
    ProtocolError: "protocol",
    SupervisorDied: "gone",
    SupervisorTimeout: "late",
}


class Misbehaving(ModelProxy):
    """Multiplies by the number in its file; the engine is ``misbehaving/engine.py``."""

    def __init__(
        self, folder: Path, factor: int, host: ModelHost, *, pin: bool = False, **caps: int | None
    ) -> None:
        folder.mkdir()
        path = folder / "model.txt"
        path.write_text(str(factor))
        self.folder, self._factor = folder, factor
        key = model_key(file_identity(str(path)))
        spec = ModelSpec(
            key=key, name=folder.name, cwd=str(folder), engine="misbehaving", path=path.name, **caps
        )
        super().__init__(ModelSource(spec), Terms(pin=pin), host)

    def run(self, timeout: float | None = None) -> None:
        """One call, whose result is compared."""
        deadline = Deadline.of(timeout)
        try:
            model = self._handle.model(deadline)
            watch = None if deadline is None else CancelWatch(deadline=deadline)
            (result,) = model.run(self._handle.lease, None, {"x": X}, None, watch)
        except DeadlinePassed as passed:
            raise not_begun(deadline, passed) from None
        assert np.array_equal(result, X * self._factor), f"a wrong result: {result}"

    def pid(self) -> int | None:
        """Of its worker."""
        found = [s.pid for s in self._handle.host.snapshot().models if s.key == self._handle.spec.key]
        return found[0] if found else None


class Gate:
    """A step at which the worker of a model waits for an order."""

    def __init__(self, folder: Path, step: str) -> None:
        self._path = folder / step
        os.mkfifo(self._path)
        self._fd = -1

    def arrive(self) -> None:
        """Returns when a worker is there; the next one does not wait."""
        eventually(self._opened, f"the worker is at {self._path.name}")
        self._path.unlink()

    def _opened(self) -> bool:
        with contextlib.suppress(OSError):
            self._fd = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK)
        return self._fd >= 0

    def order(self, what: str) -> None:
        """Lets it go on, and misbehave."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._fd, what.encode())
        self.close()

    def close(self) -> None:
        self._path.unlink(missing_ok=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def signal_order(folder: Path, pid: int, what: str) -> None:
    """Has a process misbehave in its main thread; returns when it has, or does for ever, or is gone."""
    path = folder / str(pid)
    path.write_text(what)
    os.kill(pid, signal.SIGUSR1)
    eventually(lambda: not path.exists() or is_stopped(pid), "it obeys")
    path.unlink(missing_ok=True)


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, or gone."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def ended(future: concurrent.futures.Future[Any], within: float) -> str:
    """The outcome of a call, by the words of :data:`OUTCOMES`.  ``within``: seconds on a quiet machine.

    Raises:
        TimeoutError: it goes on.
        Exception: it ended otherwise.
    """
    try:
        future.result(allowed(within))
    except tuple(OUTCOMES) as error:
        return next(word for kind, word in OUTCOMES.items() if isinstance(error, kind))
    return "right"


def belongings(supervisor: int) -> tuple[int, int]:
    """What must not grow: descriptors of the supervisor, and the number of its children.  It has most with a
    standby worker (:func:`.with_standby`)."""
    process = psutil.Process(supervisor)
    return process.num_fds(), len(process.children())


class Scene:
    """A model of a host, brought into a state, in which something misbehaves."""

    def __init__(
        self,
        host: ModelHost,
        folder: Path,
        caps: dict[str, int],
        timeout: float | None = None,
        unload_timeout: float | None = None,
    ) -> None:
        """``timeout``: of calls; ``unload_timeout``: of unload()."""
        self.host = host
        self.folder = folder
        self.timeout = timeout
        self.unload_timeout = unload_timeout
        self.proxy = Misbehaving(folder / f"model{len(os.listdir(folder))}", 3, host, **caps)
        self.gate: Gate | None = None
        self.caller: concurrent.futures.Future[Any] | None = None
        self.unloader: concurrent.futures.Future[Any] | None = None
        self.pid: int | None = None
        self.closing = contextlib.ExitStack()
        self.threads = concurrent.futures.ThreadPoolExecutor(4)
        self.closing.callback(self.threads.shutdown)
        self.closing.callback(self.proxy.close)

    # --- states -------------------------------------------------------------------------------------------

    def enter(self, state: str) -> None:
        getattr(self, f"_{state}")()
        self.pid = self.proxy.pid()

    def call(self) -> concurrent.futures.Future[Any]:
        return self.threads.submit(self.proxy.run, self.timeout)

    def _unload(self) -> None:
        self.unloader = self.threads.submit(self.proxy.unload, timeout=self.unload_timeout)

    def _waits(self, step: str) -> Gate:
        self.gate = gate = Gate(self.proxy.folder, step)
        self.closing.callback(gate.close)
        return gate

    def _unloaded(self) -> None:
        pass

    def _failed(self) -> None:
        gate = self._waits("load")
        caller = self.call()
        gate.arrive()
        gate.order("exit")
        with contextlib.suppress(WorkerDied):
            caller.result(allowed(DEADLINE))
        self.gate = None

    def _import(self) -> None:
        self._at("import")

    def _load(self) -> None:
        self._at("load")

    def _at(self, step: str) -> None:
        gate = self._waits(step)
        self.caller = self.call()
        gate.arrive()

    def _idle(self) -> None:
        self.proxy.run()

    def _hold(self) -> None:
        self.closing.enter_context(self.proxy.session())
        self.proxy.run()

    def _run(self) -> None:
        self.proxy.run()
        self._at("run")

    def _drain(self) -> None:
        self._run()
        with self.host.events() as events:
            self._unload()
            while events.get(allowed(DEADLINE)).type is not EventType.DRAINING:
                pass

    def _close(self) -> None:
        self.proxy.run()
        gate = self._waits("close")
        self._unload()
        gate.arrive()
        self.caller = self.call()

    def waiting(self) -> list[concurrent.futures.Future[Any]]:
        """What has begun and must end."""
        return [future for future in (self.caller, self.unloader) if future is not None]

    def go_on(self) -> None:
        """The worker that waits for an order has none to misbehave."""
        if self.gate is not None:
            self.gate.order("")

    # --- orders -------------------------------------------------------------------------------------------

    def misbehave(self, what: str) -> None:
        """Has the worker do it, in the thread that the state suggests."""
        if self.gate is None or (what.startswith("fact ") and self.gate._path.name == "run"):
            assert self.pid is not None
            signal_order(self.folder / "orders", self.pid, what)
        if self.gate is not None:
            self.gate.order("" if what.startswith("fact ") and self.gate._path.name == "run" else what)


@contextlib.contextmanager
def bounded(seconds: float, what: str) -> Iterator[None]:
    """The block ends in time."""
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took < allowed(seconds), f"{what} took {took:.1f} s, more than {seconds:g}"
