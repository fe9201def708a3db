"""The scheduler: facts and times in, commands out."""

from __future__ import annotations

import signal

import pytest

from onnx_dl.core.environment import ThreadAttributes
from onnx_dl.core.lifecycle import ModelState
from onnx_dl.core.spec import ModelSpec, Warmup
from onnx_dl.core.status import ModelStatus, Usage
from onnx_dl.core.terms import Terms
from onnx_dl.errors import InvalidTransition, LoadTimeout, MemoryLimitExceeded, WorkerDied
from onnx_dl.protocol import control as m
from onnx_dl.protocol import failures
from onnx_dl.supervisor.policy.commands import Emit, SendToClient, SendToWorker, StartWorker
from onnx_dl.supervisor.policy.measuring import Sample
from onnx_dl.supervisor.policy.memory_amount import NOTHING
from onnx_dl.supervisor.processes.worker_process import exit_status
from tests.support.builders import (
    DESCRIPTION,
    SETTINGS,
    USAGE,
    A,
    B,
    Rig,
    acquire,
    event,
    events,
    failed,
    granted,
    kill,
    order,
    ready,
    spec,
    start,
    starts,
    told,
    unload,
    unloaded,
)

SEGV, KILLED = exit_status(signal.SIGSEGV), exit_status(signal.SIGKILL)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def denial(commands: list) -> Exception:
    (message,) = told(commands, m.Denied)
    return failures.rebuild(message.failure)


def fate(commands: list) -> WorkerDied | None:
    (message,) = told(commands, m.Outcome)
    if message.failure is None:
        return None
    error = failures.rebuild(message.failure)
    assert isinstance(error, WorkerDied)
    return error


# --- loading ---------------------------------------------------------------------------------------------


def test_first_acquire_starts_a_worker(rig):
    assert rig.scheduler.on_acquire(A, acquire(1), 5.0) == [start(1), event(1, "loading", 5.0, pid=None)]


def test_a_worker_has_the_standing_of_who_asked_last(rig):
    s = rig.scheduler
    for ticket, nice in ((1, 3), (2, 5)):
        ask = acquire(ticket, proxy=ticket)
        ask.thread_attributes = ThreadAttributes(nice=nice)
        commands = s.on_acquire(A, ask, 5.0)
        assert [c.thread_attributes for c in commands if isinstance(c, StartWorker)] == [
            ThreadAttributes(nice=nice)
        ][: 2 - ticket]
    s.on_spawned(1, 101)
    (again,) = [
        c for c in s.on_exited(1, exit_status(9), "", 6.0) + s.on_tick(60.0, {}) if isinstance(c, StartWorker)
    ]
    assert again.thread_attributes == ThreadAttributes(nice=5)


def test_started_worker_is_told_what_to_load_with_the_ttl_in_force(rig):
    rig.scheduler.on_acquire(A, acquire(1, ttl=30.0), 0.0)
    assert rig.scheduler.on_spawned(1, 101) == []
    assert rig.scheduler.on_started(1) == [order(1, m.Load(spec=spec(), ttl=30.0))]


def test_a_worker_that_is_faster_than_the_template_loads_when_its_process_is_known(rig):
    """It could not be measured before, and who was granted it would be told no process id."""
    rig.scheduler.on_acquire(A, acquire(1, ttl=30.0), 0.0)
    assert rig.scheduler.on_started(1) == []
    assert rig.scheduler.on_spawned(1, 101) == [order(1, m.Load(spec=spec(), ttl=30.0))]


def test_started_worker_is_told_its_warm_up(rig):
    rig.scheduler.orders.warmups = {"m": {"x": Warmup("float32", (1, 4))}, "n": {"x": Warmup("str", (), "a")}}
    rig.scheduler.on_acquire(A, acquire(1), 0.0)
    rig.scheduler.on_spawned(1, 101)
    (said,) = rig.scheduler.on_started(1)
    assert said == order(1, m.Load(spec=spec(), ttl=-1.0, warmups={"m": {"x": Warmup("float32", (1, 4))}}))


def test_ready_grants_to_the_waiter(rig):
    rig.loading()
    assert rig.scheduler.on_ready(ready(seconds=0.5), USAGE, 1.0) == [
        event(2, "ready", 1.0, usage=USAGE, seconds=0.5),
        granted(A, 1),
    ]


def test_cold_burst_of_32_loads_exactly_once(rig):
    s = rig.scheduler
    commands = []
    for n in range(32):
        commands += s.on_acquire(A if n % 2 else B, acquire(n, proxy=n), 0.001 * n)
    assert starts(commands) == [start(1)]
    assert commands == [start(1), event(1, "loading", 0.0, pid=None)]
    s.on_spawned(1, 101)
    s.on_started(1)
    assert s.on_ready(ready(), USAGE, 1.0) == [
        event(2, "ready", 1.0, usage=USAGE, seconds=0.5),
        *[granted(A if n % 2 else B, n) for n in range(32)],
    ]


def test_acquire_of_a_ready_model_is_granted_at_once(rig):
    rig.ready()
    assert rig.scheduler.on_acquire(B, acquire(9, proxy=7), 2.0) == [granted(B, 9)]


def test_two_models_have_two_workers(rig):
    s = rig.scheduler
    assert starts(s.on_acquire(A, acquire(1, key="m"), 0.0)) == [start(1, "m")]
    assert starts(s.on_acquire(A, acquire(2, key="n"), 0.0)) == [start(2, "n")]


def test_a_new_load_uses_the_spec_of_who_asks(rig):
    s = rig.scheduler
    s.on_acquire(A, acquire(1), 0.0)
    other = ModelSpec(key="m", name="link.onnx", cwd="/else", path="link.onnx")
    s.on_unload(A, unload(2), 0.0)
    s.on_client_gone(A, 0.1)
    s.on_acquire(B, m.Acquire(ticket=3, proxy=1, spec=other, terms=Terms()), 0.2)
    assert starts(s.on_exited(1, KILLED, "", 0.3)) == [StartWorker(2, other)]


# --- TTL -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ttls", "longest"),
    [([0.0], 0.0), ([5.0, 30.0, 0.0], 30.0), ([-1.0, 30.0], -1.0), ([30.0, -1.0, 0.0], -1.0), ([-1.0], -1.0)],
)
def test_ttl_in_force_is_the_longest_and_minus_one_is_longer_than_any(rig, ttls, longest):
    s = rig.scheduler
    for n, ttl in enumerate(ttls):
        s.on_acquire(A, acquire(n, proxy=n, ttl=ttl), 0.0)
    s.on_spawned(1, 101)
    assert s.on_started(1) == [order(1, m.Load(spec=spec(), ttl=longest))]
    commands = s.on_ready(ready(), USAGE, 1.0)
    assert not [c for c in commands if isinstance(c, SendToWorker)]  # it knows


def test_waiter_who_comes_after_load_was_ordered_retimes_when_ready(rig):
    rig.loading(ttl=5.0)
    rig.scheduler.on_acquire(B, acquire(2, ttl=60.0), 0.5)
    assert rig.scheduler.on_ready(ready(), USAGE, 1.0)[-1] == order(1, m.Retime(ttl=60.0))


def test_acquire_retimes_only_when_longer(rig):
    rig.ready(ttl=30.0)
    s = rig.scheduler
    assert s.on_acquire(A, acquire(2, proxy=2, ttl=10.0), 2.0) == [granted(A, 2)]
    assert s.on_acquire(A, acquire(3, proxy=3, ttl=50.0), 2.0) == [
        granted(A, 3),
        order(1, m.Retime(ttl=50.0)),
    ]


def test_set_ttl_retimes_and_says_nothing_twice(rig):
    rig.ready(ttl=30.0)
    s = rig.scheduler
    assert s.on_set_ttl(A, 1, 5.0) == [order(1, m.Retime(ttl=5.0))]
    assert s.on_set_ttl(A, 1, 5.0) == []
    assert s.on_set_ttl(A, 1, -1.0) == [order(1, m.Retime(ttl=-1.0))]
    assert s.on_set_ttl(A, 1, 0.0) == [order(1, m.Retime(ttl=0.0))]


def test_set_ttl_of_who_holds_nothing_is_nothing(rig):
    rig.ready(ttl=30.0)
    assert rig.scheduler.on_set_ttl(A, 99, 5.0) == []
    assert rig.scheduler.on_set_ttl(B, 1, 5.0) == []


def test_set_ttl_while_the_model_loads_counts_when_it_is_ready(rig):
    rig.loading(ttl=30.0)
    s = rig.scheduler
    commands = s.on_set_ttl(A, 1, 5.0)
    commands += s.on_ready(ready(), USAGE, 1.0)
    assert s.snapshot(1.0)[0].ttl == 5.0
    assert order(1, m.Retime(ttl=5.0)) in commands


def test_release_of_the_longest_retimes(rig):
    rig.ready(ttl=60.0)
    s = rig.scheduler
    s.on_acquire(B, acquire(2, ttl=5.0), 2.0)
    assert s.on_release(A, 1, 3.0) == [order(1, m.Retime(ttl=5.0))]


# --- letting go ------------------------------------------------------------------------------------------


def test_last_release_drains_by_request(rig):
    rig.ready()
    s = rig.scheduler
    assert s.on_release(A, 1, 2.0) == [
        event(3, "draining", 2.0, usage=USAGE, reason="request"),
        order(1, m.Drain()),
    ]
    assert s.on_release(A, 1, 2.5) == []


def outdated(proxy: int, worker_id: int = 1) -> m.Outdated:
    return m.Outdated(proxy=proxy, worker_id=worker_id, path="/w.bin")


def test_a_file_that_has_changed_is_told_once_and_only_who_says_so_leaves(rig):
    rig.ready(ttl=5.0)
    s = rig.scheduler
    s.on_acquire(B, acquire(2, proxy=1, ttl=60.0), 1.5)
    s.on_acquire(B, acquire(3, proxy=2), 1.5)
    told_of = event(3, "outdated", 2.0, usage=USAGE, detail="/w.bin")
    assert s.on_outdated(B, outdated(2), 2.0) == [told_of, order(1, m.Retime(ttl=60.0))]
    assert s.on_outdated(B, outdated(2), 2.1) == []
    assert s.on_outdated(B, outdated(1), 2.2) == [order(1, m.Retime(ttl=5.0))]
    assert s.on_outdated(B, outdated(1, worker_id=7), 2.3) == []
    assert s.snapshot(3.0)[0].leases == 1


def test_an_outdated_worker_that_nobody_else_uses_goes(rig):
    rig.ready()
    assert rig.scheduler.on_outdated(A, outdated(1), 2.0) == [
        event(3, "outdated", 2.0, usage=USAGE, detail="/w.bin"),
        event(4, "draining", 2.0, usage=USAGE, reason="request"),
        order(1, m.Drain()),
    ]


def test_what_is_outdated_and_drains_already_is_told_all_the_same(rig):
    rig.draining()
    assert rig.scheduler.on_outdated(A, outdated(1), 3.0) == [
        event(4, "outdated", 3.0, usage=USAGE, detail="/w.bin")
    ]


def test_last_client_gone_drains_by_exit(rig):
    rig.ready()
    s = rig.scheduler
    s.on_acquire(B, acquire(2), 1.5)
    assert s.on_client_gone(A, 2.0) == []
    assert s.on_client_gone(B, 3.0) == [
        event(3, "draining", 3.0, usage=USAGE, reason="exit"),
        order(1, m.Drain()),
    ]


def test_client_gone_while_loading_kills_at_once(rig):
    rig.loading()
    assert rig.scheduler.on_client_gone(A, 0.5) == [event(2, "draining", 0.5, reason="exit"), kill(1)]
    assert rig.scheduler.on_exited(1, KILLED, "", 0.6) == [
        event(3, "unloaded", 0.6, reason="exit", seconds=0.6, freed=0)
    ]


def test_client_gone_while_others_wait_keeps_loading(rig):
    rig.loading()
    s = rig.scheduler
    s.on_acquire(B, acquire(2), 0.1)
    assert s.on_client_gone(A, 0.5) == []
    assert told(s.on_ready(ready(), USAGE, 1.0), m.Granted) == [granted(B, 2).message]


def test_client_that_held_nothing_may_go(rig):
    rig.ready()
    assert rig.scheduler.on_client_gone(B, 2.0) == []


def test_release_in_states_without_a_worker(rig):
    assert rig.scheduler.on_release(A, 1, 0.0) == []
    rig.loading()
    rig.crash(1.0, 1)
    assert rig.scheduler.on_release(A, 1, 2.0) == []
    assert rig.scheduler.on_client_gone(A, 2.0) == []


def test_release_while_draining_changes_nothing(rig):
    rig.draining()
    assert rig.scheduler.on_release(A, 1, 2.5) == []


# --- unload ----------------------------------------------------------------------------------------------


def test_unload_of_an_unknown_model_is_answered_at_once(rig):
    assert rig.scheduler.on_unload(A, unload(1), 0.0) == [unloaded(A, 1, was_loaded=False)]
    assert rig.scheduler.snapshot(0.0) == []


@pytest.mark.parametrize("force", [False, True])
def test_unload_while_failed_is_answered_at_once(rig, force):
    rig.loading()
    rig.crash(1.0, 1)
    assert rig.scheduler.on_unload(A, unload(2, force=force), 2.0) == [unloaded(A, 2, was_loaded=False)]


@pytest.mark.parametrize("force", [False, True])
def test_unload_while_loading_kills_and_waiters_get_a_new_load(rig, force):
    rig.loading()
    s = rig.scheduler
    assert s.on_unload(B, unload(5, force=force), 0.5) == [
        event(2, "draining", 0.5, reason="request"),
        kill(1),
    ]
    assert s.on_exited(1, KILLED, "", 0.7) == [
        event(3, "unloaded", 0.7, reason="request", seconds=0.7, freed=0),
        unloaded(B, 5),
        start(2),
        event(4, "loading", 0.7, worker_id=2, pid=None),
    ]


def test_unload_of_a_ready_model_drains_ends_reaps_then_answers(rig):
    rig.ready()
    s = rig.scheduler
    assert s.on_unload(A, unload(2), 3.0) == [
        event(3, "draining", 3.0, usage=USAGE, reason="request"),
        order(1, m.Drain()),
    ]
    last = Usage(rss=9_000_000, private=8_000_000, gpu=77)
    assert s.on_drained(1, last, 4.0) == [order(1, m.Exit())]
    assert s.on_exited(1, exit_status(0), "", 5.0) == [
        event(4, "unloaded", 5.0, usage=last, reason="request", seconds=4.0, freed=8_000_000),
        unloaded(A, 2),
    ]
    assert s.snapshot(5.0) == []
    assert s.in_use(99.0) == NOTHING


def test_forced_unload_of_a_ready_model_kills(rig):
    rig.ready()
    s = rig.scheduler
    assert s.on_unload(A, unload(2, force=True), 3.0) == [
        event(3, "draining", 3.0, usage=USAGE, reason="request"),
        kill(1),
    ]
    assert s.on_exited(1, KILLED, "", 3.1)[-1] == unloaded(A, 2)


def test_unload_while_draining_waits_too(rig):
    rig.draining()
    s = rig.scheduler
    assert s.on_unload(A, unload(3), 2.5) == []
    assert s.on_unload(A, unload(4, force=True), 2.6) == [kill(1)]
    assert told(s.on_exited(1, KILLED, "", 3.0), m.Unloaded) == [
        m.Unloaded(ticket=50, was_loaded=True),
        m.Unloaded(ticket=3, was_loaded=True),
        m.Unloaded(ticket=4, was_loaded=True),
    ]


# --- races of the table ----------------------------------------------------------------------------------


def test_acquire_while_draining_waits_and_the_exit_loads_again(rig):
    rig.draining()
    s = rig.scheduler
    assert s.on_acquire(A, acquire(7, ttl=9.0), 2.5) == []
    s.on_drained(1, USAGE, 3.0)
    assert s.on_exited(1, exit_status(0), "", 4.0) == [
        event(4, "unloaded", 4.0, usage=USAGE, reason="request", seconds=3.0, freed=USAGE.private),
        unloaded(B, 50),
        start(2),
        event(5, "loading", 4.0, worker_id=2, pid=None),
    ]
    s.on_spawned(2, 102)
    assert s.on_started(2) == [order(2, m.Load(spec=spec(), ttl=9.0))]
    assert s.on_ready(ready(2), USAGE, 5.0)[1:] == [granted(A, 7, worker_id=2)]


def test_ready_crossing_a_drain_is_told_to_drain(rig):
    rig.loading()
    s = rig.scheduler
    s.on_unload(B, unload(5), 0.5)
    assert s.on_ready(ready(), USAGE, 0.6) == [order(1, m.Drain())]
    assert s.on_drained(1, USAGE, 0.7) == [order(1, m.Exit())]


def test_ttl_drain_then_unload(rig):
    rig.ready(ttl=3.0)
    s = rig.scheduler
    assert s.on_draining(1, USAGE, 4.0) == [event(3, "draining", 4.0, usage=USAGE, reason="ttl")]
    assert s.on_unload(A, unload(2), 4.1) == []
    assert s.on_drained(1, USAGE, 4.2) == [order(1, m.Exit())]
    assert s.on_exited(1, exit_status(0), "", 4.5) == [
        event(4, "unloaded", 4.5, usage=USAGE, reason="ttl", seconds=3.5, freed=USAGE.private),
        unloaded(A, 2),
    ]


def test_unload_then_ttl_drain_keeps_the_first_reason(rig):
    rig.ready(ttl=3.0)
    s = rig.scheduler
    s.on_unload(A, unload(2), 4.0)
    assert s.on_draining(1, USAGE, 4.1) == []
    s.on_drained(1, USAGE, 4.2)
    assert [e.reason for e in events(s.on_exited(1, exit_status(0), "", 4.5))] == ["request"]


def test_facts_of_unknown_or_reaped_workers_are_dropped(rig):
    rig.draining()
    s = rig.scheduler
    s.on_drained(1, USAGE, 3.0)
    s.on_exited(1, exit_status(0), "", 4.0)
    s.on_acquire(A, acquire(9), 5.0)
    before = s.snapshot(5.0)
    for stale in (1, 77):
        assert s.on_spawned(stale, 5) == []
        assert s.on_started(stale) == []
        assert s.on_ready(ready(stale), USAGE, 6.0) == []
        assert s.on_load_failed(failed(stale), 1.0) == []
        assert s.on_draining(stale, USAGE, 6.0) == []
        assert s.on_drained(stale, USAGE, 6.0) == []
        assert s.on_measured(stale, Sample(USAGE), 6.0) == []
        assert s.on_spawn_failed(stale, "no", 6.0) == []
        assert s.on_exited(stale, exit_status(0), "", 6.0) == []
    assert s.snapshot(5.0) == before
    assert s.fleet.ledger.of(1) == s.fleet.ledger.of(77) == Usage()


def test_a_worker_that_says_ready_twice_is_a_bug_with_history(rig):
    rig.ready()
    with pytest.raises(InvalidTransition, match=r"LoadRequested unloaded->loading.*WorkerReady"):
        rig.scheduler.on_ready(ready(), USAGE, 2.0)


# --- failures --------------------------------------------------------------------------------------------


def test_engine_refusal_reaches_the_waiters_as_it_was(rig):
    rig.loading()
    s = rig.scheduler
    assert s.on_load_failed(failed(), 1.0) == [order(1, m.Exit())]
    commands = s.on_exited(1, exit_status(0), "", 1.0)
    assert commands[0] == event(2, "failed", 1.0, detail="not a model", retry_after=0.0)
    error = denial(commands)
    assert type(error) is ValueError
    assert error.args == ("not a model",)
    assert error.retry_after == 0.0
    assert len(commands) == 2


def test_worker_that_was_refused_its_model_and_does_not_exit_is_killed(rig):
    rig.loading()
    s = rig.scheduler
    s.on_load_failed(failed(), 1.0)
    assert s.next_deadline() is not None
    assert s.on_tick(1000.0) == [kill(1)]


def test_crash_while_loading(rig):
    rig.loading()
    s = rig.scheduler
    commands = s.on_exited(1, SEGV, "boom\n", 2.0)
    error = denial(commands)
    assert isinstance(error, WorkerDied)
    assert (error.pid, error.signal, error.exit_code) == (101, signal.SIGSEGV, None)
    assert (error.stderr, error.reason, error.retry_after) == ("boom\n", "crash", 0.0)
    assert "SIGSEGV" in str(error) and "boom" in str(error) and "while it loaded" in str(error)
    assert commands[0] == event(2, "failed", 2.0, detail=str(error), retry_after=0.0)


def test_crash_when_ready_emits_unloaded_then_failed(rig):
    rig.ready()
    s = rig.scheduler
    commands = s.on_exited(1, SEGV, "", 3.0)
    assert [(e.seq, e.type, e.reason) for e in events(commands)] == [
        (3, "unloaded", "crash"),
        (4, "failed", None),
    ]
    first, second = events(commands)
    assert (first.freed, first.seconds, first.pid) == (USAGE.private, 2.0, 101)
    assert second.retry_after == 0.0
    assert s.in_use(99.0) == NOTHING
    assert s.snapshot(3.0)[0].state is ModelState.FAILED
    assert starts(s.on_acquire(A, acquire(2), 3.0)) == [start(2)]  # the next call loads afresh


def test_backoff_doubles_to_a_minute_and_says_how_long(rig):
    s = rig.scheduler
    now, delays = 0.0, []
    for worker_id in range(1, 11):
        assert starts(s.on_acquire(A, acquire(worker_id), now)) == [start(worker_id)]
        commands = s.on_exited(worker_id, SEGV, "", now)
        delay = events(commands)[-1].retry_after
        assert denial(commands).retry_after == delay
        assert s.snapshot(now)[0].failures == worker_id
        if delay:
            early = s.on_acquire(A, acquire(900), now + delay * 0.75)
            assert not starts(early)
            assert denial(early).retry_after == pytest.approx(delay * 0.25)
        delays.append(delay)
        now += delay
    assert delays == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]


def test_worker_that_was_stable_resets_the_count(rig):
    s = rig.scheduler
    for worker_id in (1, 2):
        s.on_acquire(A, acquire(worker_id), 0.0)
        s.on_exited(worker_id, SEGV, "", 0.0)
    assert s.snapshot(0.0)[0].failures == 2
    s.on_acquire(A, acquire(3), 1.0)
    s.on_ready(ready(3), USAGE, 2.0)
    commands = s.on_exited(3, SEGV, "", 2.0 + SETTINGS.stable_after + 0.1)
    assert events(commands)[-1].retry_after == 0.0
    assert s.snapshot(20.0)[0].failures == 1


def test_worker_that_dies_soon_after_ready_counts(rig):
    s = rig.scheduler
    for worker_id, now, delay in ((1, 0.0, 0.0), (2, 20.0, 1.0)):
        s.on_acquire(A, acquire(worker_id), now)
        s.on_ready(ready(worker_id), USAGE, now)
        commands = s.on_exited(worker_id, SEGV, "", now + SETTINGS.stable_after)
        assert events(commands)[-1].retry_after == delay


def test_spawn_failure_denies(rig):
    s = rig.scheduler
    s.on_acquire(A, acquire(1), 0.0)
    commands = s.on_spawn_failed(1, "Cannot allocate memory", 0.5)
    error = denial(commands)
    assert isinstance(error, WorkerDied)
    assert str(error) == "No worker process could be started for m.onnx: Cannot allocate memory."
    assert commands[0] == event(2, "failed", 0.5, pid=None, detail=str(error), retry_after=0.0)


def test_crash_while_draining_is_an_unload(rig):
    rig.draining()
    s = rig.scheduler
    commands = s.on_exited(1, SEGV, "", 3.0)
    assert [e.type for e in events(commands)] == ["unloaded"]
    assert commands[-1] == unloaded(B, 50)
    assert s.snapshot(3.0) == []


# --- deadlines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("busy", "ended_at"), [([0, 0], 7.0), ([1, 0, 0], 12.0), ([0, 1, 0, 0], 17.0)])
def test_a_worker_that_drains_does_nothing_and_does_not_leave_is_killed(rig, busy, ended_at):
    """It is stopped, or hangs; one in which something runs has the time that this takes."""
    rig.draining(now=2.0)
    s = rig.scheduler
    now = 2.0
    for number in busy:
        assert s.next_deadline() == now and s.to_check(now) == [1]
        assert s.to_check(now - 0.1) == []
        commands = s.on_checked(1, number, now)
        now += 5.0
    assert (now - 5.0, commands) == (ended_at, [kill(1)])
    assert s.to_check(99.0) == [] and s.next_deadline() is None


def test_load_timeout_kills_and_tells_the_waiters(rig):
    rig.loading(now=10.0)
    s = rig.scheduler
    assert s.next_deadline() == 110.0
    assert s.on_tick(109.9) == []
    assert s.on_tick(110.0) == [kill(1)]
    assert s.next_deadline() is None
    error = denial(s.on_exited(1, KILLED, "", 111.0))
    assert isinstance(error, LoadTimeout)
    assert "100 seconds" in str(error) and "ONNX_DL_LOAD_TIMEOUT" in str(error)


def test_ready_that_crosses_a_load_timeout_grants_nobody_a_worker_that_was_killed(rig):
    rig.loading()
    s = rig.scheduler
    assert s.on_tick(100.0) == [kill(1)]
    assert told(s.on_ready(ready(), USAGE, 100.0), m.Granted) == []
    assert isinstance(denial(s.on_exited(1, KILLED, "", 100.1)), LoadTimeout)


def test_drained_worker_that_does_not_exit_is_killed_once(rig):
    rig.draining()
    s = rig.scheduler
    s.on_drained(1, USAGE, 3.0)
    assert s.to_check(99.0) == []
    assert s.next_deadline() == 8.0
    assert s.on_tick(7.9) == []
    assert s.on_tick(8.0) == [kill(1)]
    assert s.on_tick(9.0) == []
    assert s.next_deadline() is None
    s.on_ask_outcome(A, m.AskOutcome(ticket=5, worker_id=1))
    assert fate(s.on_exited(1, KILLED, "", 9.0)) is None  # it had drained: nothing was lost


def test_next_deadline_is_the_earliest(rig):
    s = rig.scheduler
    assert s.next_deadline() is None
    s.on_acquire(A, acquire(1, key="a"), 7.0)
    s.on_acquire(A, acquire(2, key="b"), 3.0)
    assert s.next_deadline() == 103.0


# --- fates -----------------------------------------------------------------------------------------------


def test_fate_of_a_clean_drain_is_none_before_and_after_the_exit(rig):
    rig.draining()
    s = rig.scheduler
    assert s.on_ask_outcome(A, m.AskOutcome(ticket=5, worker_id=1)) == []
    s.on_drained(1, USAGE, 3.0)
    assert s.on_ask_outcome(B, m.AskOutcome(ticket=6, worker_id=1)) == []
    assert told(s.on_exited(1, exit_status(0), "", 4.0), m.Outcome) == [
        m.Outcome(ticket=5, failure=None),
        m.Outcome(ticket=6, failure=None),
    ]
    assert s.on_ask_outcome(A, m.AskOutcome(ticket=7, worker_id=1)) == [
        SendToClient(A, m.Outcome(ticket=7, failure=None))
    ]


def test_fate_of_a_crash_before_and_after_the_exit(rig):
    rig.ready()
    s = rig.scheduler
    assert s.on_ask_outcome(A, m.AskOutcome(ticket=5, worker_id=1)) == []
    before = fate(s.on_exited(1, SEGV, "last words\n", 3.0))
    after = fate(s.on_ask_outcome(A, m.AskOutcome(ticket=6, worker_id=1)))
    for error in (before, after):
        assert (error.pid, error.signal, error.exit_code) == (101, signal.SIGSEGV, None)
        assert (error.stderr, error.reason, error.retry_after) == ("last words\n", "crash", 0.0)
        assert "before it answered" in str(error)


def test_fate_carries_the_backoff(rig):
    s = rig.scheduler
    for worker_id in (1, 2):
        s.on_acquire(A, acquire(worker_id), 1.0)
        s.on_ready(ready(worker_id), USAGE, 1.0)
        s.on_exited(worker_id, SEGV, "", 1.0)
    assert fate(s.on_ask_outcome(A, m.AskOutcome(ticket=6, worker_id=2))).retry_after == 1.0


def test_fate_of_exit_code_and_of_forced_unload(rig):
    rig.ready()
    s = rig.scheduler
    died = fate(
        [
            *s.on_ask_outcome(A, m.AskOutcome(ticket=5, worker_id=1)),
            *s.on_exited(1, exit_status(3 << 8), "", 3.0),
        ]
    )
    assert (died.exit_code, died.signal) == (3, None)
    s.on_acquire(A, acquire(2), 3.0)
    s.on_ready(ready(2), USAGE, 4.0)
    s.on_unload(A, unload(3, force=True), 5.0)
    s.on_ask_outcome(A, m.AskOutcome(ticket=6, worker_id=2))
    forced = fate(s.on_exited(2, KILLED, "", 6.0))
    assert (forced.reason, forced.signal) == ("request", signal.SIGKILL)
    assert "force=True" in str(forced)


@pytest.mark.parametrize("draining", [False, True])
def test_fate_of_a_worker_that_had_too_much_memory(rig, draining):
    s = rig.scheduler
    limited = spec(max_memory_hard=1000)
    s.on_acquire(A, m.Acquire(ticket=1, proxy=1, spec=limited, terms=Terms()), 0.0)
    s.on_spawned(1, 101)
    s.on_ready(ready(), USAGE, 1.0)
    if draining:
        s.on_draining(1, USAGE, 2.0, "recycled")
    s.on_ask_outcome(A, m.AskOutcome(ticket=5, worker_id=1))
    commands = s.on_exited(1, exit_status(75 << 8), "", 3.0, exceeded=1234)
    error = fate(commands)
    assert type(error) is MemoryLimitExceeded
    assert (error.limit, error.used, error.pid, error.retry_after) == (1000, 1234, 101, 0.0)
    told_events = {e.type: e for e in events(commands)}
    assert ("failed" in told_events) is not draining
    assert all("max_memory_hard" in said.detail for said in told_events.values())


def test_an_event_tells_that_a_worker_had_too_much_memory_though_more_went_wrong(rig):
    s = rig.scheduler
    s.on_acquire(A, m.Acquire(ticket=1, proxy=1, spec=spec(max_memory_hard=1000), terms=Terms()), 0.0)
    s.on_spawned(1, 101)
    s.on_ready(ready(), USAGE, 1.0)
    s.on_draining(1, USAGE, 2.0, "recycled")
    s.on_broken(1, failures.describe(ValueError("no such peer")))
    (ended,) = events(s.on_exited(1, exit_status(75 << 8), "", 3.0, exceeded=1234))
    assert "max_memory_hard" in ended.detail


def test_fate_of_a_crash_during_a_graceful_unload_is_not_blamed_on_force(rig):
    rig.draining()
    s = rig.scheduler
    s.on_ask_outcome(A, m.AskOutcome(ticket=5, worker_id=1))
    error = fate(s.on_exited(1, SEGV, "", 3.0))
    assert error.signal == signal.SIGSEGV
    assert "force=True" not in str(error)
    assert "SIGSEGV" in str(error)
    assert error.reason == "crash"


def test_only_the_latest_fates_are_remembered(rig):
    s = rig.scheduler
    for n in range(1, 302):
        s.on_acquire(A, acquire(n, key=f"k{n}"), 0.0)
        s.on_exited(n, SEGV, "", 0.0)
    assert fate(s.on_ask_outcome(A, m.AskOutcome(ticket=1, worker_id=301))) is not None
    assert fate(s.on_ask_outcome(A, m.AskOutcome(ticket=1, worker_id=1))) is None


# --- the end ---------------------------------------------------------------------------------------------


def test_shutdown_kills_all_and_says_bye_when_the_last_is_reaped(rig):
    rig.ready()
    s = rig.scheduler
    s.on_acquire(A, acquire(2, key="n"), 2.0)
    commands = s.on_shutdown(A, m.Shutdown(ticket=9), 3.0)
    assert len(told(commands, m.Denied)) == 1
    assert [command for command in commands if not isinstance(command, SendToClient)] == [
        event(4, "draining", 3.0, usage=USAGE, reason="exit"),
        kill(1),
        event(5, "draining", 3.0, worker_id=2, key="n", pid=None, reason="exit"),
        kill(2),
    ]
    assert not s.shutdown.finished
    assert told(s.on_exited(1, KILLED, "", 3.1), m.Bye) == []
    assert not s.shutdown.finished
    assert s.on_exited(2, KILLED, "", 3.2)[-1] == SendToClient(A, m.Bye(ticket=9))
    assert s.shutdown.finished


def test_shutdown_with_nothing_loaded_says_bye_at_once(rig):
    assert rig.scheduler.on_shutdown(A, m.Shutdown(ticket=9), 0.0) == [SendToClient(A, m.Bye(ticket=9))]
    assert rig.scheduler.shutdown.finished


def test_every_shutdown_is_answered_once(rig):
    rig.ready()
    s = rig.scheduler
    s.on_shutdown(A, m.Shutdown(ticket=1), 2.0)
    s.on_shutdown(B, m.Shutdown(ticket=2), 2.0)
    assert told(s.on_exited(1, KILLED, "", 3.0), m.Bye) == [m.Bye(ticket=1), m.Bye(ticket=2)]
    assert s.on_shutdown(B, m.Shutdown(ticket=3), 4.0) == [SendToClient(B, m.Bye(ticket=3))]


def test_abandoned_ends_all_and_tells_nobody(rig):
    rig.ready()
    s = rig.scheduler
    assert s.on_abandoned(2.0) == [event(3, "draining", 2.0, usage=USAGE, reason="exit"), kill(1)]
    assert not s.shutdown.finished
    assert [e.reason for e in events(s.on_exited(1, KILLED, "", 3.0))] == ["exit"]
    assert s.shutdown.finished


def test_fresh_scheduler_is_not_finished(rig):
    assert not rig.scheduler.shutdown.finished
    rig.ready()
    assert not rig.scheduler.shutdown.finished


@pytest.mark.parametrize("state", ["nothing", "ready"])
def test_nothing_is_started_after_a_shutdown(rig, state):
    if state == "ready":
        rig.ready()
    s = rig.scheduler
    s.on_shutdown(A, m.Shutdown(ticket=1), 2.0)
    commands = s.on_acquire(B, acquire(2), 2.1)
    if state == "ready":
        commands += s.on_exited(1, KILLED, "", 3.0)
    assert starts(commands) == []
    assert s.shutdown.finished
    assert len(told(commands, m.Denied)) == 1


def test_waiters_are_answered_at_a_shutdown(rig):
    rig.loading()
    s = rig.scheduler
    commands = s.on_shutdown(B, m.Shutdown(ticket=1), 2.0) + s.on_exited(1, KILLED, "", 3.0)
    assert [message.ticket for message in told(commands, m.Denied)] == [1]


# --- what is known ---------------------------------------------------------------------------------------


def test_snapshot_in_each_state(rig):
    s = rig.scheduler
    base = {"model": "m.onnx", "key": "m"}
    s.on_acquire(A, acquire(1, ttl=7.0), 0.0)
    s.on_spawned(1, 101)
    s.on_started(1)
    assert s.snapshot(0.0) == [
        ModelStatus(
            **base,
            state=ModelState.LOADING,
            worker_id=1,
            pid=101,
            leases=0,
            ttl=7.0,
            usage=Usage(),
            loads=0,
            failures=0,
            retry_after=0.0,
        )
    ]
    s.on_ready(ready(), USAGE, 1.0)
    s.on_acquire(B, acquire(2, ttl=9.0), 1.0)
    s.on_measured(1, Sample(Usage(5, 4, 3)), 1.0)
    (status,) = s.snapshot(2.0)
    assert (status.state, status.leases, status.ttl, status.loads) == (ModelState.READY, 2, 9.0, 1)
    assert status.usage == Usage(5, 4, 3)
    s.on_unload(A, unload(3), 3.0)
    assert s.snapshot(3.0)[0].state is ModelState.DRAINING
    s.on_exited(1, exit_status(0), "", 4.0)
    assert s.snapshot(4.0) == []
    for worker_id in (2, 3):
        s.on_acquire(A, acquire(4), 5.0)
        s.on_exited(worker_id, SEGV, "", 5.0)
    (status,) = s.snapshot(5.25)
    assert (status.state, status.worker_id, status.pid, status.ttl) == (ModelState.FAILED, None, None, None)
    assert (status.failures, status.retry_after) == (2, 0.75)


def test_pids_of_live_workers(rig):
    s = rig.scheduler
    s.on_acquire(A, acquire(1), 0.0)
    assert s.pids() == {}
    s.on_spawned(1, 101)
    assert s.pids() == {1: 101}
    s.on_exited(1, exit_status(0), "", 1.0)
    assert s.pids() == {}


def test_events_are_numbered_without_gaps_over_all_models(rig):
    s = rig.scheduler
    seen = []
    for n, key in enumerate(["a", "b", "c"], 1):
        seen += events(s.on_acquire(A, acquire(n, key=key), float(n)))
        seen += events(s.on_ready(ready(n), USAGE, float(n)))
        seen += events(s.on_unload(A, unload(n, key=key), float(n)))
    for n in (2, 1, 3):
        seen += events(s.on_exited(n, exit_status(0), "", 9.0))
    assert [e.seq for e in seen] == list(range(1, 13))
    assert s.announcements.seq == 12
    assert s.announcements.recent(99) == seen and s.announcements.recent(2) == seen[-2:]
    assert s.announcements.recent(0) == s.announcements.recent(-1) == []
    assert [e.type for e in seen if e.key == "b"] == ["loading", "ready", "draining", "unloaded"]


def test_unloaded_is_never_said_before_the_exit(rig):
    commands = rig.draining() + rig.scheduler.on_drained(1, USAGE, 3.0) + rig.scheduler.on_tick(99.0)
    assert "unloaded" not in [e.type for e in events(commands)]
    assert [e.type for e in events(rig.scheduler.on_exited(1, exit_status(0), "", 100.0))] == ["unloaded"]


def test_event_without_a_gpu_and_with_one(rig):
    rig.loading()
    s = rig.scheduler
    (emit, *_) = s.on_ready(ready(), Usage(10, 5, 2048), 1.0)
    assert isinstance(emit, Emit)
    assert (emit.event.rss, emit.event.gpu, emit.event.at) == (10, 2048, 1_000_001.0)
    assert DESCRIPTION.inputs[0].name == "x"


# --- whether a load may be wanted soon ---------------------------------------------------------------------


def test_a_proxy_is_live_until_it_is_closed_also_while_its_model_is_unloaded(rig):
    s = rig.scheduler
    assert not s.is_used
    rig.loading()
    rig.ready()
    rig.crash(9.0, 1)
    assert s.is_used, "its lease ended with the worker"
    s.on_release(A, 1, 10.0)
    assert not s.is_used


def test_proxies_of_a_client_that_is_gone_are_not_live(rig):
    s = rig.scheduler
    rig.loading()
    rig.ready()
    rig.crash(9.0, 1)
    s.on_client_gone(B, 10.0)
    assert s.is_used
    s.on_client_gone(A, 10.0)
    assert not s.is_used
