"""The thread that decides when in-process models load and unload, and carries that out.

The decisions are the supervisor's (:mod:`onnx_dl.supervisor.policy.scheduler`); this is its loop without
processes.  Facts come in a queue.  Loads run in threads of their own.  The thread exists while a model is
loaded or somebody waits for one.
"""

from __future__ import annotations

import collections
import gc
import itertools
import logging
import os
import time
from collections.abc import Callable
from typing import Final, NamedTuple

from onnx_dl.client.event_dispatch import EventBus, EventDispatcher
from onnx_dl.concurrency import primitives, spawning
from onnx_dl.concurrency.forking import Guard, Promise
from onnx_dl.concurrency.spawning import Thread
from onnx_dl.core.settings import Settings
from onnx_dl.core.status import ModelStatus
from onnx_dl.errors import ProcessesExhausted
from onnx_dl.inprocess import loads
from onnx_dl.inprocess.loads import LoadOutcome
from onnx_dl.inprocess.local_worker import BlobSources, LocalWorker
from onnx_dl.inprocess.memory import GrowthMeter, machine_bytes, resident_bytes, usage_of
from onnx_dl.protocol import control as m
from onnx_dl.protocol import failures
from onnx_dl.protocol.codec import Message
from onnx_dl.supervisor.policy.commands import (
    Command,
    Emit,
    KillWorker,
    SendToClient,
    SendToWorker,
    StartWorker,
)
from onnx_dl.supervisor.policy.measuring import Sample
from onnx_dl.supervisor.policy.outcomes import ExitStatus
from onnx_dl.supervisor.policy.scheduler import Scheduler
from onnx_dl.system import heap, resources

logger = logging.getLogger("onnx_dl")

CLIENT: Final = b"here"
"""Stands for this application where the scheduler names clients."""
_GRACE: Final = 0.5
"""Seconds beyond an end by force in which :meth:`Driver.close` returns."""

Fact = Callable[[float], list[Command]]
"""Hands a fact to the scheduler at a time."""
Reply = m.Granted | m.Denied | m.Unloaded


class ModelFiles(NamedTuple):
    """Source of a load."""

    blobs: BlobSources
    nbytes: int
    """Bytes of files and blobs."""


class Driver:
    """Owner of the scheduler, and of all loads of one host in this process."""

    def __init__(self, settings: Settings, bus: EventBus, sources: Callable[[str], ModelFiles]) -> None:
        """``sources``: returns what the model of a key is loaded from."""
        self.settings = settings
        self.workers: dict[int, LocalWorker] = {}
        """Loads that are not dropped, by id."""
        self._sources = sources
        self._bus = bus
        self._scheduler = Scheduler(
            settings, time.time() - time.monotonic(), resources.memory() or machine_bytes()
        )
        self._meter = GrowthMeter()
        self._facts: primitives.SimpleQueue[Fact | None] = primitives.SimpleQueue()
        self._tickets = itertools.count(1)
        self._asked: dict[int, Promise[Reply]] = {}
        self._lock = Guard()
        self._thread: Thread | None = None
        self._events = EventDispatcher(bus)
        self._commands: collections.deque[Command] = collections.deque()

    # --- in any thread ------------------------------------------------------------------------------------

    def tell(self, fact: Callable[[Scheduler, float], list[Command]]) -> None:
        """Hands on a fact.  Takes no lock and does not wait.  Nothing happens if nothing is loaded."""
        if self._thread is not None:
            self._facts.put(lambda now: fact(self._scheduler, now))

    def ask(self, question: Callable[[Scheduler, int, float], list[Command]]) -> tuple[int, Promise[Reply]]:
        """Asks the scheduler; the number of the request, and the promise of its answer."""
        ticket, promise = next(self._tickets), Promise[Reply]()
        self._asked[ticket] = promise
        self._put(lambda now: question(self._scheduler, ticket, now), promise)
        return ticket, promise

    def forget(self, ticket: int) -> None:
        """Forgets a request whose answer is not waited for any more."""
        self._asked.pop(ticket, None)

    def look(self) -> list[ModelStatus]:
        """The status of all models."""
        promise: Promise[list[ModelStatus]] = Promise()

        def fact(now: float) -> list[Command]:
            readings = {worker.id: worker.gauges.read() for worker in self.workers.values()}
            promise.set_result(self._scheduler.snapshot(now, readings))
            return []

        self._put(fact, promise)
        return promise.result(self.settings.start_timeout)

    @property
    def memory_limit(self) -> int | None:
        """Bytes that all models in this process together may take."""
        return self._scheduler.memory_limit

    def close(self) -> None:
        """Unloads everything, calls that run are told to end, and waits for that, but not for ever."""
        thread = self._thread
        if thread is not None:
            self._facts.put(lambda now: self._scheduler.on_abandoned(now))
            if not thread.is_this:
                thread.join(self.settings.exit_grace + _GRACE)
                self._events.join(_GRACE)

    def _put(self, fact: Fact, promise: Promise[Reply] | Promise[list[ModelStatus]]) -> None:
        def safely(now: float) -> list[Command]:
            try:
                return fact(now)
            except Exception as error:  # concerns the one who asks
                promise.set_exception(error)
                return []

        self._facts.put(safely)
        with self._lock.alone():
            if (thread := self._thread) is None:
                events, thread = EventDispatcher(self._bus), Thread(self._serve, "onnx-dl-inprocess")
                events.start()
                self._events, self._thread = events, thread
                try:
                    spawning.start(thread, "A model in this process")
                except BaseException:
                    self._thread = None
                    events.end()
                    raise
        promise.giver = thread.number

    # --- in the driver's thread ---------------------------------------------------------------------------

    def _serve(self) -> None:
        events = self._events
        try:
            while not self._may_end():
                try:
                    facts = [self._facts.get(timeout=self._timeout())]
                except primitives.Empty:
                    facts = []
                self._turn(facts)
        finally:
            events.end()

    def _may_end(self) -> bool:
        with self._lock:
            outbox = self._scheduler.outbox
            idle = not (self.workers or outbox.tickets or self._scheduler.admission.pending)
            if idle and self._facts.empty():
                self._thread = None
                return True
            return False

    def _timeout(self) -> float | None:
        now = time.monotonic()
        waits = [self._gate_wait(worker, now) for worker in list(self.workers.values())]
        ends = [worker.give_up_at for worker in self.workers.values()]
        deadlines = [at - now for at in (self._scheduler.next_deadline(), *ends) if at is not None]
        left = min([*deadlines, *(wait for wait in waits if wait is not None)], default=None)
        return None if left is None else max(0.0, left)

    def _turn(self, facts: list[Fact | None]) -> None:
        # Before the facts: a caller that found a gate closed must not be granted that load again.
        now = time.monotonic()
        for worker in list(self.workers.values()):
            self._gate_wait(worker, now)
            if worker.give_up_at is not None and worker.give_up_at <= now:
                self._finish(worker)
        while not self._facts.empty():
            facts.append(self._facts.get())
        for fact in facts:
            if fact is not None:
                self._run(fact)
        self._run(self._tick)

    def _tick(self, now: float) -> list[Command]:
        scheduler, commands = self._scheduler, []
        for worker_id in scheduler.to_check(now):
            worker = self.workers.get(worker_id)
            commands += scheduler.on_checked(
                worker_id, 0 if worker is None else worker.gauges.read().busy, now
            )
        if loads := scheduler.to_weigh(now):
            resident = resident_bytes()
            for load in loads:
                commands += scheduler.on_weighed(
                    load.worker_id, self._meter.growth(load.worker_id, resident), now
                )
        looks = scheduler.wants_look(now)
        samples = {w.id: Sample(None, w.gauges.read()) for w in self.workers.values()} if looks else {}
        return [*commands, *scheduler.on_tick(now, samples)]

    def _gate_wait(self, worker: LocalWorker, now: float) -> float | None:
        """Carries out what the gate of a worker decides; seconds until it must be asked again."""
        gate = worker.gate
        if gate is None or worker.ended or worker.drained:
            return None
        decision = gate.judge(now)
        if decision.expired:
            self._run(lambda now: self._scheduler.on_draining(worker.id, worker.usage, now, gate.reason))
        if decision.drained and not worker.drained:
            worker.drained = True
            worker.close()
            self._run(lambda now: self._scheduler.on_drained(worker.id, worker.usage, now))
        return decision.wait

    def _run(self, fact: Fact) -> None:
        """Hands over a fact and carries out what was decided, in order."""
        try:
            self._commands.extend(fact(time.monotonic()))
        except Exception:  # one fact must not end the others' models
            logger.exception("A fact about an in-process model could not be handled")
        while self._commands:
            command = self._commands.popleft()
            try:
                self._perform(command)
            except Exception:
                logger.exception("%s failed for an in-process model", type(command).__name__)

    def _perform(self, command: Command) -> None:
        match command:
            case StartWorker(worker_id=worker_id, spec=spec):
                self.workers[worker_id] = LocalWorker(worker_id, spec, lambda: self._facts.put(None))
                self._run(lambda now: self._scheduler.on_spawned(worker_id, os.getpid()))
                self._run(lambda now: self._scheduler.on_started(worker_id))
            case SendToWorker(worker_id=worker_id, message=message):
                if (worker := self.workers.get(worker_id)) is not None:
                    self._order(worker, message)
            case KillWorker(worker_id=worker_id):
                if (worker := self.workers.get(worker_id)) is not None:
                    worker.kill(time.monotonic() + self.settings.exit_grace)
            case SendToClient(message=m.Granted() | m.Denied() | m.Unloaded() as reply):
                if (promise := self._asked.pop(reply.ticket, None)) is not None:
                    promise.set_result(reply)
            case Emit(event=event):
                self._events.put(event)

    def _order(self, worker: LocalWorker, message: Message) -> None:
        gate = worker.gate
        match message:
            case m.Load():
                self._begin_load(worker, message.ttl)
            case m.Retime(ttl=ttl, used=used) if gate is not None:
                gate.retime(ttl, time.monotonic() if used else None)
            case m.Drain() if gate is not None:
                gate.drain()
            case m.DrainIfIdle() if gate is not None:
                gate.close_if_idle()
            case m.Exit():
                self._finish(worker)

    def _finish(self, worker: LocalWorker) -> None:
        """Drops a session, and has its memory returned."""
        if self.workers.pop(worker.id, None) is None:
            return
        worker.drop()
        gc.collect()
        heap.trim_heap()
        runs = worker.gauges.read().runs
        self._run(lambda now: self._scheduler.on_exited(worker.id, ExitStatus(), "", now, runs=runs))

    # --- loads --------------------------------------------------------------------------------------------

    def _begin_load(self, worker: LocalWorker, ttl: float) -> None:
        files = self._sources(worker.spec.key)
        worker.file_bytes = files.nbytes

        def ended(outcome: LoadOutcome) -> None:
            self._facts.put(lambda now: self._load_ended(worker, outcome, ttl, now))

        try:
            loads.start(worker, files.blobs, self._meter, ended)
        except ProcessesExhausted as error:
            self.workers.pop(worker.id, None)
            reason, failure = str(error), failures.describe(error)
            self._run(lambda now: self._scheduler.on_spawn_failed(worker.id, reason, now, failure))

    def _load_ended(self, worker: LocalWorker, outcome: LoadOutcome, ttl: float, now: float) -> list[Command]:
        grown = self._meter.end(worker.id, resident_bytes())
        backend = outcome.backend.pop() if outcome.backend else None
        if worker.killed:
            del backend
            self._finish(worker)
            return []
        if backend is None or isinstance(outcome.message, m.WorkerFailed):
            assert isinstance(outcome.message, m.WorkerFailed)
            return self._scheduler.on_load_failed(outcome.message, now)
        worker.begin(backend, ttl, now)
        worker.usage = usage_of(grown, worker.file_bytes)
        return self._scheduler.on_ready(outcome.message, worker.usage, now)
