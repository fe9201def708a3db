"""A model in this process, as sessions use it: the counterpart of a model in a worker process."""

from __future__ import annotations

import collections
import os
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from onnx_dl.client.acquisition import LOAD_MARGIN, Lease
from onnx_dl.client.cancellation import CancelWatch
from onnx_dl.client.served_model import Done, RunArguments
from onnx_dl.concurrency import spawning, waits
from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.concurrency.forking import Promise, refuse
from onnx_dl.concurrency.spawning import Thread
from onnx_dl.core import load_output, model_files
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelDescription, ModelStatus
from onnx_dl.errors import LoadTimeout, ProxyClosedError, UnloadTimeout
from onnx_dl.inprocess.driver import CLIENT, Driver, ModelFiles, Reply
from onnx_dl.inprocess.local_worker import NOT_EXECUTED, BlobSources, LocalWorker
from onnx_dl.protocol import control as m
from onnx_dl.protocol import failures
from onnx_dl.tensors.call_plans import EngineValue, Feed
from onnx_dl.workers.engines.base import Backend, CancelToken

_T = TypeVar("_T")


class LocalOutputs(NamedTuple):
    """Results for a next model: they are in this process already."""

    values: list[EngineValue]

    def release(self) -> None:
        """Nothing: the results are the caller's."""


class _Block(NamedTuple):
    """A ``session()`` block: the thread or greenlet that began it, and the load that it holds."""

    caller: int
    worker: LocalWorker


class LocalModel:
    """One model, shared by all proxies of this application that name it.  Thread-safe, without a lock."""

    def __init__(self, spec: ModelSpec, blobs: BlobSources, driver: Callable[[], Driver]) -> None:
        """``blobs``: memory that it is loaded from; ``driver``: returns the host's present one."""
        self.spec = spec
        self.description: ModelDescription | None = None
        self.blobs = blobs
        self._driver = driver
        self._worker: LocalWorker | None = None
        """The load that was granted last."""
        self._blocks: collections.deque[_Block] = collections.deque()

    @property
    def usable(self) -> bool:
        return True

    @property
    def files(self) -> ModelFiles:
        """Source of a load."""
        own = model_files.bytes_of(self.spec.where("")) if self.spec.path else 0
        return ModelFiles(self.blobs, own + sum(map(self._blob_bytes, self.spec.blobs)))

    def _blob_bytes(self, name: str) -> int:

        make = self.blobs.get(name)
        if make is None:
            return 0
        fd = make()
        try:
            return os.fstat(fd).st_size
        finally:
            os.close(fd)

    # --- calls --------------------------------------------------------------------------------------------

    def run(
        self,
        lease: Lease,
        outputs: EngineValue,
        feed: Feed,
        options: dict[str, EngineValue] | None,
        watch: CancelWatch | None = None,
    ) -> EngineValue:
        """One inference, in this thread, or in one that can be left if there is a ``watch``.

        Raises:
            WorkerDied: ``unload(force=True)`` ended it.
            RunTimeout, DeadlinePassed: the deadline of ``watch`` passed during the run, or before it.
            Exception: what the engine raised.
        """
        fed = _unscoped(feed)
        return self._perform(lease, lambda backend, token: backend.run(outputs, fed, options, token), watch)

    def begin(self, lease: Lease, arguments: RunArguments, watch: CancelWatch, done: Done) -> None:
        """Begins an inference as ``run_async`` does, and returns.  Raises errors found before it runs."""
        started: Promise[None] = Promise()

        outputs, fed, options = arguments.outputs, _unscoped(arguments.feed), arguments.options

        def work(backend: Backend, token: CancelToken) -> EngineValue:
            return backend.run_async(outputs, fed, options, token, lambda: started.set_result(None))

        def run() -> None:
            try:
                result, error = self._perform(lease, work, watch), ""
            except Exception as failed:
                if not started.done():
                    started.set_exception(failed)
                    return
                result, error = [], str(failed)
            done(result, error)

        spawning.start(Thread(run, "onnx-dl-callback"), "run_async()")
        started.result()

    def keep(
        self, lease: Lease, outputs: EngineValue, feed: Feed, options: dict[str, EngineValue] | None
    ) -> LocalOutputs:
        return LocalOutputs(list(self.run(lease, outputs, feed, options)))

    def invoke(
        self, lease: Lease, method: str, *args: EngineValue, watch: CancelWatch | None = None
    ) -> EngineValue:
        given = [_unscoped(arg) if type(arg) is dict else arg for arg in args]
        return self._perform(lease, lambda backend, token: backend.invoke(method, given, token), watch)

    def _perform(
        self,
        lease: Lease,
        work: Callable[..., EngineValue],
        watch: CancelWatch | None = None,
        *,
        is_run: bool = True,
    ) -> EngineValue:
        deadline = None if watch is None else watch.deadline
        while True:
            worker = self._usable_by(lease) or self._acquire(lease, deadline)
            result = worker.call(work, watch, is_run=is_run)
            if result is not NOT_EXECUTED:
                return result
            self._leave(lease, worker)
            if deadline is not None:
                deadline.check("the worker")

    def describe(self, lease: Lease) -> ModelDescription:
        """The model's description.  Loads the model if it never was loaded; else a use of a loaded one."""
        worker = self._worker
        if self.description is None:
            self._touch(lease)
        elif worker is not None and worker.is_open:
            worker.call(lambda backend, token: None, is_run=False)
        assert self.description is not None
        return self.description

    def _touch(self, lease: Lease, watch: CancelWatch | None = None) -> None:
        deadline = None if watch is None else watch.deadline
        self._acquire(lease, deadline) if self._usable_by(lease) is None else None
        self._perform(lease, lambda backend, token: None, None, is_run=False)

    # --- loads --------------------------------------------------------------------------------------------

    def _usable_by(self, lease: Lease) -> LocalWorker | None:
        worker = self._worker
        if worker is None or not worker.is_open:
            return None
        # Inside of a session() block one uses the load that it holds, also while that waits for the block.
        return worker if lease.granted is worker.granted or self._blocks else None

    def serves(self, lease: Lease) -> bool:
        return self._usable_by(lease) is not None

    def grant(self, lease: Lease, deadline: Deadline | None = None) -> m.Granted:
        """What the lease was granted.  Raises the reason if the model does not load."""
        worker = self._usable_by(lease) or self._acquire(lease, deadline)
        assert worker.granted is not None
        return worker.granted

    def leave_outdated(self, lease: Lease, granted: m.Granted, path: str) -> None:
        if lease.granted is granted:
            lease.granted = None
        outdated = m.Outdated(proxy=lease.id, worker_id=granted.worker_id, path=path)
        self._driver().tell(lambda scheduler, now: scheduler.on_outdated(CLIENT, outdated, now))

    def _leave(self, lease: Lease, worker: LocalWorker) -> None:
        """Notes that a load takes no calls any more."""
        if lease.granted is worker.granted:
            lease.granted = None
        if self._worker is worker:
            self._worker = None

    def _acquire(
        self, lease: Lease, deadline: Deadline | None = None, *, for_host: bool = False
    ) -> LocalWorker:
        while True:
            if lease.closed:
                raise ProxyClosedError(f"The proxy of {self.spec.name} is closed; make a new one.")
            driver = self._driver()
            granted = self._ask(driver, lease, deadline, for_host=for_host)
            if lease.closed:  # closed while it waited: it must not keep what it just got
                self.release(lease)
            worker = driver.workers.get(granted.worker_id)
            if worker is None or not worker.is_open:  # it has ended meanwhile
                continue
            worker.granted = worker.granted or granted
            if not for_host:
                lease.granted = worker.granted
            self._worker, self.description = worker, granted.description
            self._hold_again(worker)
            if not lease.has_load_output:
                lease.has_load_output = True
                load_output.repeat(granted.description.details.get("remarks"))
            return worker

    def _ask(self, driver: Driver, lease: Lease, deadline: Deadline | None, *, for_host: bool) -> m.Granted:
        """The scheduler's grant.  Raises what it denies the model with."""
        settings, nbytes = driver.settings, self.files.nbytes
        patience = Deadline(settings.load_timeout + settings.room_timeout + LOAD_MARGIN, outer=deadline)
        ticket, promise = driver.ask(
            lambda scheduler, ticket, now: scheduler.on_acquire(
                CLIENT,
                m.Acquire(
                    ticket=ticket,
                    proxy=lease.id,
                    spec=self.spec,
                    terms=lease.terms,
                    file_bytes=nbytes,
                    for_host=for_host,
                ),
                now,
            )
        )
        try:
            answer = _await(promise, patience, "the model to load")
        except BaseException as broken:  # Ctrl-C included
            driver.forget(ticket)
            keep = isinstance(broken, DeadlinePassed)
            withdrawal = m.Withdraw(ticket=ticket, proxy=lease.id, keep=keep)
            driver.tell(lambda scheduler, now: scheduler.on_withdraw(CLIENT, withdrawal, now))
            if keep and (deadline is None or not deadline.passed):
                raise LoadTimeout(
                    f"{self.spec.name} was not ready after {patience.timeout:g} seconds "
                    "(ONNX_DL_LOAD_TIMEOUT)."
                ) from None
            raise
        if isinstance(answer, m.Denied):
            raise failures.rebuild(answer.failure)
        assert isinstance(answer, m.Granted)
        return answer

    def load(self, lease: Lease, deadline: Deadline | None = None) -> None:
        """Has the model ready.  Counts as a use, except with a TTL of 0, where a use would end it."""
        if lease.terms.ttl == 0:
            while self._usable_by(lease) is None:
                self._acquire(lease, deadline)
        else:
            self._touch(lease, None if deadline is None else CancelWatch(deadline=deadline))

    def adopt(self, lease: Lease) -> None:
        self._acquire(lease, for_host=True)

    # --- session() blocks ---------------------------------------------------------------------------------

    def hold(self, lease: Lease, deadline: Deadline | None = None) -> None:
        """Begins a block; may raise DeadlinePassed."""
        while True:
            worker = self._usable_by(lease) or self._acquire(lease, deadline)
            if worker.gate is not None and worker.gate.hold():
                self._blocks.append(_Block(waits.caller(), worker))
                return
            self._leave(lease, worker)
            if deadline is not None:
                deadline.check("the worker")

    def unhold(self) -> None:
        """Ends a block of this thread or greenlet; else the latest one."""
        me = waits.caller()
        own = [block for block in list(self._blocks) if block.caller == me]
        try:
            block = own[-1] if own else self._blocks[-1]
            self._blocks.remove(block)
        except (IndexError, ValueError):  # a forked child has no blocks of its parent
            return
        if block.worker.gate is not None:
            block.worker.gate.unhold(time.monotonic())

    def _hold_again(self, worker: LocalWorker) -> None:
        """Has the blocks hold a new load, after theirs was ended by force."""
        for block in [block for block in list(self._blocks) if block.worker is not worker]:
            if not block.worker.is_open and worker.gate is not None and worker.gate.hold():
                try:
                    self._blocks.remove(block)
                except ValueError:  # it has ended meanwhile
                    worker.gate.unhold(time.monotonic())
                else:
                    self._blocks.append(block._replace(worker=worker))

    # --- terms and end ------------------------------------------------------------------------------------

    def set_ttl(self, lease: Lease) -> None:
        number, ttl = lease.id, lease.terms.ttl
        self._driver().tell(lambda scheduler, now: scheduler.on_set_ttl(CLIENT, number, ttl))

    def release(self, lease: Lease) -> None:
        lease.granted = None
        number = lease.id
        self._driver().tell(lambda scheduler, now: scheduler.on_release(CLIENT, number, now))

    def unload(self, *, force: bool, deadline: Deadline | None) -> bool:
        """Unloads the model and returns when its session is dropped; whether there was one.

        Running calls and blocks are waited for.  ``force``: calls are told to end, and are waited for no
        longer than ``ONNX_DL_EXIT_GRACE``.

        Raises:
            UnloadTimeout: it was still in use at the deadline.
            ReentrantUse: it would wait for a block that this thread is in.
        """
        if (
            not force
            and deadline is None
            and any(block.caller == waits.caller() for block in list(self._blocks))
        ):
            refuse(f"in a session() block of {self.spec.name}, which unload() waits for without a timeout")
        unloaded = unload(self._driver(), self.spec.unit, self.spec.name, force=force, deadline=deadline)
        if (worker := self._worker) is not None and worker.ended:
            self._worker = None
        return unloaded

    def status(self, *, measure: bool = True) -> ModelStatus | None:
        return next((status for status in self._driver().look() if status.key == self.spec.unit), None)


def _unscoped(feed: Feed) -> dict[str, object]:
    """The feed for the session itself.  An OrtValue of this proxy's own names the proxy as its session, which
    was checked."""
    return {
        name: value if getattr(value, "_session", None) is None else type(value)(value._get_c_value(), value)
        for name, value in feed.items()
    }


def unload(driver: Driver, key: str, name: str, *, force: bool, deadline: Deadline | None) -> bool:
    """Unloads the model of this key; whether it was loaded.  Raises UnloadTimeout."""
    ticket, promise = driver.ask(
        lambda scheduler, ticket, now: scheduler.on_unload(
            CLIENT, m.Unload(ticket=ticket, key=key, force=force), now
        )
    )
    try:
        answer = _await(promise, deadline, "its end")
    except DeadlinePassed:
        driver.forget(ticket)
        seconds = 0.0 if deadline is None else deadline.timeout or 0.0
        raise UnloadTimeout(
            f"{name} was still in use after {seconds:g} seconds; it unloads when the running "
            "calls and session() blocks have ended. unload(force=True) tells calls to end."
        ) from None
    return isinstance(answer, m.Unloaded) and answer.was_loaded


def _await(promise: Promise[Reply], deadline: Deadline | None, what: str) -> Reply:
    while True:
        try:
            return promise.result(None if deadline is None else deadline.step())
        except TimeoutError:
            if promise.done():
                return promise.result()
            assert deadline is not None
            deadline.check(what)
