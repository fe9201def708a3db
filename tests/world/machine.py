"""The world as a state machine of hypothesis: picks what happens, and shortens what goes wrong."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.world.workers import LOADS, MB, FakeWorker
from tests.world.world import CLIENTS, LIMITS, MODELS, UNITS, World

client = st.sampled_from(CLIENTS)
proxy = st.integers(0, 2)
key = st.sampled_from(MODELS)
ttl = st.sampled_from((-1.0, 0.0, 5.0, 30.0))
which = st.integers(0, 7)
MOST_STEPS = 100

has_workers = precondition(lambda self: self.world.workers)


def proxy_of(number: int, model: str) -> int:
    """A proxy is of one model for ever."""
    return number + 10 * MODELS.index(model)


class Machine(RuleBasedStateMachine):
    """Each rule is one thing that happens."""

    done = 0
    """Transitions of all walks."""
    events = 0

    @initialize(limit=st.sampled_from(LIMITS), memory=st.sampled_from((None, 120 * MB, 1 << 40)))
    def begin(self, limit: int | None, memory: int | None) -> None:
        self.world = World(limit, memory)

    def worker(self, number: int) -> FakeWorker:
        workers = list(self.world.workers.values())
        return workers[number % len(workers)]

    # --- clients

    @rule(client=client, number=proxy, key=key, ttl=ttl, how=st.integers(0, 31))
    def acquire(self, client, number, key, ttl, how):
        self.world.acquires(client, proxy_of(number, key), key, ttl, how)

    @rule(client=client, number=proxy, key=key, ttl=ttl)
    def acquire_plainly(self, client, number, key, ttl):
        self.world.acquires(client, proxy_of(number, key), key, ttl, 0)

    @rule(client=client, number=proxy, key=key, what=st.integers(0, 9), ttl=ttl)
    def proxy_acts(self, client, number, key, what, ttl):
        proxy, world = proxy_of(number, key), self.world
        if what < 4:
            world.releases(client, proxy)
        elif what < 6:
            world.sets_ttl(client, proxy, ttl)
        elif what < 8:
            world.withdraws(client, proxy, what == 6)
        elif what == 8:
            world.cannot_acquire(client, proxy, key)
        else:
            world.looks(fresh=number == 0)

    @rule(client=client, unit=st.sampled_from(UNITS), force=st.booleans())
    def unload(self, client, unit, force):
        self.world.unloads(client, unit, force)

    @rule(client=client)
    def go(self, client):
        self.world.goes(client)

    @has_workers
    @rule(client=client, number=proxy, which=which, lost=st.booleans())
    def about_worker(self, client, number, which, lost):
        worker = self.worker(which)
        if lost:
            self.world.asks_outcome(client, worker.id - which // 4)
        else:
            key = worker.spec.key if worker.spec.key in MODELS else MODELS[4 + which % 2]
            self.world.finds_outdated(client, proxy_of(number, key), worker.id)

    # --- workers

    @has_workers
    @rule(which=which, how=st.integers(0, 40))
    def arrive(self, which, how):
        self.world.deliver(self.worker(which), how)

    @has_workers
    @rule(which=which, how=st.integers(0, 40))
    def arrive_all(self, which, how):
        worker = self.worker(which)
        while worker.said and worker.id in self.world.workers:
            self.world.deliver(worker, how)

    @has_workers
    @rule(which=which, is_idle=st.booleans())
    def handle(self, which, is_idle):
        self.worker(which).handle(is_idle)

    @has_workers
    @rule(which=which, how=st.sampled_from(LOADS), part=st.sampled_from((0.2, 0.7, 1.0, 3.0)))
    def load(self, which, how, part):
        worker = self.worker(which)
        worker.handle(True)
        worker.load(how, part)
        self.world.transitions += 1

    @has_workers
    @rule(which=which, extra=st.sampled_from((0, 5 * MB, 80 * MB)), what=st.integers(0, 5))
    def work(self, which, extra, what):
        worker = self.worker(which)
        self.world.transitions += 1
        if what < 2:
            worker.call(self.world.now, extra)
        elif what < 5:
            worker.finish()
        else:
            worker.drain("ttl" if extra else "recycled")

    @has_workers
    @rule(which=which, status=st.sampled_from((0, 9, 11, 256)), lost=st.integers(0, 3), how=st.integers(0, 5))
    def misbehave(self, which, status, lost, how):
        worker, self.world.transitions = self.worker(which), self.world.transitions + 1
        if how == 0:
            worker.hung = True
        elif how == 1:
            self.world.breaks(worker.id)
        elif how == 2 and worker.busy:
            worker.exceeded = 99 * MB
            worker.die(0)
        elif how == 3:
            worker.lose_words(lost)
            worker.die(status)

    # --- the host

    @rule(limit=st.sampled_from(LIMITS), held=st.integers(0, 63), eager=st.integers(0, 7), ttl=ttl)
    def configure(self, limit, held, eager, ttl):
        self.world.configure(limit, held, eager, ttl)

    @rule(nbytes=st.sampled_from((MB, 5 * MB, 90 * MB)), what=st.integers(0, 5), name=st.sampled_from("abc"))
    def host_acts(self, nbytes, what, name):
        world = self.world
        world.transitions += 1
        if what < 2:
            world.saves(nbytes % 7, nbytes)
        elif what < 4:
            world.saver_ends((0, 9, 75 << 8)[what + nbytes % 2 - 2])
        elif what == 4:
            world.saved ^= {name * 8}
        else:
            world.knows_gpus(None if name == "a" else nbytes * 20)

    @rule(
        seconds=st.sampled_from((0.0, 0.004, 0.05, 0.3, 1.0, 10.0, 40.0, 200.0)),
        late=st.sampled_from((0.0, 0.002)),
    )
    def wait(self, seconds, late):
        self.world.pass_time(seconds, late)

    @rule()
    def wait_until_due(self):
        at = self.world.scheduler.next_deadline()
        self.world.pass_time(0.0 if at is None else max(0.0, at - self.world.now))

    @rule()
    def everybody_acts(self):
        self.world.everybody_acts()

    def teardown(self):
        world = getattr(self, "world", None)
        if world is None or not world.sound:
            return
        ending = world.transitions % 5
        if ending < 3:
            world.settle()
            world.empty()
        world.close(world.transitions % 4)
        world.finish()
        Machine.done += world.transitions
        Machine.events += world.events.seq


def walk(transitions: int, *, seed: int | None = None) -> None:
    """At least about so many; without a seed always the same."""
    from hypothesis import seed as seeded

    if seed is not None:
        seeded(seed)(Machine)
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=max(1, transitions // MOST_STEPS),
            stateful_step_count=MOST_STEPS,
            derandomize=seed is None,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            print_blob=False,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        ),
    )
