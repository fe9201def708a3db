"""Decides when workers start and end.

Pure: facts come in through ``on_*`` methods, with the monotonic time at which they happened; decisions go out
as a list of commands.  It owns the state of every model, who holds it and who waits for it.  Sockets,
processes and clocks are :mod:`onnx_dl.supervisor.loop`'s; the TTL itself runs in the worker, which alone
knows when it was last used.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import msgspec

from onnx_dl.core.events import EventType
from onnx_dl.core.lifecycle import LifecycleEvent, ModelState
from onnx_dl.core.settings import Settings
from onnx_dl.core.spec import ModelSpec, Warmup, group_spec
from onnx_dl.core.status import ModelStatus, Usage
from onnx_dl.errors import HostClosing, LoadTimeout, ProxyClosedError, WorkerDied
from onnx_dl.protocol import codec, control, failures
from onnx_dl.supervisor.policy import cache_saves, exit_reasons
from onnx_dl.supervisor.policy.announcements import Chronicle
from onnx_dl.supervisor.policy.commands import Command, Emit, KillWorker, StartWorker, TellClient, TellWorker
from onnx_dl.supervisor.policy.ledger import Ledger
from onnx_dl.supervisor.policy.measuring import Seen
from onnx_dl.supervisor.policy.outcomes import Fates, death
from onnx_dl.supervisor.policy.records import HOST, Model, Terms, Worker
from onnx_dl.supervisor.policy.recovery import Mending
from onnx_dl.supervisor.policy.requirements import UNLIMITED, Bytes, Known
from onnx_dl.supervisor.policy.thrashing import Thrash
from onnx_dl.supervisor.policy.tickets import Tickets
from onnx_dl.transport.gauges import Reading

_LONGEST_BACKOFF: Final = 60.0
_SHORTEST_GRACE: Final = 1.0
"""Seconds that a worker has at least to say that it has drained."""
_HOSTS_OWN: Final = (HOST, 0)
"""The lease by which the host itself holds a model."""


class Scheduler(Mending):
    """All models of one supervisor.  ``epoch`` is added to monotonic times to make Unix times."""

    def __init__(
        self,
        settings: Settings,
        epoch: float = 0.0,
        memory: int | None = None,
        known: Known | None = None,
        is_saved: Callable[[str], bool] = lambda _: False,
    ) -> None:
        super().__init__(settings, memory, known, is_saved)
        self._settings = settings
        self._epoch = epoch
        self._chronicle = Chronicle(epoch)
        self._models: dict[str, Model] = {}
        self._by_worker: dict[int, Model] = {}
        self._ids = itertools.count(1)
        self._fates = Fates()
        self.tickets = Tickets()
        self._closing: list[tuple[bytes, int]] | None = None
        self._terms: Mapping[str, Terms] = {}
        self._grouped: Mapping[str, Sequence[ModelSpec]] = {}
        self._out: list[Command] = []
        self._thrash = Thrash()
        self.ledger = Ledger()
        self.warmups: Mapping[str, dict[str, Warmup]] = {}
        """By key of the model: the inputs that a worker runs it with once, before it is ready."""

    # --- what clients ask ---------------------------------------------------------------------------------

    def on_acquire(self, client: bytes, ask: control.Acquire, now: float) -> list[Command]:
        """A proxy needs its model."""
        if client != HOST:  # which waits for no answer
            self.tickets.opened(client, ask.ticket)
        if self._closing is not None:
            self._refuse(client, ask)
            return self._done()
        model = self._models.setdefault(ask.spec.unit, Model(ask.spec.unit, ask.spec))
        model.join(client, ask, self._grouped.get(model.key, ()))
        if model.state is ModelState.READY and model.serves(ask):
            self._grant(model, client, ask)
            self._retime(model)
        elif model.state is ModelState.READY:
            model.waiters.append((client, ask))
            self._drain(model, "regrouped", now)
        elif model.state is ModelState.FAILED and now < model.retry_at and model.serves(ask):
            self._deny(client, ask.ticket, model, now)
        else:
            model.waiters.append((client, ask))
            if model.state in (ModelState.UNLOADED, ModelState.FAILED):
                self._want(model, ask.spec, now)
        return self._done()

    def on_release(self, client: bytes, proxy: int, now: float) -> list[Command]:
        """A proxy is closed or collected.  Another thread may wait for its model all the same."""
        for model in list(self._models.values()):
            waiting = [w for w in model.waiters if (w[0], w[1].proxy) == (client, proxy)]
            model.waiters = [w for w in model.waiters if w not in waiting]
            for _, ask in waiting:
                error = ProxyClosedError(f"The proxy of {ask.spec.name} was closed while its model loaded.")
                self._tell(client, control.Denied(ticket=ask.ticket, failure=failures.describe(error)))
            if model.let_go((client, proxy)) or waiting:
                self._after_release(model, "request", now)
        self._admit(now)
        return self._done()

    def on_outdated(self, client: bytes, told: control.Outdated, now: float) -> list[Command]:
        """A file is not any more what a worker has read: this proxy goes to another, who used it stays."""
        model = self._by_worker.get(told.worker_id)
        if model is not None and model.worker is not None and model.worker.ready is not None:
            if not model.worker.outdated:
                model.worker.outdated = True
                self._emit(EventType.OUTDATED, model, model.worker, now, detail=told.path)
            if model.let_go((client, told.proxy)):
                self._after_release(model, "request", now)
                self._admit(now)
        return self._done()

    def on_withdraw(self, client: bytes, ask: control.Withdraw, now: float) -> list[Command]:
        """Nobody waits for the answer to an Acquire any more."""
        self.tickets.close(client, ask.ticket)
        for model in list(self._models.values()):
            waiting = [w for w in model.waiters if (w[0], w[1].ticket) == (client, ask.ticket)]
            if waiting and not ask.keep:
                model.waiters = [w for w in model.waiters if w not in waiting]
                self._after_release(model, "request", now)
            elif not waiting and (client, ask.proxy) in model.leases:  # the answer crossed this
                self._begin_ttl(model)
        self._admit(now)
        return self._done()

    def on_set_ttl(self, client: bytes, proxy: int, ttl: float) -> list[Command]:
        """A proxy's TTL was changed."""
        for model in self._models.values():
            if (client, proxy) in model.leases:
                model.leases[client, proxy] = ttl
                self._retime(model)
            model.waiters = [
                (who, msgspec.structs.replace(ask, ttl=ttl) if (who, ask.proxy) == (client, proxy) else ask)
                for who, ask in model.waiters
            ]
        return self._done()

    def on_unload(self, client: bytes, ask: control.Unload, now: float) -> list[Command]:
        """Somebody wants a model's memory back."""
        self.tickets.opened(client, ask.ticket)
        model = self._models.get(ask.key)
        if model is None or model.worker is None:
            self._tell(client, control.Unloaded(ticket=ask.ticket, was_loaded=False))
        else:
            model.unloaders.append((client, ask.ticket))
            self._drain(model, "request", now, kill=ask.force)
        return self._done()

    def on_configured(
        self,
        settings: Settings,
        terms: Mapping[str, Terms],
        grouped: Mapping[str, Sequence[ModelSpec]],
        now: float,
    ) -> list[Command]:
        """The host's file says other things from now on.

        Args:
            terms: on which the host holds what is loaded, by the key of the model; what it had on the terms
                of the last file, and no more, it lets go.
            grouped: the models that the file has in each group, by the group's key.
        """
        before, self._terms, self._grouped = self._terms, terms, grouped
        self._settings = settings
        self._limit_to(settings)
        for model in list(self._models.values()):
            had, count = model.own_terms(before), len(model.waiters)
            # Of a group, the file may have lost one model and gained another: each has its own wish.
            model.waiters = [w for w in model.waiters if w[0] != HOST or w[1].spec.key in terms]
            model.follow(before.keys() - terms.keys(), grouped.get(model.key, ()))
            own, parted = model.own_terms(terms), len(model.waiters) < count
            if own is not None and model.leases:
                model.grant(_HOSTS_OWN, *own)
                self._retime(model)
            elif own is None and had is not None:
                parted = model.let_go(_HOSTS_OWN) or parted
            if parted:
                self._after_release(model, "request", now)
        self._admit(now)
        self._look_at = now
        return self._done()

    def on_client_gone(self, client: bytes, now: float) -> list[Command]:
        """A client's process ended or it said goodbye: all that it held is released."""
        self.tickets.client_gone(client)
        for model in list(self._models.values()):
            held = [lease for lease in model.leases if lease[0] == client]
            waited = [waiter for waiter in model.waiters if waiter[0] == client]
            model.waiters = [waiter for waiter in model.waiters if waiter[0] != client]
            model.named.pop(client, None)
            for lease in held:
                model.let_go(lease)
            if held or waited:
                self._after_release(model, "exit", now)
        self._admit(now)
        return self._done()

    def on_ask_fate(self, client: bytes, ask: control.AskFate) -> list[Command]:
        """A client lost its worker and wants to know how; answered when the worker is reaped."""
        self.tickets.opened(client, ask.ticket)
        if ask.worker_id in self._by_worker:
            self._fates.wait(ask.worker_id, client, ask.ticket)
        else:
            self._tell(client, control.Fate(ticket=ask.ticket, failure=self._fates.of(ask.worker_id)))
        return self._done()

    def on_shutdown(
        self, client: bytes, ask: control.Shutdown, now: float, *, gently: bool = False
    ) -> list[Command]:
        """End every worker at once, or like :meth:`on_stop`; Bye when all are reaped."""
        self.tickets.opened(client, ask.ticket)
        self._closing = [*(self._closing or []), (client, ask.ticket)]
        if gently:
            self._drain_all(now)
        else:
            self._kill_all(now)
        return self._done()

    def on_stop(self, now: float) -> list[Command]:
        """The host is to end: calls that run may, within the time that a worker has to leave."""
        self._closing = self._closing or []
        self._drain_all(now)
        return self._done()

    def on_abandoned(self, now: float) -> list[Command]:
        """Nobody is left to serve: end every worker at once."""
        self._closing = self._closing or []
        self._kill_all(now)
        return self._done()

    # --- what workers do ----------------------------------------------------------------------------------

    def on_spawned(self, worker_id: int, pid: int) -> list[Command]:
        """A worker has a process."""
        if model := self._by_worker.get(worker_id):
            assert model.worker is not None
            model.worker.pid = pid
            if model.worker.listens:
                self._order_load(model, model.worker)
        return self._done()

    def on_started(self, worker_id: int) -> list[Command]:
        """A worker listens."""
        if model := self._by_worker.get(worker_id):
            assert model.worker is not None
            model.worker.listens = True
            # The template may tell of it later, and what has no process id can be neither measured nor named.
            if model.worker.pid is not None:
                self._order_load(model, model.worker)
        return self._done()

    def _order_load(self, model: Model, worker: Worker) -> None:
        worker.told_ttl = model.ttl()
        warmups = {key: self.warmups[key] for key in model.parts if key in self.warmups}
        load = control.Load(spec=model.spec, ttl=worker.told_ttl, warmups=warmups, mapped=worker.plan.mapped)
        self._order(worker.id, load)

    def on_ready(self, ready: control.WorkerReady, usage: Usage, now: float) -> list[Command]:
        """A worker has loaded its model."""
        model = self._by_worker.get(ready.worker_id)
        worker = model.worker if model else None
        # One that was given up on is killed already; its readiness crossed that.
        if model and worker and worker.failure is None and self._learn_load(model, ready, usage, now):
            model.step(LifecycleEvent.WORKER_READY, now)
            worker.ready, worker.ready_at = ready, now
            if model.state is ModelState.DRAINING:
                self._order(worker.id, control.Drain())
            else:
                self._welcome(model, ready, now)
            self._tell_need(model, now)  # after those who wait: it is written to a disk
            self._admit(now)
        return self._done()

    def on_saveable(self, ask: control.Saveable, now: float) -> list[Command]:
        """A model is worth saving for the load cache."""
        need = cache_saves.need(ask.nbytes)
        self._saving.ask(cache_saves.Wish(ask.key, ask.order, ask.blob, need, environment=ask.environment))
        self._admit(now)
        return self._done()

    def on_saver_ended(self, status: int, now: float) -> list[Command]:
        """The process that saved a model is reaped, and all that it started."""
        self._saving.ended(short=exit_reasons.wants_more_memory(status))
        self._admit(now)
        return self._done()

    def on_load_failed(self, failed: control.WorkerFailed, now: float) -> list[Command]:
        """The engine refused the model; the worker is sent away."""
        if model := self._by_worker.get(failed.worker_id):
            assert model.worker is not None
            model.worker.failure = failed.failure
            model.worker.unsaved = failed.unsaved
            model.worker.kill_at = now + self._settings.exit_grace
            self._order(failed.worker_id, control.Exit())
        return self._done()

    def on_draining(self, worker_id: int, usage: Usage, now: float, reason: str = "ttl") -> list[Command]:
        """A worker takes no new calls: its TTL ran out, or for another reason."""
        if model := self._by_worker.get(worker_id):
            self._learn(model, usage)
            self._begin_drain(model, reason, now)
        return self._done()

    def on_drained(self, worker_id: int, usage: Usage, now: float) -> list[Command]:
        """A worker has nothing left to do."""
        if model := self._by_worker.get(worker_id):
            assert model.worker is not None
            self._learn(model, usage)
            model.worker.drained = True
            self._order(worker_id, control.Exit())
            model.worker.kill_at = now + self._settings.exit_grace
        return self._done()

    def on_measured(self, worker_id: int, seen: Seen, now: float) -> list[Command]:
        """Somebody wanted fresh figures."""
        self._see(worker_id, seen, now)
        return self._done()

    def on_weighed(self, worker_id: int, nbytes: int, now: float) -> list[Command]:
        """A load of :meth:`to_weigh` has so many bytes."""
        model = self._by_worker.get(worker_id)
        if model and model.worker and model.worker.ready is None and not model.worker.is_ending:
            self._weigh(model, model.worker, nbytes, now)
        return self._done()

    def to_check(self, now: float) -> list[int]:
        """The workers that :meth:`on_checked` is to be told of now."""
        return [worker.id for worker in self._draining() if (worker.check_at or 0.0) <= now]

    def on_checked(self, worker_id: int, busy: int, now: float) -> list[Command]:
        """So many calls and blocks are under way in a worker that was told to drain.

        One that does nothing and does not leave either is stopped, or hangs, and is ended: nobody's call is
        lost, and others wait for its end.
        """
        model = self._by_worker.get(worker_id)
        if model and (worker := model.worker) and worker.check_at is not None:
            grace = max(self._settings.exit_grace, _SHORTEST_GRACE)
            worker.idle_since = None if busy else worker.idle_since or now
            worker.check_at = now + grace
            if worker.idle_since is not None and now >= worker.idle_since + grace:
                self._kill_now(worker)
        return self._done()

    def on_exited(
        self, worker_id: int, status: int, stderr: str, now: float, exceeded: int = 0, *, runs: int = 0
    ) -> list[Command]:
        """A worker is reaped: its memory is back.  ``status`` is its wait status, ``exceeded`` the bytes that
        it ended itself for; ``runs``: those it made."""
        model = self._by_worker.pop(worker_id, None)
        if model is None:
            return self._done()
        worker = model.worker
        assert worker is not None
        worker.exceeded = exceeded
        model.worker = None
        model.leases.clear()
        model.pins.clear()
        model.priorities.clear()
        was_ready = worker.ready is not None
        model.step(LifecycleEvent.WORKER_EXITED, now)
        self._learn_end(model, worker, runs, now)
        freed = self.ledger.give_back(worker_id)
        if was_ready or model.state is ModelState.UNLOADED:
            # One that was to be replaced anyway does not fail; all the same, somebody will ask why it ended.
            why = death(model, worker, status, stderr) if exceeded else None
            self._emit_unloaded(model, worker, freed, now, None if why is None else str(why.args[0]))
        if model.state is ModelState.FAILED and worker.unsaved and model.waiters:
            self._load_plainly(model, worker, now)
        elif model.state is ModelState.FAILED and self._may_work_alone(model, worker, status, stderr):
            self._try_again(model, worker, status, stderr, now)
        elif model.state is ModelState.FAILED:
            self._failed(model, worker, status, stderr, now)
        self._tell_fate(model, worker, status, stderr, now)
        self._answer_unloaders(model)
        if model.waiters:
            self._want(model, model.waiters[0][1].spec, now)
        self._admit(now)
        self._forget_if_idle(model)
        self._say_bye()
        return self._done()

    def on_spawn_failed(
        self, worker_id: int, reason: str, now: float, failure: failures.Failure | None = None
    ) -> list[Command]:
        """No process came of a StartWorker.  ``failure``: what is answered, if there is more to say."""
        if model := self._by_worker.get(worker_id):
            assert model.worker is not None
            why = reason.removesuffix(".")
            error = WorkerDied(f"No worker process could be started for {model.spec.name}: {why}.")
            model.worker.failure = failure or failures.describe(error)
        return self.on_exited(worker_id, 0, "", now)

    # --- time ---------------------------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When :meth:`on_tick` has something to do; None: not before the next fact."""
        deadlines = [at for _, at, _ in self._deadlines()]
        deadlines += [worker.check_at for worker in self._draining() if worker.check_at is not None]
        room = self._room_deadline()
        return min([*deadlines, *([] if room is None else [room])], default=None)

    def on_tick(self, now: float, seen: Mapping[int, Seen] = MappingProxyType({})) -> list[Command]:
        """Time has passed.  ``seen``: all workers by id, where :meth:`wants_look` says that it matters."""
        due = [(worker, act) for worker, at, act in self._deadlines() if at <= now]
        for worker, act in due:
            act(worker)
        self._pass_time(now, seen)
        return self._done()

    def _deadlines(self) -> Iterator[tuple[Worker, float, Callable[[Worker], None]]]:
        for model in self._by_worker.values():
            worker = model.worker
            if worker is None:
                continue
            if worker.kill_at is not None:
                yield worker, worker.kill_at, self._kill
            elif worker.ready is None and worker.failure is None:
                yield worker, worker.started + self._settings.load_timeout, self._give_up

    def _draining(self) -> Iterator[Worker]:
        """Workers that were told to drain, and have neither said that they did nor been ended."""
        for model in self._by_worker.values():
            worker = model.worker
            if worker and worker.check_at is not None and worker.kill_at is None and not worker.is_ending:
                yield worker

    def _kill(self, worker: Worker) -> None:
        worker.kill_at = None
        self._kill_now(worker)

    def _give_up(self, worker: Worker) -> None:
        model = self._by_worker[worker.id]
        error = LoadTimeout(
            f"{model.spec.name} did not load within {self._settings.load_timeout:g} seconds. "
            "Set ONNX_DL_LOAD_TIMEOUT to a larger number of seconds if it needs longer."
        )
        worker.failure = failures.describe(error)
        self._kill_now(worker)

    # --- what is known ------------------------------------------------------------------------------------

    @property
    def seq(self) -> int:
        """The number of the last event."""
        return self._chronicle.seq

    @property
    def closing(self) -> bool:
        """Whether the host takes no new work."""
        return self._closing is not None

    @property
    def holds_any(self) -> bool:
        """Whether the host itself holds a model, or a load that it wants is under way."""
        return any(
            _HOSTS_OWN in model.leases or any(ask.for_host for _, ask in model.waiters)
            for model in self._models.values()
        )

    @property
    def finished(self) -> bool:
        """Whether the host is closing and every worker is reaped."""
        return self._closing is not None and not self._by_worker

    def pids(self) -> dict[int, int]:
        """Process ids of live workers by worker id."""
        return {
            worker_id: model.worker.pid
            for worker_id, model in self._by_worker.items()
            if model.worker is not None and model.worker.pid is not None
        }

    @property
    def memory_limit(self) -> int | None:
        """Bytes that all workers together may take; None: there is no limit."""
        return None if self._limit.ram == UNLIMITED else self._limit.ram

    @property
    def gpu_memory_limit(self) -> int | None:
        """The same of GPU memory."""
        return None if self._limit.gpu == UNLIMITED else self._limit.gpu

    def in_use(self, now: float) -> Bytes:
        """What is taken or reserved of these."""
        return self._in_use(now)

    def snapshot(
        self, now: float, readings: Mapping[int, Reading] = MappingProxyType({})
    ) -> list[ModelStatus]:
        """Every model that is loaded, held or failing.  ``readings``: what workers tell of themselves."""
        return [model.status(self.ledger, now, readings) for model in self._models.values()]

    # --- decisions ----------------------------------------------------------------------------------------

    def _done(self) -> list[Command]:
        commands, self._out = self._out, []
        return commands

    def _tell(self, client: bytes, message: Any) -> None:
        """Answers a request, unless it was withdrawn."""
        if client == HOST or self.tickets.close(client, message.ticket):
            self._out.append(TellClient(client, message))

    def _order(self, worker_id: int, message: codec.Message) -> None:
        self._out.append(TellWorker(worker_id, message))

    def _load(self, model: Model, spec: ModelSpec, now: float) -> None:
        model.spec = group_spec(list(model.members.values())) if model.members else spec
        model.step(LifecycleEvent.LOAD_REQUESTED, now)
        worker = model.worker = Worker(next(self._ids), now)
        self._by_worker[worker.id] = model
        self._out.append(StartWorker(worker.id, model.spec, model.standing))
        self._emit(EventType.LOADING, model, worker, now)

    def _welcome(self, model: Model, ready: control.WorkerReady, now: float) -> None:
        model.loads += 1
        assert model.worker is not None
        self._emit(EventType.READY, model, model.worker, now, seconds=ready.seconds)
        if warning := self._thrash.loaded(model.key, model.spec.name, model.wished_at, now):
            self._emit(EventType.THRASH, model, model.worker, now, detail=warning)
        waiters, model.waiters = model.waiters, []
        wanted = any(self.tickets.is_open(client, ask.ticket) for client, ask in waiters)
        for client, ask in waiters:
            if model.serves(ask):
                self._grant(model, client, ask)
            else:
                model.waiters.append((client, ask))
        self._retime(model)
        if not wanted and model.leases:  # all who asked were out of time; nobody may call it for long
            self._begin_ttl(model)
        if model.waiters:  # they came while it loaded without theirs
            self._drain(model, "regrouped", now)
        elif not model.leases:  # all who asked have gone meanwhile
            self._drain(model, "exit", now)

    def _grant(self, model: Model, client: bytes, ask: control.Acquire) -> None:
        assert model.worker is not None and model.worker.ready is not None
        ready = model.worker.ready
        description, key = ready.description, ask.spec.key
        if (failure := description.failed.get(key)) is not None:
            self._tell(
                client, control.Denied(ticket=ask.ticket, failure=msgspec.convert(failure, failures.Failure))
            )
            return
        model.grant(_HOSTS_OWN if ask.for_host else (client, ask.proxy), ask.ttl, ask.pin, ask.priority)
        terms = model.own_terms(self._terms)
        if terms is not None and (client == HOST or _HOSTS_OWN not in model.leases):
            model.grant(_HOSTS_OWN, *terms)
        if ask.for_host:
            self._begin_ttl(model)
        granted = control.Granted(
            ticket=ask.ticket,
            worker_id=model.worker.id,
            pid=model.worker.pid or 0,
            address=ready.address,
            secret=ready.secret,
            description=description.members.get(key, description),
            model=key if model.spec.members else "",
        )
        self._tell(client, granted)

    def _deny(self, client: bytes, ticket: int, model: Model, now: float) -> None:
        assert model.last_failure is not None
        self._tell(
            client, control.Denied(ticket=ticket, failure=_retry_after(model.last_failure, model, now))
        )

    def _retime(self, model: Model) -> None:
        """Tells the worker the TTL in force, if it changed."""
        worker = model.worker
        if worker is None or not model.leases or worker.told_ttl == model.ttl():
            return
        worker.told_ttl = model.ttl()
        if worker.ready is not None:
            self._order(worker.id, control.Retime(ttl=worker.told_ttl))

    def _begin_ttl(self, model: Model) -> None:
        """It was loaded and nobody is about to call it (the host wanted it, or those who asked were out of
        time): its load counts as a use, so that it can end and make room.  With a TTL of 0 it waits for its
        first call."""
        self._retime(model)
        worker = model.worker
        if worker is not None and worker.told_ttl != 0:
            self._order(worker.id, control.Retime(ttl=worker.told_ttl, used=True))

    def _after_release(self, model: Model, reason: str, now: float) -> None:
        if model.leases or model.waiters:
            self._retime(model)
        elif model.worker is not None:
            self._drain(model, reason, now)
        self._forget_if_idle(model)

    def _drain(self, model: Model, reason: str, now: float, *, kill: bool = False) -> None:
        """Unloads; a worker that is not ready yet is told when it is."""
        worker = model.worker
        assert worker is not None
        ready_before = model.state is ModelState.READY
        self._begin_drain(model, reason, now)
        if kill or worker.ready is None:
            # Nobody's call runs in a worker that is still loading, so there is nothing to wait for.
            self._kill_now(worker)
        elif ready_before:
            self._order(worker.id, control.Drain())

    def _begin_drain(self, model: Model, reason: str, now: float) -> None:
        first = model.state is not ModelState.DRAINING
        model.step(LifecycleEvent.DRAIN_REQUESTED, now)
        if first:
            assert model.worker is not None
            model.worker.reason = reason
            model.worker.check_at = now
            self._emit(EventType.DRAINING, model, model.worker, now, reason=reason)

    def _drain_all(self, now: float) -> None:
        self._refuse_all()
        for model in self._by_worker.values():
            assert model.worker is not None
            self._drain(model, "exit", now)
            model.worker.kill_at = now + self._settings.exit_grace
        self._say_bye()

    def _kill_all(self, now: float) -> None:
        self._refuse_all()
        for model in self._by_worker.values():
            assert model.worker is not None
            self._begin_drain(model, "exit", now)
            self._kill_now(model.worker)
        self._say_bye()

    def _refuse_all(self) -> None:
        """Nobody who waits will be served, and nothing is saved."""
        self._wishes.clear()
        self._saving.close()
        self._end_saver()
        for model in self._models.values():
            waiters, model.waiters = model.waiters, []
            for client, ask in waiters:
                self._refuse(client, ask)

    def _kill_now(self, worker: Worker) -> None:
        worker.killed = True
        self._out.append(KillWorker(worker.id))

    def _refuse(self, client: bytes, ask: control.Acquire) -> None:
        error = HostClosing(f"The host of {ask.spec.name} is shutting down; a new host can load it.")
        self._tell(client, control.Denied(ticket=ask.ticket, failure=failures.describe(error)))

    def _say_bye(self) -> None:
        if self.finished:
            for client, ticket in self._closing or []:
                self._tell(client, control.Bye(ticket=ticket))
            self._closing = []

    def _may_work_alone(self, model: Model, worker: Worker, status: int, stderr: str) -> bool:
        """Whether a load failed that may work when others have made way."""
        if worker.ready is not None or model.second_try or not model.waiters:
            return False
        is_ours = worker.killed or worker.exceeded > 0
        ran_out = not is_ours and exit_reasons.ran_out_of_memory(worker.failure, status, stderr)
        return worker.outgrew or ran_out

    def _load_plainly(self, model: Model, worker: Worker, now: float) -> None:
        """The load cache has the model no more."""
        self._forget_saved(model)
        model.retry_at, model.last_failure = now, worker.failure
        self._emit_failed(model, worker, 0.0, now)
        self._want(model, model.waiters[0][1].spec, now)

    def _try_again(self, model: Model, worker: Worker, status: int, stderr: str, now: float) -> None:
        model.retry_at = now
        model.last_failure = worker.failure or death(model, worker, status, stderr)
        self._emit_failed(model, worker, 0.0, now)
        self._want_again(model, model.waiters[0][1].spec, now, alone=not worker.outgrew)

    def _failed(self, model: Model, worker: Worker, status: int, stderr: str, now: float) -> None:
        """Books a failure and answers those who wait, but for members of a group that were not in this load;
        the first failure costs no wait, later ones double."""
        lived = now - worker.ready_at if worker.ready_at is not None else 0.0
        model.failures = 1 if lived > self._settings.stable_after else model.failures + 1
        if worker.exceeded or worker.outgrew:  # of a call's input, or others: nobody need wait for that
            model.failures = 0
        delay = min(_LONGEST_BACKOFF, 2.0 ** (model.failures - 2)) if model.failures > 1 else 0.0
        model.retry_at = now + delay
        model.last_failure = worker.failure or death(model, worker, status, stderr)
        model.second_try = False
        self._emit_failed(model, worker, delay, now)
        failed = [(client, ask) for client, ask in model.waiters if model.serves(ask)]
        model.waiters = [waiter for waiter in model.waiters if waiter not in failed]
        for client, ask in failed:
            self._deny(client, ask.ticket, model, now)

    def _tell_fate(self, model: Model, worker: Worker, status: int, stderr: str, now: float) -> None:
        fate = None
        if not worker.drained:
            fate = death(model, worker, status, stderr)
            if model.state is ModelState.FAILED:
                fate = _retry_after(fate, model, now)
        for client, told in self._fates.note(worker.id, fate):
            self._tell(client, told)

    def _answer_unloaders(self, model: Model) -> None:
        unloaders, model.unloaders = model.unloaders, []
        for client, ticket in unloaders:
            self._tell(client, control.Unloaded(ticket=ticket, was_loaded=True))

    def _forget_if_idle(self, model: Model) -> None:
        if model.state is ModelState.UNLOADED and not (model.waiters or model.leases):
            self._models.pop(model.key, None)

    def _emit_failed(self, model: Model, worker: Worker, delay: float, now: float) -> None:
        assert model.last_failure is not None
        detail = str(model.last_failure.args[0]) if model.last_failure.args else model.last_failure.name
        self._emit(EventType.FAILED, model, worker, now, detail=detail, retry_after=delay)

    def _emit_unloaded(
        self, model: Model, worker: Worker, freed: Usage, now: float, detail: str | None
    ) -> None:
        if worker.reason == "evicted":
            self._thrash.evicted(model.key)
        self._out.append(Emit(self._chronicle.unloaded(model, worker, freed, now, detail)))

    def _emit(self, kind: EventType, model: Model, worker: Worker, now: float, **fields: Any) -> None:
        held = self.ledger.of(worker.id)
        self._out.append(Emit(self._chronicle.event(kind, model, worker, held, now, **fields)))


def _retry_after(failure: failures.Failure, model: Model, now: float) -> failures.Failure:
    details = failure.details | {"retry_after": max(0.0, model.retry_at - now)}
    return msgspec.structs.replace(failure, details=details)
