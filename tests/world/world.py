"""Clients, workers, a saver and time around a scheduler: carries out what it decides, in any order.

Every message is in flight until it is delivered.  What is picked comes from outside, so that a walk can be
random, repeated and shortened.
"""

from __future__ import annotations

import contextlib
from typing import Any, Final

import msgspec

from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import Usage
from onnx_dl.core.terms import Terms
from onnx_dl.protocol import control as m
from onnx_dl.protocol import failures
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
from onnx_dl.supervisor.policy.measuring import Sample
from onnx_dl.supervisor.policy.records import HOST
from onnx_dl.supervisor.policy.requirements import Requirement
from onnx_dl.supervisor.policy.scheduler import Scheduler
from onnx_dl.supervisor.processes.worker_process import exit_status
from tests.support.builders import SETTINGS, ready, spec
from tests.world import truth
from tests.world.early import EarlyProcesses
from tests.world.workers import GPU, MB, FakeWorker

CLIENTS: Final = (b"client-p", b"client-q", b"client-r")
MODELS: Final = ("a", "b", "c", "d", "g1", "g2")
UNITS: Final = ("a", "b", "c", "d", "group:g")
LIMITS: Final = (None, 60 * MB, 100 * MB, 130 * MB, 300 * MB)
GPU_LIMITS: Final = {
    60 * MB: 1800 * MB,
    100 * MB: {0: 1800 * MB},
    130 * MB: 1800 * MB,
    300 * MB: {0: 1800 * MB},
}
"""By limit of RAM: room for one model on a GPU, and for a context."""
ANSWERS: Final = {
    "acquire": (m.Granted, m.Denied),
    "unload": m.Unloaded,
    "outcome": m.Outcome,
    "shutdown": m.Bye,
}
TOO_LONG: Final = 2_000.0
"""Virtual seconds, with all that may be waited for one after another; who waits longer is lost."""


def model(key: str) -> ModelSpec:
    group = "g" if key.startswith("g") else None
    return spec(key, group=group, providers=["CUDAExecutionProvider"] if key in GPU else None)


class World:
    """What happens is a method each; it takes what was picked."""

    def __init__(self, limit: int | None, memory: int | None) -> None:
        self.settings = msgspec.structs.replace(
            SETTINGS, memory_limit=limit, gpu_memory_limit=GPU_LIMITS.get(limit), room_timeout=10.0
        )
        self.saved: set[str] = set()
        self.known: dict[str, Requirement] = {}
        self.now = 1000.0
        self.scheduler = Scheduler(self.settings, 1e6, memory, self.known.get, self.saved.__contains__)
        self.workers: dict[int, FakeWorker] = {}
        self.saver: str | None = None
        """``runs`` or ``ends``."""
        self.tickets = 0
        self.open: dict[int, tuple[bytes, str]] = {}
        self.acquiring: dict[tuple[bytes, int], int] = {}
        self.wants_death: set[int] = set()
        """Workers that somebody has lost."""
        self.gone: set[bytes] = set()
        self.events = truth.Events()
        self.closing = False
        self.transitions = 0
        self.early = EarlyProcesses()
        self.sound = True
        """False: something was found, and the rest is not looked at."""

    # --- carrying out commands ----------------------------------------------------------------------------

    def do(self, commands: list[Command]) -> None:
        self.transitions += 1
        self.sound = False
        for command in commands:
            self.perform(command)
        assert not (self.closing and any(isinstance(c, StartWorker | StartSaver) for c in commands))
        began = any(isinstance(c, StartWorker | StartSaver) for c in commands)
        if self.early.follow(self.scheduler) & self.workers.keys() or began:
            truth.check_promise(self.scheduler, self.now)
        truth.check(self.scheduler, self.now, self.gone, self.open)
        self.sound = True

    def perform(self, command: Command) -> None:
        match command:
            case StartWorker(worker_id, spec_):
                assert worker_id not in self.workers
                assert all(w.spec.key != spec_.key for w in self.workers.values()), "two workers of one model"
                self.workers[worker_id] = FakeWorker(worker_id, spec_)
            case SendToWorker(worker_id, message):
                self.workers[worker_id].received.append(message)
            case KillWorker(worker_id):
                self.workers[worker_id].die(9)
            case SendToClient(client, message):
                self.answer(client, message)
            case Emit(event):
                self.events.take(event)
            case ForgetPeak(worker_id):
                self.workers[worker_id].peak = self.workers[worker_id].nbytes
            case Remember(key, requirement):
                self.known[key] = msgspec.convert(
                    msgspec.to_builtins(requirement), Requirement
                )  # as it is written and read
            case StartSaver():
                assert self.saver is None, "two savers at once"
                self.saver = "runs"
            case EndSaver():
                assert self.saver == "runs", "no saver that could be ended"
                self.saver = "ends"

    def answer(self, client: bytes, message: Any) -> None:
        if client == HOST:
            return
        assert message.ticket in self.open, f"{message} answers nothing that is open"
        asker, what = self.open.pop(message.ticket)
        assert client == asker and isinstance(message, ANSWERS[what])
        if isinstance(message, m.Denied):
            self.early.denied(message)
        if isinstance(message, m.Granted):
            worker = self.workers[message.worker_id]
            keys = [worker.spec.key, *(member.key for member in worker.spec.members)]
            assert (message.model or worker.spec.key) in keys, "granted in a worker that has not got it"
        self.acquiring = {who: n for who, n in self.acquiring.items() if n != message.ticket}

    # --- what clients do ----------------------------------------------------------------------------------

    def ask(self, client: bytes, what: str) -> int:
        self.tickets += 1
        self.open[self.tickets] = client, what
        return self.tickets

    def acquires(self, client: bytes, proxy: int, key: str, ttl: float, how: int) -> None:
        """``how``: bits, of pin, for_host, with a companion, of high priority, with a file size."""
        if (client, proxy) in self.acquiring:
            return  # threads of one proxy ask once
        self.gone.discard(client)
        ticket = self.acquiring[client, proxy] = self.ask(client, "acquire")
        other = [model("g2" if key == "g1" else "g1")] if how & 4 and key.startswith("g") else []
        message = m.Acquire(
            ticket=ticket, proxy=proxy, spec=model(key), for_host=how & 18 == 18, companions=other,
            terms=Terms(ttl, pin=how & 3 == 1, priority=how >> 3 & 1), file_bytes=20 << 20 if how & 16 else 0,
        )  # fmt: skip
        self.do(self.scheduler.on_acquire(client, message, self.now))

    def cannot_acquire(self, client: bytes, proxy: int, key: str) -> None:
        """Something failed on the way to the scheduler: it was never asked."""
        if (client, proxy) in self.acquiring:
            return
        self.gone.discard(client)
        ticket = self.ask(client, "acquire")
        self.scheduler.outbox.tickets.add((client, ticket))
        message = m.Acquire(ticket=ticket, proxy=proxy, spec=model(key), terms=Terms(ttl=1.0))
        failure = failures.describe(ValueError("no descriptors"))
        self.do(self.scheduler.on_not_acquired(client, message, failure, self.now))
        assert ticket not in self.open

    def releases(self, client: bytes, proxy: int) -> None:
        waits = self.acquiring.get((client, proxy))
        self.do(self.scheduler.on_release(client, proxy, self.now))
        assert waits not in self.open, "another thread waits, and hears at once"

    def withdraws(self, client: bytes, proxy: int, keep: bool) -> None:
        if (ticket := self.acquiring.pop((client, proxy), None)) is not None:
            del self.open[ticket]
            ask = m.Withdraw(ticket=ticket, proxy=proxy, keep=keep)
            self.do(self.scheduler.on_withdraw(client, ask, self.now))

    def sets_ttl(self, client: bytes, proxy: int, ttl: float) -> None:
        self.do(self.scheduler.on_set_ttl(client, proxy, ttl))

    def unloads(self, client: bytes, unit: str, force: bool) -> None:
        self.gone.discard(client)
        ask = m.Unload(ticket=self.ask(client, "unload"), key=unit, force=force)
        self.do(self.scheduler.on_unload(client, ask, self.now))

    def asks_outcome(self, client: bytes, worker_id: int) -> None:
        self.gone.discard(client)
        ask = m.AskOutcome(ticket=self.ask(client, "outcome"), worker_id=worker_id)
        self.do(self.scheduler.on_ask_outcome(client, ask))
        if worker_id in self.workers:
            self.wants_death.add(worker_id)

    def finds_outdated(self, client: bytes, proxy: int, worker_id: int) -> None:
        told = m.Outdated(proxy=proxy, worker_id=worker_id, path="/w")
        self.do(self.scheduler.on_outdated(client, told, self.now))

    def goes(self, client: bytes) -> None:
        self.acquiring = {who: n for who, n in self.acquiring.items() if who[0] != client}
        self.open = {n: asked for n, asked in self.open.items() if asked[0] != client}
        self.gone.add(client)
        self.do(self.scheduler.on_client_gone(client, self.now))

    # --- what the host does -------------------------------------------------------------------------------

    def configure(self, limit: int | None, held: int, eager: int, ttl: float) -> None:
        """``held``, ``eager``: bits, of models that its file names and wants."""
        gpu_limit = GPU_LIMITS.get(limit)
        self.settings = msgspec.structs.replace(self.settings, memory_limit=limit, gpu_memory_limit=gpu_limit)
        named = [key for number, key in enumerate(MODELS) if held >> number & 1]
        terms = {key: Terms(ttl=ttl, pin=key == "a", priority=1) for key in named}
        grouped = {"group:g": [model(key) for key in named if key.startswith("g")]} if held >> 4 else {}
        s = self.scheduler
        self.do(s.on_configured(self.settings, terms, grouped, self.now))
        for number, key in enumerate(named):
            if eager >> number & 1:
                terms = Terms(ttl, pin=key == "a")
                ask = m.Acquire(ticket=0, proxy=0, spec=model(key), terms=terms, for_host=True)
                self.do(s.on_acquire(HOST, ask, self.now))

    def knows_gpus(self, nbytes: int | None) -> None:
        self.scheduler.know_gpus(nbytes)

    def saves(self, worker_id: int, nbytes: int) -> None:
        ask = m.Saveable(worker_id=worker_id, key=f"key-{worker_id}", nbytes=nbytes, blob=None, order="{}")
        self.do(self.scheduler.on_saveable(ask, self.now))

    def saver_ends(self, status: int) -> None:
        if self.saver is not None:
            self.saver = None
            self.do(self.scheduler.on_saver_ended(exit_status(status), self.now))

    def looks(self, fresh: bool) -> None:
        """As before what would change much."""
        for worker_id, seen in self.look(fresh).items():
            self.do(self.scheduler.on_measured(worker_id, seen, self.now))

    def breaks(self, worker_id: int) -> None:
        """A fact about a worker could not be taken in."""
        failure = failures.describe(ValueError("a bug"))
        self.do(self.scheduler.on_broken(worker_id, failure))

    # --- what workers say ---------------------------------------------------------------------------------

    def deliver(self, worker: FakeWorker, how: int) -> None:
        """The next word of a worker arrives."""
        if not worker.said:
            return
        s, now, word = self.scheduler, self.now, worker.said.popleft()
        match word:
            case "spawned" if how == 1:
                del self.workers[worker.id]
                with self.early.ends(s, worker, self.open):
                    self.do(s.on_spawn_failed(worker.id, "the template died", now))
            case "spawned":
                worker.pid = 100 + worker.id
                self.do(s.on_spawned(worker.id, worker.pid))
            case "started":
                self.do(s.on_started(worker.id))
            case "prepared":
                self.do(s.on_prepared(worker.id))
            case "loading":
                self.do(s.on_loading(worker.id))
            case m.WorkerReady():
                self.do(s.on_ready(word, worker.usage(), now))
            case m.WorkerFailed():
                self.do(s.on_load_failed(word, now))
            case ("draining", reason):
                self.do(s.on_draining(worker.id, worker.usage(), now, reason))
            case "drained":
                self.do(s.on_drained(worker.id, worker.usage(), now))
            case ("exited", status):
                self.bury(worker, status, lost=how == 2)

    def bury(self, worker: FakeWorker, status: int, *, lost: bool) -> None:
        del self.workers[worker.id]
        s = self.scheduler
        if lost:  # that it is reaped could not be taken in
            self.events.current.pop(worker.spec.key, None)
            self.do(s.on_lost(worker.id, failures.describe(ValueError("a bug")), self.now))
        else:
            exceeded, runs = worker.exceeded, worker.runs
            with self.early.ends(s, worker, self.open):
                self.do(s.on_exited(worker.id, exit_status(status), "", self.now, exceeded, runs=runs))
        for stale in (
            s.on_spawned(worker.id, 1),
            s.on_started(worker.id),
            s.on_prepared(worker.id),
            s.on_loading(worker.id),
            s.on_ready(ready(worker.id), Usage(rss=1, pss=1), self.now),
            s.on_draining(worker.id, Usage(rss=1, pss=1), self.now),
            s.on_drained(worker.id, Usage(), self.now),
            s.on_weighed(worker.id, 1, self.now),
            s.on_exited(worker.id, exit_status(0), "", self.now),
        ):
            assert stale == [], "a word about who is gone changes nothing"

    # --- time ---------------------------------------------------------------------------------------------

    def look(self, fresh: bool) -> dict[int, Sample]:
        s = self.scheduler
        seen = {worker_id: self.workers[worker_id].seen(fresh) for worker_id in s.pids()}
        ghosts = s.lingering_pids(self.now)
        return seen | {worker_id: Sample(Usage(gpu=pid % 2)) for worker_id, pid in ghosts.items()}

    def pass_time(self, seconds: float, late: float = 0.0) -> None:
        """As the loop does after whatever has happened; ``late``: it had read the clock before."""
        s = self.scheduler
        self.now += seconds
        now = max(self.now - late, 1000.0)
        for load in s.to_weigh(now):
            self.do(s.on_weighed(load.worker_id, self.workers[load.worker_id].nbytes, now))
        due = s.to_check(now)
        for worker_id in due:
            self.do(s.on_checked(worker_id, int(self.workers[worker_id].hung), now))
        deadline = now if due else s.next_deadline()
        wants = s.wants_look(now)
        commands = s.on_tick(now, self.look(False) if wants else {})
        assert (deadline is not None and deadline <= now) or commands == [], "nothing was due"
        self.do(commands)
        truth.check_time(s, now)

    # --- the end ------------------------------------------------------------------------------------------

    def everybody_acts(self) -> None:
        """What is under way goes on, for all."""
        for worker in list(self.workers.values()):
            if worker.hung and worker.state in ("ready", "draining"):
                worker.hung = False  # a call takes as long as it takes
            if worker.id in self.wants_death:
                worker.die(11)
            while worker.received and not worker.hung and worker.state != "dead":
                worker.handle(True)
            worker.load("well", 1.0)
            worker.finish()
            while worker.said and worker.id in self.workers:
                self.deliver(worker, 0)
        self.saver_ends(0)

    def settle(self) -> None:
        """No new wishes: each who waits is answered within a bounded time."""
        begun = self.now
        while self.open or self.scheduler.admission.pending:
            assert self.now - begun < TOO_LONG, (
                f"never answered: {self.open}, {self.scheduler.admission.pending}"
            )
            self.everybody_acts()
            at = self.scheduler.next_deadline()
            self.pass_time(0.5 if at is None else min(max(at - self.now, 0.01), 5.0))

    def empty(self) -> None:
        """All have gone, and the file says nothing: nothing is left."""
        for client in CLIENTS:
            self.goes(client)
        self.configure(self.settings.memory_limit, 0, 0, 0.0)
        for unit in UNITS:  # what the host holds without a file goes when it is told to
            self.unloads(CLIENTS[0], unit, False)
        self.goes(CLIENTS[0])
        begun = self.now
        while self.workers or self.saver or self.scheduler.next_deadline() is not None:
            assert self.now - begun < TOO_LONG, "somebody stays for nobody"
            self.everybody_acts()
            at = self.scheduler.next_deadline()
            self.pass_time(0.5 if at is None else min(max(at - self.now, 0.01), 5.0))
        truth.check_end(self.scheduler, self.now)

    def close(self, how: int) -> None:
        """The host ends, at once or gently, asked by a client or not; nothing begins any more."""
        s, now = self.scheduler, self.now
        self.closing = True
        waiting = [ticket for ticket, (_, what) in self.open.items() if what == "acquire"]
        with contextlib.ExitStack() as stack:
            stack.callback(self.assert_told, waiting)
            if how == 0:
                self.do(s.on_stop(now))
            elif how == 1:
                self.do(s.on_abandoned(now))
            else:
                ask = m.Shutdown(ticket=self.ask(CLIENTS[1], "shutdown"))
                self.gone.discard(CLIENTS[1])
                self.do(s.on_shutdown(CLIENTS[1], ask, now, gently=how == 2))
        self.acquires(CLIENTS[2], 99, "a", 0.0, 0)
        assert not any(what == "acquire" for _, what in self.open.values()), "told at once"

    def assert_told(self, tickets: list[int]) -> None:
        assert not set(tickets) & set(self.open), "who waits is told at once that the host ends"

    def finish(self) -> None:
        """After :meth:`close`: all workers end, also those that hang, and all are answered."""
        begun = self.now
        while not self.scheduler.shutdown.finished:
            assert self.now - begun < TOO_LONG, "the host never ends"
            for worker in list(self.workers.values()):
                while worker.received and not worker.hung and worker.state != "dead":
                    worker.handle(True)
                worker.finish()
                while worker.said and worker.id in self.workers:
                    self.deliver(worker, 0)
            self.pass_time(1.0)
        assert not self.workers and not self.open
        assert self.scheduler.in_use(self.now + 5.0).gpu == 0
