"""Two models that take turns on a GPU, so that their processes start early, and whatever may happen to them.

A walk that picks among all that can happen hardly ever gets there.
"""

from __future__ import annotations

import collections
import random

from tests.world.machine import proxy_of
from tests.world.workers import MB, FakeWorker
from tests.world.world import CLIENTS, LIMITS, World

KEYS = ("c", "d")
STEPS = 120


class Turns:
    """One history, picked by a seed."""

    def __init__(self, seed: int) -> None:
        self.pick = random.Random(seed)
        self.world = World(self.pick.choice((130 * MB, 300 * MB)), None)

    def run(self) -> collections.Counter[str]:
        """Returns how often what has happened to processes that started early."""
        for _ in range(STEPS):
            self.step()
        self.world.settle()
        self.world.empty()
        self.world.close(self.pick.randrange(4))
        self.world.finish()
        return self.world.early.seen

    def step(self) -> None:
        often, seldom = self.pick.choice, self.pick.random() < 0.25
        if seldom:
            often((self.misbehave, self.leave, self.change))()
        else:
            often((self.ask, self.go_on, self.go_on, self.go_on, self.use, self.wait, self.wait))()

    def worker(self) -> FakeWorker | None:
        workers = list(self.world.workers.values())
        early = [worker for worker in workers if worker.id in self.world.early.waiting]
        return self.pick.choice(early if early and self.pick.random() < 0.5 else workers) if workers else None

    def ask(self) -> None:
        key = self.pick.choice(KEYS)
        self.world.acquires(self.pick.choice(CLIENTS), proxy_of(0, key), key, -1.0, 0)

    def go_on(self) -> None:
        """A worker does what it was told, and what it says arrives."""
        if (worker := self.worker()) is None:
            return
        for _ in range(self.pick.randint(1, 3)):
            worker.handle(True)
            if self.pick.random() < 0.7:
                worker.load("well", 1.0)
            worker.finish()
            self.world.deliver(worker, 0)
            if worker.id not in self.world.workers:
                return

    def use(self) -> None:
        for worker in self.world.workers.values():
            worker.call(self.world.now, 0)
            worker.finish()
        self.world.looks(fresh=True)

    def wait(self) -> None:
        at = self.world.scheduler.next_deadline()
        due = 0.0 if at is None else max(0.0, at - self.world.now)
        self.world.pass_time(self.pick.choice((0.05, 0.3, due, due, due)))

    def misbehave(self) -> None:
        if (worker := self.worker()) is None:
            return
        match self.pick.randrange(5):
            case 0:
                worker.hung = True
            case 1:
                self.world.breaks(worker.id)
            case 2:
                self.world.deliver(worker, 1)  # there may be no process for it
            case _:
                worker.lose_words(self.pick.randrange(3))
                worker.die(self.pick.choice((9, 11, 256)))

    def leave(self) -> None:
        client, key = self.pick.choice(CLIENTS), self.pick.choice(KEYS)
        proxy = proxy_of(0, key)
        match self.pick.randrange(5):
            case 0:
                self.world.withdraws(client, proxy, self.pick.random() < 0.5)
            case 1:
                self.world.releases(client, proxy)
            case 2:
                self.world.unloads(client, key, self.pick.random() < 0.5)
            case 3:
                self.world.goes(client)
            case _:
                self.world.cannot_acquire(client, proxy, key)

    def change(self) -> None:
        """Other limits, or a long time without any news."""
        if self.pick.random() < 0.5:
            self.world.configure(self.pick.choice(LIMITS[2:]), 0, 0, 0.0)
        else:
            self.world.pass_time(self.pick.choice((5.0, 200.0)))


def walk(histories: int, seed: int) -> collections.Counter[str]:
    """So many histories.  One that fails names its seed."""
    seen: collections.Counter[str] = collections.Counter()
    for number in range(seed, seed + histories):
        try:
            seen += Turns(number).run()
        except AssertionError as error:
            error.add_note(f"python -m tests.world --turns 1 --seed {number}")
            raise
    return seen
