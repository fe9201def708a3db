"""The scheduler under a memory limit: facts and times in, commands out."""

from __future__ import annotations

import signal

import msgspec
import pytest

from onnx_dl.core.lifecycle import ModelState
from onnx_dl.core.status import Usage
from onnx_dl.errors import CapacityError, WorkerDied
from onnx_dl.protocol import control as m
from onnx_dl.protocol import failures
from onnx_dl.supervisor.policy import eviction
from onnx_dl.supervisor.policy.commands import ForgetPeak, Remember, SendToWorker, StartWorker
from onnx_dl.supervisor.policy.measuring import Sample
from onnx_dl.supervisor.policy.memory_amount import MemoryAmount
from onnx_dl.supervisor.policy.requirements import Peak, Requirement
from onnx_dl.supervisor.policy.scheduler import Scheduler
from onnx_dl.supervisor.processes.worker_process import exit_status
from onnx_dl.transport.gauges import Reading
from tests.support.builders import SETTINGS, A, B, acquire, events, failed, kill, order, ready, starts, told

MB = 1 << 20


def usage(mb: int) -> Usage:
    return Usage(rss=mb * MB, private=mb * MB, pss=mb * MB)


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(msgspec.structs.replace(SETTINGS, memory_limit=100 * MB, room_timeout=30.0))


def load(scheduler: Scheduler, key: str, worker_id: int, mb: int, now: float, **terms: object) -> None:
    """A model whose worker becomes ready and takes so much."""
    ask = acquire(worker_id, worker_id, key=key, **terms)
    assert [c for c in scheduler.on_acquire(A, ask, now) if isinstance(c, StartWorker)]
    scheduler.on_ready(ready(worker_id), usage(mb), now)


def idle(mb: int, last_used: float, runs: int = 1) -> Sample:
    return Sample(usage(mb), Reading(runs=runs, last_used=last_used))


def denied(commands: list) -> CapacityError:
    (message,) = told(commands, m.Denied)
    error = failures.rebuild(message.failure)
    assert isinstance(error, CapacityError)
    return error


def test_an_idle_model_makes_way(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 80, 0.0)
    assert scheduler.on_acquire(A, acquire(2, 2, key="b"), 10.0) == []
    assert scheduler.next_deadline() == 10.0 and scheduler.wants_look(10.0)
    assert scheduler.on_tick(10.0, {1: idle(80, 1.0)}) == [order(1, m.DrainIfIdle())]
    assert not starts(scheduler.on_draining(1, usage(80), 10.0, "evicted"))
    assert not starts(scheduler.on_drained(1, usage(80), 10.0))
    commands = scheduler.on_exited(1, exit_status(0), "", 10.1)  # only a worker that is reaped has made room
    assert [c.spec.key for c in commands if isinstance(c, StartWorker)] == ["b"]
    assert not scheduler.wants_look(99.0)


def test_a_model_in_use_is_looked_at_again_until_it_is_idle(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 80, 0.0)
    scheduler.on_acquire(A, acquire(2, 2, key="b"), 10.0)
    assert scheduler.on_tick(10.0, {1: Sample(usage(80), Reading(busy=1, last_used=9.0))}) == []
    at = scheduler.next_deadline()
    assert at is not None and at == pytest.approx(10.05) and not scheduler.wants_look(10.04)
    assert scheduler.on_tick(at, {1: idle(80, at)}) == [order(1, m.DrainIfIdle())]


def test_one_that_was_not_used_yet_stays(scheduler: Scheduler) -> None:
    """Who asked for it must get its call."""
    load(scheduler, "a", 1, 80, 0.0)
    scheduler.on_acquire(A, acquire(2, 2, key="b"), 10.0)
    assert scheduler.on_tick(10.0, {1: Sample(usage(80))}) == []


@pytest.mark.parametrize(("took", "stays"), [(0.1, 0.2), (0.25, 0.5), (9.0, 0.5)])
def test_one_that_has_just_come_stays_a_moment(scheduler: Scheduler, took: float, stays: float) -> None:
    """While it is in use: twice as long as its load took, and half a second at most."""
    scheduler.on_acquire(A, acquire(1, 1, key="a"), 0.0)
    scheduler.on_ready(ready(1), usage(80), took)
    early, late = took + stays - 0.01, took + stays
    scheduler.on_acquire(A, acquire(2, 2, key="b"), early)
    assert scheduler.on_tick(early, {1: idle(80, early)}) == []
    assert scheduler.next_deadline() == pytest.approx(late)
    assert scheduler.on_tick(late, {1: idle(80, late)}) == [order(1, m.DrainIfIdle())]


def test_one_that_has_just_come_and_is_used_no_more_leaves(scheduler: Scheduler) -> None:
    """After a pause of a quarter of its load's duration."""
    scheduler.on_acquire(A, acquire(1, 1, key="a"), 0.0)
    scheduler.on_ready(ready(1), usage(80), 0.2)
    scheduler.on_acquire(A, acquire(2, 2, key="b"), 0.22)
    assert scheduler.on_tick(0.22, {1: idle(80, 0.21)}) == []
    at = scheduler.next_deadline()
    assert at == pytest.approx(0.26)
    assert scheduler.on_tick(0.261, {1: idle(80, 0.21)}) == [order(1, m.DrainIfIdle())]


def test_the_model_that_is_used_more_often_stays(scheduler: Scheduler) -> None:
    """Also if another one was used after it."""
    load(scheduler, "a", 1, 40, 0.0)
    load(scheduler, "b", 2, 40, 1.0)
    scheduler.on_acquire(A, acquire(3, 3, key="c"), 10.0)
    busy = {worker: Sample(usage(40), Reading(busy=1, last_used=at)) for worker, at in ((1, 9.0), (2, 1.5))}
    assert scheduler.on_tick(10.0, busy) == []  # "a" was used after the last load, too
    assert scheduler.on_tick(10.1, {1: idle(40, 10.01), 2: idle(40, 10.09)}) == [order(2, m.DrainIfIdle())]


def test_one_that_is_idle_no_more_when_it_hears_of_it(scheduler: Scheduler) -> None:
    """It says nothing; it is looked at again, and its TTL is its TTL."""
    load(scheduler, "a", 1, 80, 0.0)
    scheduler.on_acquire(A, acquire(2, 2, key="b"), 10.0)
    assert scheduler.on_tick(10.0, {1: idle(80, 1.0)}) == [order(1, m.DrainIfIdle())]
    at = scheduler.next_deadline() or 0.0
    assert at > 10.0
    assert scheduler.on_tick(at, {1: Sample(usage(80), Reading(busy=1, last_used=at))}) == []
    scheduler.on_draining(1, usage(80), at)
    (status,) = [s for s in scheduler.snapshot(at) if s.key == "a"]
    assert status.state is ModelState.DRAINING


def test_one_that_was_pinned_stays(scheduler: Scheduler) -> None:
    """However long it was idle."""
    load(scheduler, "a", 1, 40, 0.0)
    load(scheduler, "c", 2, 40, 0.0)
    scheduler.on_acquire(A, msgspec.structs.replace(acquire(3, 3, key="b"), file_bytes=10 * MB), 10.0)
    scheduler.on_acquire(A, acquire(4, 4, key="a", pin=True), 10.0)
    assert scheduler.on_tick(10.0, {1: idle(40, 1.0), 2: idle(40, 9.9)}) == [order(2, m.DrainIfIdle())]


def test_nobody_waits_for_ever(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 80, 0.0)  # somebody uses it all the time
    assert scheduler.on_acquire(A, acquire(2, 2, key="b"), 10.0) == []
    error = denied(scheduler.on_tick(40.0))
    assert "did not become free within 30 seconds" in str(error)
    assert (error.limit, error.in_use) == (100 * MB, 80 * MB)
    assert scheduler.next_deadline() is None
    assert [s.key for s in scheduler.snapshot(40.0)] == ["a"]


def test_a_guess_does_not_count_on_what_pinned_models_hold(scheduler: Scheduler) -> None:
    """What may fit beside them is tried."""
    load(scheduler, "a", 1, 50, 0.0, pin=True)
    ask = msgspec.structs.replace(acquire(2, 2, key="b"), file_bytes=10 * MB)
    assert eviction.guess(10 * MB).likely.ram > 50 * MB
    assert [c.spec.key for c in scheduler.on_acquire(A, ask, 1.0) if isinstance(c, StartWorker)] == ["b"]
    assert taken(scheduler, 1.0) == 100


def test_what_can_never_fit(scheduler: Scheduler) -> None:
    ask = msgspec.structs.replace(acquire(1), file_bytes=100 * MB)
    error = denied(scheduler.on_acquire(A, ask, 0.0))
    assert error.needed > error.limit
    assert not scheduler.snapshot(0.0)


def test_loads_in_progress_count(scheduler: Scheduler) -> None:
    ask = msgspec.structs.replace(acquire(1, 1, key="a"), file_bytes=20 * MB)
    assert starts(scheduler.on_acquire(A, ask, 0.0))
    assert not starts(scheduler.on_acquire(A, acquire(2, 2, key="b"), 0.0))
    commands = scheduler.on_ready(ready(1), usage(30), 0.5)
    assert starts(commands) == 1 or [c for c in commands if isinstance(c, StartWorker)]


def test_who_came_first_is_served_first(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 80, 0.0)
    scheduler.on_acquire(A, acquire(2, 2, key="b"), 1.0)
    scheduler.on_acquire(A, acquire(3, 3, key="c"), 2.0)
    commands = scheduler.on_release(A, 1, 3.0)  # who used it has gone: it drains
    assert order(1, m.Drain()) in commands
    scheduler.on_drained(1, usage(80), 3.0)
    commands = scheduler.on_exited(1, exit_status(0), "", 3.0)
    assert [c.spec.key for c in commands if isinstance(c, StartWorker)] == ["b", "c"]


def test_who_waits_may_go(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 80, 0.0)
    scheduler.on_acquire(A, acquire(2, 2, key="b"), 1.0)
    scheduler.on_release(A, 2, 2.0)
    assert [s.key for s in scheduler.snapshot(2.0)] == ["a"]
    assert scheduler.next_deadline() is None


def test_what_was_measured_counts_the_next_time(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 95, 0.0)
    scheduler.on_draining(1, usage(95), 1.0)
    scheduler.on_drained(1, usage(95), 1.0)
    scheduler.on_exited(1, exit_status(0), "", 1.0)
    load(scheduler, "b", 2, 10, 2.0, pin=True)
    assert not [c for c in scheduler.on_acquire(A, acquire(3, 3, key="a"), 3.0) if isinstance(c, StartWorker)]


def test_a_host_that_closes_denies_who_waits(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 80, 0.0)
    scheduler.on_acquire(A, acquire(2, 2, key="b"), 1.0)
    commands = scheduler.on_shutdown(A, m.Shutdown(ticket=9), 2.0)
    assert [message.ticket for message in told(commands, m.Denied)] == [2]


@pytest.mark.parametrize(
    ("limit", "memory", "needed", "fits"),
    [(None, None, 10_000, True), (None, 100, 79, True), (None, 100, 81, False), (90 * MB, 10, 89, True)],
)
def test_the_limit_is_a_share_of_the_machine_unless_it_was_set(
    limit: int | None, memory: int | None, needed: int, fits: bool
) -> None:
    settings = msgspec.structs.replace(SETTINGS, memory_limit=limit)
    scheduler = Scheduler(settings, 0.0, memory and memory * MB)
    file_bytes = needed * MB - eviction.BASE
    commands = scheduler.on_acquire(A, msgspec.structs.replace(acquire(1), file_bytes=file_bytes), 0.0)
    assert [isinstance(c, StartWorker) for c in commands][:1] == [fits]


# --- whose time is up ------------------------------------------------------------------------------------


def ask(ticket: int, key: str, mb: int, **terms: object) -> m.Acquire:
    """For a model of so many MB."""
    return msgspec.structs.replace(acquire(ticket, ticket, key=key, **terms), file_bytes=mb * MB)


def busy(mb: int) -> Sample:
    return Sample(usage(mb), Reading(runs=1, busy=1, last_used=1.0))


@pytest.fixture
def crowded() -> Scheduler:
    """119 of 450 MB are in use all the time, one of 416 MB waits for 3 s, and four of 12 behind it."""
    scheduler = Scheduler(msgspec.structs.replace(SETTINGS, memory_limit=450 * MB, room_timeout=3.0))
    load(scheduler, "used", 1, 119, 0.0)
    assert not starts(scheduler.on_acquire(A, ask(2, "large", 384), 10.0))
    for ticket in range(3, 7):
        assert not starts(scheduler.on_acquire(A, ask(ticket, f"small{ticket}", 12), 10.0 + ticket / 100))
    return scheduler


@pytest.mark.parametrize("late", [0.0, 0.049, 0.5, 20.0])
def test_those_behind_who_fit_are_not_refused_with_the_first(crowded: Scheduler, late: float) -> None:
    """However late the loop is."""
    assert crowded.on_tick(12.99, {1: busy(119)}) == []
    commands = crowded.on_tick(13.0 + late, {1: busy(119)})
    assert [message.ticket for message in told(commands, m.Denied)] == [2]
    assert [c.spec.key for c in starts(commands)] == [f"small{ticket}" for ticket in range(3, 7)]


def test_those_behind_who_fit_no_longer_wait_on(crowded: Scheduler) -> None:
    """What was just measured counts, not what was known before."""
    commands = crowded.on_tick(13.0, {1: busy(380)})
    assert [message.ticket for message in told(commands, m.Denied)] == [2]
    assert [c.spec.key for c in starts(commands)] == ["small3"], "70 MB are left, and each takes 58.4"


def test_who_is_first_then_gets_a_chance(crowded: Scheduler) -> None:
    """A second, for somebody to make way; then those behind it who fit load all the same."""
    crowded.on_release(A, 3, 11.0)
    crowded.on_acquire(A, ask(7, "other", 380), 11.0)
    for ticket in range(4, 7):
        crowded.on_release(A, ticket, 11.0)
    crowded.on_acquire(A, ask(8, "tiny", 1), 11.0)
    commands = crowded.on_tick(14.5, {1: busy(119)})
    assert [message.ticket for message in told(commands, m.Denied)] == [2] and not starts(commands)
    assert not told(crowded.on_tick(15.4, {1: busy(119)}), m.Denied)
    commands = crowded.on_tick(15.5, {1: busy(119)})
    assert [message.ticket for message in told(commands, m.Denied)] == [7]
    assert [c.spec.key for c in starts(commands)] == ["tiny"]


def test_who_waits_first_from_the_beginning_waits_no_longer(crowded: Scheduler) -> None:
    assert crowded.admission.next_deadline() is not None
    assert told(crowded.on_tick(13.0, {1: busy(119)}), m.Denied)


def test_all_who_wait_for_one_model_are_told_together(crowded: Scheduler) -> None:
    crowded.on_acquire(B, ask(9, "large", 384), 12.9)
    assert [d.ticket for d in told(crowded.on_tick(13.0, {1: busy(119)}), m.Denied)] == [2, 9]


def test_without_patience_who_fits_loads_all_the_same() -> None:
    scheduler = Scheduler(msgspec.structs.replace(SETTINGS, memory_limit=450 * MB, room_timeout=0.0))
    load(scheduler, "used", 1, 119, 0.0)
    scheduler.on_acquire(A, ask(2, "large", 384), 10.0)
    scheduler.on_acquire(A, ask(3, "small", 12), 10.0)
    commands = scheduler.on_tick(10.0, {1: busy(119)})
    assert told(commands, m.Denied) and starts(commands)


# --- what will never fit ---------------------------------------------------------------------------------


def test_what_pinned_models_leave_no_room_for_is_refused_at_once(crowded: Scheduler) -> None:
    load_pinned = ask(10, "used", 0, pin=True)
    crowded.on_acquire(A, load_pinned, 11.0)
    (error, *_) = [
        failures.rebuild(message.failure)
        for message in told(crowded.on_tick(11.05, {1: busy(119)}), m.Denied)
    ]
    assert isinstance(error, CapacityError)
    assert (error.needed, error.limit, error.in_use) == (416 * MB, 450 * MB, 119 * MB)
    assert "more than pinned models leave of the limit of 471.9 MB (they hold 124.8 MB; " in str(error)


def test_it_is_refused_behind_others_too(scheduler: Scheduler) -> None:
    load(scheduler, "pinned", 1, 50, 0.0, pin=True)
    load(scheduler, "used", 2, 30, 0.0)
    assert scheduler.on_acquire(A, ask(3, "waits", 10), 1.0) == []
    assert "pinned models" in str(denied(scheduler.on_acquire(A, ask(4, "never", 30), 1.0)))


def test_runs_of_pinned_models_refuse_nobody_for_ever(scheduler: Scheduler) -> None:
    """What they took once may be free again."""
    load(scheduler, "pinned", 1, 20, 0.0, pin=True)
    scheduler.on_measured(1, Sample(peaked(20, 90), Reading(runs=1)), 1.0)
    assert scheduler.on_acquire(A, ask(2, "waits", 10), 2.0) == []
    assert "did not become free" in str(denied(scheduler.on_tick(32.0, {1: busy(20)})))


# --- what is measured ------------------------------------------------------------------------------------


def peaked(mb: int, peak: int, gpu: int | None = None) -> Usage:
    return Usage(
        rss=mb * MB, private=mb * MB, pss=mb * MB, peak=peak * MB, gpu=None if gpu is None else gpu * MB
    )


def leave(scheduler: Scheduler, worker_id: int, last: Usage, now: float, runs: int = 1) -> list:
    """A worker that was ready drains and is reaped."""
    scheduler.on_draining(worker_id, last, now)
    scheduler.on_drained(worker_id, last, now)
    return scheduler.on_exited(worker_id, exit_status(0), "", now, runs=runs)


def remembered(commands: list) -> list[Requirement]:
    return [command.requirement for command in commands if isinstance(command, Remember)]


def taken(scheduler: Scheduler, now: float) -> int:
    """MB that count."""
    return scheduler.in_use(now).ram // MB


def test_a_model_that_is_ready_counts_as_much_as_its_runs_are_known_to_take(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 30, 0.0)
    assert taken(scheduler, 1.0) == 30
    scheduler.on_measured(1, Sample(peaked(30, 70), Reading(runs=1)), 1.0)
    assert taken(scheduler, 1.0) == 70
    scheduler.on_measured(1, Sample(peaked(35, 40), Reading(runs=2)), 2.0)
    assert taken(scheduler, 2.0) == 70
    assert scheduler.on_acquire(A, acquire(2, 2, key="b"), 3.0) == []  # 30 + 38 would fit, 70 + 38 do not


def test_the_mark_is_set_back_once_the_peak_of_the_load_is_known(scheduler: Scheduler) -> None:
    scheduler.on_acquire(A, acquire(1), 0.0)
    commands = scheduler.on_ready(ready(1), peaked(30, 60), 1.0)
    assert ForgetPeak(1) in commands
    assert remembered(commands) == [
        Requirement(load=Peak(60 * MB), steady=MemoryAmount(30 * MB), peak=MemoryAmount(30 * MB), at=1.0)
    ]
    assert taken(scheduler, 1.0) == 30  # its load is over


def test_an_extraordinary_run_does_not_keep_others_out_for_ever(scheduler: Scheduler) -> None:
    """After 30 seconds with runs, half of what these did not take is free; runs there must have been."""
    load(scheduler, "a", 1, 30, 0.0, pin=True)
    assert scheduler.on_measured(1, Sample(peaked(30, 500), Reading(runs=1)), 1.0) == []
    assert taken(scheduler, 1.0) == 100  # not more than there is, or nothing could be loaded beside it
    assert scheduler.on_measured(1, Sample(peaked(30, 500), Reading(runs=1)), 31.0) == [ForgetPeak(1)]
    counted = []
    for turn in range(2, 8):
        at = 31.0 * turn
        assert scheduler.on_measured(1, Sample(peaked(30, 40), Reading(runs=turn)), at) == [ForgetPeak(1)]
        assert scheduler.on_measured(1, Sample(None, Reading(runs=turn)), at + 30.5) == []
        counted.append(taken(scheduler, at))
    assert counted == [100, 100, 97, 68, 54, 47]


def test_what_was_not_measured_again_is_not_counted_again(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 30, 0.0)
    scheduler.on_measured(1, Sample(peaked(30, 80), Reading(runs=1)), 1.0)
    scheduler.on_measured(1, Sample(peaked(30, 30), Reading(runs=2)), 31.0)
    before = taken(scheduler, 31.0)
    for at in (40.0, 80.0, 120.0):
        assert scheduler.on_measured(1, Sample(None, Reading(runs=2)), at) == []
    assert taken(scheduler, 120.0) == before


def test_what_a_life_told_is_remembered_at_its_end(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 30, 0.0)
    scheduler.on_measured(1, Sample(peaked(30, 70), Reading(runs=1)), 1.0)
    (need,) = remembered(leave(scheduler, 1, peaked(30, 70), 2.0))
    assert (need.load.nbytes, need.steady.ram, need.peak.ram, need.at) == (30 * MB, 30 * MB, 70 * MB, 2.0)
    load(scheduler, "a", 2, 30, 3.0)
    assert remembered(leave(scheduler, 2, peaked(30, 70), 4.0)) == []  # nothing new
    load(scheduler, "a", 3, 30, 5.0)
    assert remembered(leave(scheduler, 3, peaked(30, 30), 6.0, runs=0)) == []  # it was never run
    load(scheduler, "a", 4, 30, 7.0)
    (need,) = remembered(leave(scheduler, 4, peaked(30, 50), 8.0))
    assert need.peak.ram == 60 * MB


def test_a_crash_tells_nothing_of_the_last_runs(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 30, 0.0)
    scheduler.on_measured(1, Sample(peaked(30, 70), Reading(runs=1)), 1.0)
    (need,) = remembered(scheduler.on_exited(1, exit_status(signal.SIGSEGV), "", 2.0, runs=5))
    assert need.peak.ram == 70 * MB


def test_what_earlier_hosts_measured_counts_at_the_first_load() -> None:
    known = {"a": Requirement(load=Peak(90 * MB), steady=MemoryAmount(10 * MB), peak=MemoryAmount(10 * MB))}
    settings = msgspec.structs.replace(SETTINGS, memory_limit=100 * MB)
    scheduler = Scheduler(settings, known=known.get)
    load(scheduler, "b", 1, 20, 0.0)
    assert not starts(scheduler.on_acquire(A, acquire(2, 2, key="a"), 1.0))
    scheduler = Scheduler(settings)
    load(scheduler, "b", 1, 20, 0.0)
    assert starts(scheduler.on_acquire(A, acquire(2, 2, key="a"), 1.0))


# --- loads that run out of memory ------------------------------------------------------------------------


@pytest.fixture(params=[None, 1000 * MB])
def roomy(request: pytest.FixtureRequest) -> Scheduler:
    """With a limit that is too high to help, or none."""
    return Scheduler(msgspec.structs.replace(SETTINGS, memory_limit=request.param, room_timeout=30.0))


KILLED = exit_status(signal.SIGKILL)


def test_a_load_that_ran_out_of_memory_is_tried_once_more_when_others_are_gone(roomy: Scheduler) -> None:
    load(roomy, "idle", 1, 30, 0.0)
    load(roomy, "busy", 2, 30, 0.0)
    load(roomy, "pinned", 3, 30, 0.0, pin=True)
    assert starts(roomy.on_acquire(A, acquire(4, 4, key="m"), 1.0))
    commands = roomy.on_exited(4, KILLED, "", 2.0)
    assert [(e.type, e.retry_after) for e in events(commands)] == [("failed", 0.0)]
    assert "memory" in (events(commands)[0].detail or "")
    assert not told(commands, m.Denied) and not starts(commands)
    assert roomy.wants_look(2.0)
    busy = Sample(usage(30), Reading(busy=1, last_used=1.9))
    seen = {1: idle(30, 1.0), 2: busy, 3: idle(30, 0.5)}
    assert roomy.on_tick(2.0, seen) == [order(1, m.DrainIfIdle())]
    roomy.on_draining(1, usage(30), 2.01, "evicted")
    assert roomy.on_tick(2.05, {2: busy, 3: idle(30, 0.5)}) == []  # until it is reaped
    roomy.on_drained(1, usage(30), 2.06)
    commands = roomy.on_exited(1, exit_status(0), "", 2.07)
    commands += roomy.on_tick(2.1, {2: busy, 3: idle(30, 0.5)})
    assert [c.spec.key for c in starts(commands)] == ["m"]
    roomy.on_spawned(5, 105)
    assert told(roomy.on_ready(ready(5), usage(30), 3.0), m.Granted)


def test_the_second_time_it_is_answered(roomy: Scheduler) -> None:
    roomy.on_acquire(A, acquire(1), 0.0)
    roomy.on_load_failed(failed(1, MemoryError("std::bad_alloc")), 1.0)
    assert not told(roomy.on_exited(1, exit_status(0), "", 1.0), m.Denied)
    assert starts(roomy.on_tick(1.0, {}))
    roomy.on_load_failed(failed(2, MemoryError("std::bad_alloc")), 2.0)
    commands = roomy.on_exited(2, exit_status(0), "", 2.0)
    (message,) = told(commands, m.Denied)
    assert isinstance(failures.rebuild(message.failure), MemoryError)
    assert not starts(commands)
    (status,) = roomy.snapshot(2.0)
    assert (status.failures, status.retry_after) == (1, 0.0)  # of which one came of it


def test_who_asks_again_gets_two_tries_again(roomy: Scheduler) -> None:
    test_the_second_time_it_is_answered(roomy)
    assert starts(roomy.on_acquire(A, acquire(3), 3.0))
    assert not told(roomy.on_exited(3, KILLED, "", 4.0), m.Denied)
    assert starts(roomy.on_tick(4.0, {}))


def test_who_comes_after_all_who_waited_have_gone_gets_two_tries(roomy: Scheduler) -> None:
    load(roomy, "busy", 1, 30, 0.0)
    roomy.on_acquire(A, acquire(2, 2), 0.0)
    roomy.on_exited(2, KILLED, "", 1.0)
    roomy.on_release(A, 2, 1.0)
    assert starts(roomy.on_acquire(A, acquire(3, 3), 2.0))
    assert not told(roomy.on_exited(3, KILLED, "", 3.0), m.Denied)


def test_who_asks_meanwhile_waits_too(roomy: Scheduler) -> None:
    load(roomy, "busy", 1, 30, 0.0)
    roomy.on_acquire(A, acquire(2, 2), 0.0)
    roomy.on_exited(2, KILLED, "", 1.0)
    assert roomy.on_acquire(B, acquire(3, 3), 1.0) == []
    assert starts(roomy.on_tick(1.0, {1: Sample(usage(30), Reading(busy=1, last_used=0.5))}))
    roomy.on_spawned(3, 103)
    assert len(told(roomy.on_ready(ready(3), usage(30), 2.0), m.Granted)) == 2


@pytest.mark.parametrize("status", [int(signal.SIGSEGV), 70 << 8])
def test_other_deaths_are_answered_at_once(roomy: Scheduler, status: int) -> None:
    roomy.on_acquire(A, acquire(1), 0.0)
    assert told(roomy.on_exited(1, exit_status(status), "", 1.0), m.Denied)


def test_a_load_that_we_ended_is_answered_at_once(roomy: Scheduler) -> None:
    roomy.on_acquire(A, acquire(1), 0.0)
    roomy.on_tick(SETTINGS.load_timeout)
    assert told(roomy.on_exited(1, KILLED, "", SETTINGS.load_timeout), m.Denied)


def test_a_load_that_took_more_than_it_may_is_answered_at_once(roomy: Scheduler) -> None:
    """More room would not help it."""
    roomy.on_acquire(A, acquire(1), 0.0)
    assert told(roomy.on_exited(1, KILLED, "", 1.0, 90 * MB), m.Denied)


def test_nobody_waits_for_a_second_try_for_ever(roomy: Scheduler) -> None:
    load(roomy, "stays", 1, 30, 0.0)
    roomy.on_acquire(A, acquire(2, 2), 1.0)
    roomy.on_exited(2, KILLED, "", 2.0)
    seen = {1: idle(30, 0.5)}
    assert roomy.on_tick(2.0, seen) == [order(1, m.DrainIfIdle())]
    (message,) = told(roomy.on_tick(32.0, seen), m.Denied)
    assert isinstance(failures.rebuild(message.failure), WorkerDied)


def test_a_model_that_ran_out_of_memory_needs_more_than_was_thought(scheduler: Scheduler) -> None:
    ask = msgspec.structs.replace(acquire(1, 1, key="a"), file_bytes=10 * MB)  # 54 of 100
    scheduler.on_acquire(A, ask, 0.0)
    scheduler.on_exited(1, KILLED, "", 1.0)
    assert starts(scheduler.on_tick(1.0, {}))
    assert taken(scheduler, 1.0) == 81
    scheduler.on_spawned(2, 102)
    scheduler.on_ready(ready(2), usage(30), 2.0)
    assert taken(scheduler, 2.0) == 30  # now it is known


# --- GPU memory ------------------------------------------------------------------------------------------

CUDA = ["CUDAExecutionProvider"]


def on_gpu(ticket: int, key: str, mb: int = 0) -> m.Acquire:
    ask = msgspec.structs.replace(acquire(ticket, ticket, key=key), file_bytes=mb * MB)
    return msgspec.structs.replace(ask, spec=msgspec.structs.replace(ask.spec, providers=CUDA))


def told_to_load(commands: list) -> list[m.Load]:
    return [c.message for c in commands if isinstance(c, SendToWorker) and isinstance(c.message, m.Load)]


@pytest.fixture
def gpus() -> Scheduler:
    return Scheduler(msgspec.structs.replace(SETTINGS, gpu_memory_limit=1000 * MB, room_timeout=30.0))


def test_gpu_memory_is_a_kind_of_its_own(gpus: Scheduler) -> None:
    assert starts(gpus.on_acquire(A, on_gpu(1, "a", 20), 0.0))
    assert gpus.in_use(0.0).gpu == eviction.GPU_BASE + 30 * MB  # a context and one and a half times its files
    gpus.on_spawned(1, 101)
    gpus.on_ready(ready(1), peaked(30, 30, gpu=700), 1.0)
    assert gpus.in_use(1.0).gpu == 700 * MB
    assert not starts(gpus.on_acquire(A, on_gpu(2, "b", 10), 2.0))
    assert starts(gpus.on_acquire(A, acquire(3, 3, key="cpu"), 2.0)) == []  # who came first is served first
    commands = gpus.on_tick(2.0, {1: Sample(peaked(30, 30, gpu=700), Reading(runs=1, last_used=1.0))})
    assert commands == [order(1, m.DrainIfIdle())]


def test_a_model_without_a_gpu_needs_none(gpus: Scheduler) -> None:
    load(gpus, "a", 1, 30, 0.0)
    assert gpus.in_use(0.0).gpu == 0


def test_gpu_memory_comes_back_later_than_its_process(gpus: Scheduler) -> None:
    gpus.on_acquire(A, on_gpu(1, "a"), 0.0)
    gpus.on_spawned(1, 101)
    gpus.on_ready(ready(1), peaked(30, 30, gpu=800), 0.0)
    leave(gpus, 1, peaked(30, 30, gpu=800), 10.0)
    assert gpus.in_use(10.0) == MemoryAmount(0, 800 * MB, {0: 800 * MB})
    assert not starts(gpus.on_acquire(A, on_gpu(2, "b"), 10.0))
    assert gpus.lingering_pids(10.0) == {1: 101}
    gpus.on_tick(10.0, {1: Sample(Usage(gpu=800 * MB))})  # its process starts, see test_early_starts.py
    gpus.on_spawned(2, 102)
    assert not told_to_load(gpus.on_started(2))
    assert told_to_load(gpus.on_tick(10.05, {1: Sample(Usage())}))  # the driver shows it no more


def test_what_never_fits_on_the_gpu_is_told(gpus: Scheduler) -> None:
    """Also at its first load, which cannot be weighed on the way."""
    gpus.on_acquire(A, on_gpu(1, "a"), 0.0)
    gpus.on_spawned(1, 101)
    commands = gpus.on_ready(ready(1), peaked(30, 30, gpu=1200), 0.0)
    assert kill(1) in commands and not told(commands, m.Granted)
    errors = [denied(gpus.on_exited(1, KILLED, "", 5.0)), denied(gpus.on_acquire(A, on_gpu(2, "a"), 10.0))]
    for error in errors:
        assert (error.resource, error.needed, error.limit) == ("gpu memory", 1200 * MB, 1000 * MB)


def test_the_limit_is_a_share_of_the_gpus_unless_it_was_set(gpus: Scheduler) -> None:
    gpus.know_gpus(10 * MB)
    assert gpus.gpu_memory_limit == 1000 * MB
    scheduler = Scheduler(SETTINGS)
    assert scheduler.gpu_memory_limit is None
    scheduler.know_gpus(1000 * MB)
    assert scheduler.gpu_memory_limit == 800 * MB
    scheduler.know_gpus(None)
    assert scheduler.gpu_memory_limit is None


# --- thrashing -------------------------------------------------------------------------------------------


def test_models_that_push_each_other_out_are_told_of() -> None:
    scheduler = Scheduler(msgspec.structs.replace(SETTINGS, memory_limit=100 * MB))
    told_of, worker_id, now = [], 0, 0.0
    for turn in range(6):
        key, worker_id, now = "ab"[turn % 2], worker_id + 1, now + 2.0
        scheduler.on_acquire(A, acquire(worker_id, worker_id, key=key), now)
        if turn:
            scheduler.on_tick(now, {worker_id - 1: idle(80, now - 1.0)})
            scheduler.on_draining(worker_id - 1, usage(80), now, "evicted")
            scheduler.on_drained(worker_id - 1, usage(80), now)
            scheduler.on_exited(worker_id - 1, exit_status(0), "", now)
        scheduler.on_spawned(worker_id, 100 + worker_id)
        commands = scheduler.on_ready(ready(worker_id), usage(80), now + 1.0)
        told_of += [event for event in events(commands) if event.type == "thrash"]
    (event,) = told_of
    assert (event.model, event.worker_id) == ("b.onnx", 6)
    assert (
        "a.onnx, b.onnx were evicted for other models and loaded again 4 times within 30 s, which took 13% of"
        in (event.detail or "")
    )


# --- a limit that is lowered ------------------------------------------------------------------------------


def lowered(scheduler: Scheduler, mb: int, now: float) -> None:
    settings = msgspec.structs.replace(scheduler.limits.settings, memory_limit=mb * MB)
    assert scheduler.on_configured(settings, {}, {}, now) == []


def test_a_lowered_limit_waits_for_a_model_that_is_busy(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 80, 0.0)
    lowered(scheduler, 50, 10.0)
    busy = Sample(usage(80), Reading(busy=1, last_used=9.0))
    pauses = []
    at = 10.0
    for _ in range(8):
        assert scheduler.wants_look(at) and scheduler.on_tick(at, {1: busy}) == []
        following = scheduler.next_deadline()
        assert following is not None
        pauses.append(following - at)
        at = following
    assert pauses == sorted(pauses) and pauses[0] == pytest.approx(0.05) and pauses[-1] == pytest.approx(1)
    assert scheduler.on_tick(at, {1: idle(80, at)}) == [order(1, m.DrainIfIdle())]
    scheduler.on_draining(1, usage(80), at, "evicted")
    scheduler.on_exited(1, exit_status(0), "", at)
    scheduler.on_tick(at + 1, {})
    assert not scheduler.wants_look(at + 99)


def test_nothing_makes_it_forget_a_lowered_limit(scheduler: Scheduler) -> None:
    """Each of these facts decides about pending loads, and finds none."""
    load(scheduler, "b", 2, 5, 0.0)
    load(scheduler, "a", 1, 80, 0.0)
    lowered(scheduler, 50, 10.0)
    scheduler.on_exited(2, exit_status(-signal.SIGKILL), "", 10.0)
    scheduler.on_client_gone(B, 10.0)
    assert scheduler.on_tick(10.0, {1: idle(80, 9.0)}) == [order(1, m.DrainIfIdle())]


def test_a_limit_that_is_raised_again_lets_models_stay(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 80, 0.0)
    lowered(scheduler, 50, 10.0)
    scheduler.on_tick(10.0, {1: Sample(usage(80))})
    lowered(scheduler, 100, 10.02)
    assert scheduler.on_tick(10.02, {1: idle(80, 10.01)}) == []
    assert not scheduler.wants_look(99.0)
