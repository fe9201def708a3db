"""One load of a model in this process: its session, the calls that run, and whether a call may begin.

The rules are those of a worker process (:mod:`onnx_dl.workers.gate`).  A call runs in its caller's thread,
or, if it has a deadline or RunOptions that may end it, in a thread that its caller can leave.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final, TypeVar

import msgspec

from onnx_dl.client.cancellation import CancelWatch
from onnx_dl.concurrency import primitives, spawning
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.concurrency.forking import Guard, Promise, importing
from onnx_dl.concurrency.spawning import Thread
from onnx_dl.core import own_sessions
from onnx_dl.core.spec import ModelSpec, working_directory
from onnx_dl.core.status import ModelDescription, Usage, to_plain
from onnx_dl.errors import WorkerDied
from onnx_dl.protocol.control import Granted
from onnx_dl.tensors.call_plans import EngineValue
from onnx_dl.transport.gauges import Gauges
from onnx_dl.workers.engines.base import Backend, CancelToken
from onnx_dl.workers.gate import Gate

NOT_EXECUTED: Final = object()
"""Stands for a result: the model is being unloaded, and the call did not begin."""

BlobSources = Mapping[str, Callable[[], int]]
"""Functions that open a descriptor of the memory that a model is loaded from, by name."""
_Work = Callable[[Backend, CancelToken], EngineValue]
_T = TypeVar("_T")
_FILES: Final = ("optimized_model_filepath", "profile_file_prefix")
"""Options that name files."""


class CallToken(CancelToken):
    """Cancellation of one call.  Without a lock, because the code that cancels may interrupt the call: each
    side notes what it did before it looks at what the other one did."""

    __slots__ = ("_is_cancelled",)

    def __init__(self) -> None:
        super().__init__()
        self._is_cancelled = False

    def attach(self, end: Callable[[], object] | None) -> None:
        self._end = end
        if end is not None and self._is_cancelled:
            end()

    def detach(self) -> None:
        self._end = None

    @property
    def is_cancelled(self) -> bool:
        return self._is_cancelled

    def cancel(self, number: int = 0) -> None:
        self._is_cancelled = True
        if (end := self._end) is not None:
            end()


class LocalWorker:
    """One load.  The driver thread changes its state; any thread makes calls."""

    def __init__(self, worker_id: int, spec: ModelSpec, wake: Callable[[], None]) -> None:
        """``wake``: has the driver look at the gate."""
        self.id = worker_id
        self.spec = spec
        self.gauges = Gauges()
        self.granted: Granted | None = None
        """The grant of the first lease.  It stands for this load in all leases."""
        self.usage = Usage()
        self.file_bytes = 0
        self.drained = False
        self.killed = False
        self.ended = False
        """The session is dropped."""
        self.give_up_at: float | None = None
        """Time when an end by force waits for running calls no longer."""
        self._wake = wake
        self._gate: Gate | None = None
        self._backend: Backend | None = None
        self._tokens: dict[int, CallToken] = {}

    # --- in the driver ------------------------------------------------------------------------------------

    def begin(self, backend: Backend, ttl: float, now: float) -> None:
        """The model is loaded."""
        self._backend = backend
        self._gate = Gate(ttl, now, self._wake, self.gauges, Guard())

    @property
    def gate(self) -> Gate | None:
        """Decides whether calls may begin; None: the model is still loading."""
        return self._gate

    def kill(self, give_up_at: float) -> None:
        """Has no call begin any more, and tells those that run to end."""
        self.killed, self.give_up_at = True, give_up_at
        if self._gate is not None:
            self._gate.end("request")
        for token in list(self._tokens.values()):
            token.cancel()

    def close(self) -> None:
        """Writes what the session must write.  No call runs any more."""
        if self._backend is not None:
            with contextlib.suppress(Exception):  # a profile that cannot be written keeps no memory
                self._backend.close()

    def drop(self) -> None:
        """Lets go of the session."""
        self.ended, self._backend = True, None

    # --- in callers' threads ------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """True if a proxy that has used it may go on to."""
        return not (self.ended or self.killed)

    def call(self, work: _Work, watch: CancelWatch | None = None, *, is_run: bool = True) -> EngineValue:
        """Does ``work`` with the engine, or returns :data:`NOT_EXECUTED`.

        Raises:
            RunTimeout: the deadline of ``watch`` passed.  The run was told to end.
            WorkerDied: ``unload(force=True)`` ended the run.
            Exception: the engine's own.
        """
        gate = self._gate
        if gate is None or not gate.enter():
            return NOT_EXECUTED
        if watch is None:
            return self._perform(work, CallToken(), gate, is_run=is_run)
        token = CallToken()
        ended: Promise[tuple[EngineValue, BaseException | None]] = Promise()

        def run() -> None:
            try:
                ended.set_result((self._perform(work, token, gate, is_run=is_run), None))
            except BaseException as error:
                ended.set_result((None, error))

        def terminate(_: Deadline) -> bool:
            token.cancel()
            return True

        try:
            spawning.start(Thread(run, "onnx-dl-run"), "A run that can be ended")
        except BaseException:
            gate.leave(time.monotonic())
            raise
        try:
            result, error = watch.wait(ended.result, terminate, lambda reply: reply[1] is not None)
        except BaseException:  # Ctrl-C and coroutines that were cancelled included
            token.cancel()
            raise
        if error is not None:
            raise error
        return result

    def _perform(self, work: _Work, token: CallToken, gate: Gate, *, is_run: bool) -> EngineValue:
        """Does ``work`` in this thread, and leaves the gate."""
        number, began = id(token), time.monotonic()
        self._tokens[number] = token
        if self.killed:
            token.cancel()
        try:
            assert self._backend is not None
            return work(self._backend, token)
        except Exception as error:
            # A traceback would keep the session for as long as the caller keeps the exception.
            raise self._explained(error.with_traceback(None)) from error.__cause__
        finally:
            self._tokens.pop(number, None)
            now = time.monotonic()
            gate.leave(now, now - began if is_run else None)

    def _explained(self, error: Exception) -> Exception:
        if not self.killed:
            return error
        text = (
            f"The run of {self.spec.name} was told to end: unload(force=True) was called, or its host closed."
        )
        return WorkerDied(text, pid=os.getpid(), exit_code=None, signal=None, stderr="", reason="request")


def prepare(engine: str) -> None:
    """Imports an engine, while no other thread forks."""
    importing(f"onnx_dl.workers.engines.{engine}")


def load(spec: ModelSpec, sources: BlobSources) -> Backend:
    """Loads the model in this thread.  Raises like ``engines.base.load``."""
    engines = importing("onnx_dl.workers.engines.base")
    with contextlib.ExitStack() as opened, own_sessions.making():
        blobs = {
            name: opened.enter_context(_descriptor(sources[name])) for name in spec.blobs if name in sources
        }
        backend: Backend = engines.load(_from_here(spec), blobs)
        return backend


@contextlib.contextmanager
def _descriptor(make: Callable[[], int]) -> Iterator[int]:
    fd = make()
    try:
        yield fd
    finally:
        primitives.close(fd)


def _from_here(spec: ModelSpec) -> ModelSpec:
    """The spec with absolute paths where the application has changed its working directory since."""
    if working_directory() == spec.cwd:
        return spec  # errors have the path as it was given
    options = dict(spec.options or {})
    for name in _FILES:
        if path := options.get(name):
            options[name] = os.path.join(spec.cwd, path)
    path = None if spec.path is None else spec.where("")
    return msgspec.structs.replace(spec, path=path, options=options if spec.options is not None else None)


def described(backend: Backend) -> ModelDescription:
    """The description as it comes from another process: plain data."""
    plain = msgspec.msgpack.encode(backend.describe(), enc_hook=to_plain)
    return msgspec.msgpack.decode(plain, type=ModelDescription)
