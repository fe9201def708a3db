"""A model in this process, as sessions use it: the counterpart of a model in a worker process."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from onnx_dl.client.acquisition import Lease
from onnx_dl.client.cancellation import CancelWatch
from onnx_dl.client.served_model import Done, RunArguments
from onnx_dl.concurrency import spawning
from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.concurrency.forking import Promise, refuse
from onnx_dl.concurrency.spawning import Thread
from onnx_dl.core.status import ModelDescription, ModelStatus
from onnx_dl.errors import UnloadTimeout
from onnx_dl.inprocess.driver import CLIENT, Driver
from onnx_dl.inprocess.local_claims import LocalClaims, await_reply
from onnx_dl.inprocess.local_worker import NOT_EXECUTED
from onnx_dl.protocol import control as m
from onnx_dl.tensors.call_plans import EngineValue, Feed
from onnx_dl.workers.engines.base import Backend, CancelToken

_T = TypeVar("_T")


class LocalOutputs(NamedTuple):
    """Results for a next model: they are in this process already."""

    values: list[EngineValue]

    def release(self) -> None:
        """Nothing: the results are the caller's."""


class LocalModel(LocalClaims):
    """One model, shared by all proxies of this application that name it.  Thread-safe, without a lock."""

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

    def repeat(self, lease: Lease, outputs: EngineValue, feed: Feed) -> None:
        """None: in this process each call takes the usual steps."""

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
            worker = self.usable_by(lease) or self.acquire(lease, deadline)
            result = worker.call(work, watch, is_run=is_run)
            if result is not NOT_EXECUTED:
                return result
            self.leave(lease, worker)
            if deadline is not None:
                deadline.check("the worker")

    def describe(self, lease: Lease) -> ModelDescription:
        """The model's description.  Loads the model if it never was loaded; else a use of a loaded one."""
        worker = self.worker
        if self.description is None:
            self._touch(lease)
        elif worker is not None and worker.is_open:
            worker.call(lambda backend, token: None, is_run=False)
        assert self.description is not None
        return self.description

    def _touch(self, lease: Lease, watch: CancelWatch | None = None) -> None:
        deadline = None if watch is None else watch.deadline
        self.acquire(lease, deadline) if self.usable_by(lease) is None else None
        self._perform(lease, lambda backend, token: None, None, is_run=False)

    # --- life ---------------------------------------------------------------------------------------------

    def load(self, lease: Lease, deadline: Deadline | None = None) -> None:
        """Has the model ready.  Counts as a use, except with a TTL of 0, where a use would end it."""
        if lease.terms.ttl == 0:
            while self.usable_by(lease) is None:
                self.acquire(lease, deadline)
        else:
            self._touch(lease, None if deadline is None else CancelWatch(deadline=deadline))

    def adopt(self, lease: Lease) -> None:
        self.acquire(lease, for_host=True)

    def hold(self, lease: Lease, deadline: Deadline | None = None) -> None:
        """Begins a ``session()`` block; may raise DeadlinePassed."""
        while not self.blocks.begin(worker := self.usable_by(lease) or self.acquire(lease, deadline)):
            self.leave(lease, worker)
            if deadline is not None:
                deadline.check("the worker")

    def unhold(self) -> None:
        """Ends a block; with the last one the TTL starts."""
        self.blocks.end()

    def unload(self, *, force: bool, deadline: Deadline | None) -> bool:
        """Unloads the model and returns when its session is dropped; whether there was one.

        Running calls and blocks are waited for.  ``force``: calls are told to end, and are waited for no
        longer than ``ONNX_DL_EXIT_GRACE``.

        Raises:
            UnloadTimeout: it was still in use at the deadline.
            ReentrantUse: it would wait for a block that this thread is in.
        """
        if not force and deadline is None and self.blocks.are_mine:
            refuse(f"in a session() block of {self.spec.name}, which unload() waits for without a timeout")
        unloaded = unload(self.driver(), self.spec.unit, self.spec.name, force=force, deadline=deadline)
        if (worker := self.worker) is not None and worker.ended:
            self.worker = None
        return unloaded

    def status(self, *, measure: bool = True) -> ModelStatus | None:
        return next((status for status in self.driver().look() if status.key == self.spec.unit), None)


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
        answer = await_reply(promise, deadline, "its end")
    except DeadlinePassed:
        driver.forget(ticket)
        seconds = 0.0 if deadline is None else deadline.timeout or 0.0
        raise UnloadTimeout(
            f"{name} was still in use after {seconds:g} seconds; it unloads when the running "
            "calls and session() blocks have ended. unload(force=True) tells calls to end."
        ) from None
    return isinstance(answer, m.Unloaded) and answer.was_loaded
