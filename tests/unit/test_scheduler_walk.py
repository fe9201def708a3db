"""Thousands of random but possible histories, seeded: what must hold in all of them."""

from __future__ import annotations

import collections
import random

import msgspec
import pytest

from onnx_dl.lifecycle import ModelState
from onnx_dl.model import Usage
from onnx_dl.supervisor.commands import Emit, KillWorker, StartWorker, TellClient, TellWorker
from onnx_dl.supervisor.measuring import Seen
from onnx_dl.supervisor.scheduler import Scheduler
from onnx_dl.transport import messages as m
from onnx_dl.transport.gauges import Reading
from tests.unit.builders import SETTINGS, acquire, failed, ready, unload

KEYS = ("a", "b")
MB = 1 << 20
USAGE = Usage(rss=50 * MB, private=30 * MB, pss=40 * MB, peak=45 * MB)
LIMIT = 60 * MB
"""One model fits, also by the first guess; two do not."""
CLIENTS = (b"p", b"q", b"r")


class FakeWorker:
    """A worker as it really behaves; what it says is in flight until :class:`World` delivers it."""

    def __init__(self, worker_id: int, key: str) -> None:
        self.id = worker_id
        self.key = key
        self.said: collections.deque[object] = collections.deque(["spawned", "started"])
        self.heard: collections.deque[m.Message] = collections.deque()
        self.state = "waiting"  # for Load; then ready, failed, draining, drained, dead
        self.loaded_with_drain = False

    def obey(self, rng: random.Random) -> None:
        """Takes in one order."""
        match self.heard.popleft():
            case m.Load():
                assert self.state == "waiting", "Load only once"
                if rng.random() < 0.75:
                    self.state = "ready"
                    self.said.append(ready(self.id))
                else:
                    self.state = "failed"
                    self.said.append(failed(self.id, rng.choice([ValueError("no model"), MemoryError()])))
            case m.DrainIfIdle():
                if rng.random() < 0.7:  # else it was used meanwhile
                    self.ttl_ends()
            case m.Drain():
                if self.state == "ready":
                    self.state = "draining"
            case m.Exit():
                assert self.state in ("failed", "drained"), "Exit only to those who are done"
                self.die(0)

    def ttl_ends(self) -> None:
        if self.state == "ready":
            self.state = "draining"
            self.said.append("draining")

    def finish(self) -> None:
        if self.state == "draining":
            self.state = "drained"
            self.said.append("drained")

    def die(self, status: int) -> None:
        if self.state != "dead":
            self.state = "dead"
            self.said.append(("exited", status))


class World:
    """Clients and workers around a scheduler, with every message in flight for a random time."""

    def __init__(self, seed: int, limited: bool) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.limited = limited
        limit = str(LIMIT) if limited else ""
        self.scheduler = Scheduler(msgspec.structs.replace(SETTINGS, memory_limit=limit))
        self.workers: dict[int, FakeWorker] = {}
        self.tickets = 0
        self.open: dict[int, tuple[bytes, type]] = {}
        self.answered: set[int] = set()
        self.gone: set[bytes] = set()
        self.acquiring: dict[tuple[bytes, int], int] = {}
        self.seq = 0
        self.closing = False

    # --- carrying out commands, and what must hold of each

    def do(self, commands: list) -> None:
        for command in commands:
            match command:
                case StartWorker(worker_id, spec):
                    assert not self.closing
                    assert worker_id not in self.workers
                    live = [w for w in self.workers.values() if w.key == spec.key]
                    assert not live, "two workers of one model at once"
                    self.workers[worker_id] = FakeWorker(worker_id, spec.key)
                case TellWorker(worker_id, message):
                    self.workers[worker_id].heard.append(message)
                case KillWorker(worker_id):
                    self.workers[worker_id].die(9)
                case TellClient(client, message):
                    self.answer(client, message)
                case Emit(event):
                    self.seq += 1
                    assert event.seq == self.seq
                    if event.type == "unloaded":
                        assert event.worker_id not in self.workers, "unloaded before it was reaped"
        self.check()

    def answer(self, client: bytes, message: m.Message) -> None:
        ticket = message.ticket
        if ticket not in self.open:
            raise AssertionError(f"{message} answers nothing that is open")
        asker, kinds = self.open.pop(ticket)
        assert client == asker
        assert isinstance(message, kinds)
        self.answered.add(ticket)
        for waiting, number in list(self.acquiring.items()):
            if number == ticket:
                del self.acquiring[waiting]

    def check(self) -> None:
        s = self.scheduler
        status = {line.key: line for line in s.snapshot(self.now)}
        live = {w.key: w.id for w in self.workers.values()}
        for key, line in status.items():
            assert line.worker_id == live.get(key)
            assert (line.worker_id is None) == (line.state in (ModelState.UNLOADED, ModelState.FAILED))
        assert set(live) <= set(status)
        assert len(s.tickets) == len(self.open), "who waits, and who is known to wait"
        assert set(s.pids()) <= set(self.workers)
        if self.limited:
            assert s.in_use(self.now).ram <= LIMIT
        if not self.workers:
            assert s.ledger.total() == Usage()

    # --- random things that happen

    def ask(self, client: bytes, kinds: object) -> int:
        self.tickets += 1
        self.open[self.tickets] = (client, kinds)
        return self.tickets

    def client_acts(self) -> None:
        rng, s = self.rng, self.scheduler
        client, key = rng.choice(CLIENTS), rng.choice(KEYS)
        proxy = rng.randrange(3) + 10 * KEYS.index(key)
        match rng.randrange(14):
            case 0 | 1 | 2 | 3 | 4:
                if (client, proxy) not in self.acquiring:
                    ticket = self.ask(client, m.Granted | m.Denied)
                    self.acquiring[client, proxy] = ticket
                    ttl = rng.choice([-1.0, 0.0, 5.0, 30.0])
                    self.do(s.on_acquire(client, acquire(ticket, proxy, ttl, key), self.now))
            case 5:
                waits = self.acquiring.get((client, proxy))
                self.do(s.on_release(client, proxy, self.now))
                assert waits is None or waits in self.answered, "another thread waits, and hears at once"
            case 6:
                self.do(s.on_set_ttl(client, proxy, rng.choice([-1.0, 0.0, 5.0])))
            case 7 | 8:
                ticket = self.ask(client, m.Unloaded)
                self.do(s.on_unload(client, unload(ticket, key, rng.random() < 0.3), self.now))
            case 9:
                ticket = self.ask(client, m.Fate)
                worker_id = rng.randrange(1, max(2, len(self.answered)))
                self.do(s.on_ask_fate(client, m.AskFate(ticket=ticket, worker_id=worker_id)))
            case 10:
                if rng.random() < 0.3:
                    self.client_goes(client)
            case 11:
                for worker_id in s.pids():
                    self.do(s.on_measured(worker_id, Seen(USAGE), self.now))
            case 12:
                if (ticket := self.acquiring.pop((client, proxy), None)) is not None:
                    del self.open[ticket]  # and if it is answered all the same, answer() objects
                    ask = m.Withdraw(ticket=ticket, proxy=proxy, keep=rng.random() < 0.5)
                    self.do(s.on_withdraw(client, ask, self.now))
            case 13:
                worker_id = rng.choice([*s.pids(), 99])
                self.do(
                    s.on_outdated(client, m.Outdated(proxy=proxy, worker_id=worker_id, path="/w"), self.now)
                )

    def client_goes(self, client: bytes) -> None:
        self.acquiring = {k: t for k, t in self.acquiring.items() if k[0] != client}
        # What is answered all the same, answer() objects to.
        self.open = {ticket: asked for ticket, asked in self.open.items() if asked[0] != client}
        self.do(self.scheduler.on_client_gone(client, self.now))

    def worker_acts(self) -> None:
        if not self.workers:
            return
        worker = self.rng.choice(list(self.workers.values()))
        if worker.state == "dead":
            return
        roll = self.rng.random()
        if roll < 0.5 and worker.heard:
            worker.obey(self.rng)
        elif roll < 0.6:
            worker.ttl_ends()
        elif roll < 0.9:
            worker.finish()
        elif roll < 0.93:
            while worker.said and self.rng.random() < 0.5:  # a crash takes unsent words with it
                if worker.said[-1] == "spawned":
                    break
                worker.said.pop()
            worker.die(self.rng.choice([9, 11]))

    def deliver(self) -> None:
        if not self.workers:
            return
        worker = self.rng.choice(list(self.workers.values()))
        if not worker.said:
            return
        s, usage, now = self.scheduler, USAGE, self.now
        match worker.said.popleft():
            case "spawned":
                if self.rng.random() < 0.03:
                    del self.workers[worker.id]
                    self.do(s.on_spawn_failed(worker.id, "no memory", now))
                else:
                    self.do(s.on_spawned(worker.id, 1000 + worker.id))
            case "started":
                self.do(s.on_started(worker.id))
            case m.WorkerReady() as message:
                self.do(s.on_ready(message, usage, now))
            case m.WorkerFailed() as message:
                self.do(s.on_load_failed(message, self.now))
            case "draining":
                self.do(s.on_draining(worker.id, usage, now))
            case "drained":
                self.do(s.on_drained(worker.id, usage, now))
            case ("exited", status):
                del self.workers[worker.id]
                self.do(s.on_exited(worker.id, status, "", now))
                self.stale(worker.id)

    def stale(self, worker_id: int) -> None:
        """Words that arrive after the death are dropped."""
        s = self.scheduler
        for commands in (
            s.on_ready(ready(worker_id), USAGE, self.now),
            s.on_draining(worker_id, USAGE, self.now),
            s.on_drained(worker_id, USAGE, self.now),
            s.on_exited(worker_id, 0, "", self.now),
        ):
            assert commands == []

    def time_passes(self) -> None:
        self.now += self.rng.choice([0.001, 0.1, 1.0, 1.0, 10.0])
        if self.rng.random() < 0.01:
            self.now += 120.0
        deadline = self.scheduler.next_deadline()
        seen = {}
        if self.scheduler.wants_look(self.now):
            for worker_id in self.workers:
                reading = Reading(self.rng.randrange(9), self.rng.randrange(2), self.now)
                seen[worker_id] = Seen(self.rng.choice([None, USAGE]), reading)
        commands = self.scheduler.on_tick(self.now, seen)
        if deadline is None or deadline > self.now:
            assert commands == []
        self.do(commands)

    def step(self) -> None:
        action = self.rng.choices(
            [self.client_acts, self.worker_acts, self.deliver, self.time_passes], [3, 4, 5, 1]
        )[0]
        action()

    def settle(self) -> None:
        """No new wishes: all that is under way ends."""
        for _ in range(100_000):
            if not self.open and all(w.state == "ready" and not w.said for w in self.workers.values()):
                return
            self.rng.choice([self.worker_acts, self.deliver, self.deliver, self.time_passes])()
            if self.rng.random() < 0.05:  # fates are told when the worker is reaped
                for worker in list(self.workers.values()):
                    if worker.state == "ready":
                        worker.ttl_ends()
        raise AssertionError(f"never settles: {self.open}, {[vars(w) for w in self.workers.values()]}")


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_random_walk(seed, limited):
    world = World(seed, limited)
    for _ in range(2_000):
        world.step()
    assert world.seq > 50 and len(world.answered) > 50  # the walk goes somewhere
    world.settle()
    assert not world.acquiring
    assert not len(world.scheduler.tickets), "every request was answered, exactly once, or withdrawn"

    for client in CLIENTS:
        world.client_goes(client)
    ticket = world.ask(b"p", m.Bye)
    world.do(world.scheduler.on_shutdown(b"p", m.Shutdown(ticket=ticket), world.now))
    world.closing = True
    while world.workers:
        world.deliver()
    assert world.scheduler.finished
    assert ticket in world.answered
    assert world.scheduler.ledger.total() == Usage()
    assert world.scheduler.next_deadline() is None
