"""The scheduler under a memory limit: facts and times in, commands out."""

from __future__ import annotations

import msgspec
import pytest

from onnx_dl.errors import CapacityError
from onnx_dl.lifecycle import ModelState
from onnx_dl.model import Usage
from onnx_dl.supervisor import room
from onnx_dl.supervisor.admission import Seen
from onnx_dl.supervisor.commands import StartWorker
from onnx_dl.supervisor.scheduler import Scheduler
from onnx_dl.transport import failures
from onnx_dl.transport import messages as m
from onnx_dl.transport.gauges import Reading
from tests.unit.builders import SETTINGS, A, acquire, order, ready, starts, told

MB = 1 << 20


def usage(mb: int) -> Usage:
    return Usage(rss=mb * MB, private=mb * MB, pss=mb * MB)


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(msgspec.structs.replace(SETTINGS, memory_limit="100MiB", room_timeout=30.0))


def load(scheduler: Scheduler, key: str, worker_id: int, mb: int, now: float, **terms: object) -> None:
    """A model whose worker becomes ready and takes so much."""
    ask = msgspec.structs.replace(acquire(worker_id, worker_id, key=key), **terms)
    assert [c for c in scheduler.on_acquire(A, ask, now) if isinstance(c, StartWorker)]
    scheduler.on_ready(ready(worker_id), usage(mb), now)


def idle(mb: int, last_used: float, runs: int = 1) -> Seen:
    return Seen(usage(mb), Reading(runs=runs, last_used=last_used))


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
    commands = scheduler.on_exited(1, 0, "", 10.1)  # only a worker that is reaped has made room
    assert [c.spec.key for c in commands if isinstance(c, StartWorker)] == ["b"]
    assert not scheduler.wants_look(99.0)


def test_a_model_in_use_is_looked_at_again_until_it_is_idle(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 80, 0.0)
    scheduler.on_acquire(A, acquire(2, 2, key="b"), 10.0)
    assert scheduler.on_tick(10.0, {1: Seen(usage(80), Reading(busy=1, last_used=9.0))}) == []
    at = scheduler.next_deadline()
    assert at is not None and at == pytest.approx(10.05) and not scheduler.wants_look(10.04)
    assert scheduler.on_tick(at, {1: idle(80, at)}) == [order(1, m.DrainIfIdle())]


def test_one_that_was_not_used_yet_stays(scheduler: Scheduler) -> None:
    """Who asked for it must get its call."""
    load(scheduler, "a", 1, 80, 0.0)
    scheduler.on_acquire(A, acquire(2, 2, key="b"), 10.0)
    assert scheduler.on_tick(10.0, {1: Seen(usage(80))}) == []


def test_one_that_has_just_come_stays_a_moment(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 80, 10.0)
    scheduler.on_acquire(A, acquire(2, 2, key="b"), 10.2)
    assert scheduler.on_tick(10.2, {1: idle(80, 10.1)}) == []
    assert scheduler.on_tick(10.5, {1: idle(80, 10.1)}) == [order(1, m.DrainIfIdle())]


def test_one_that_is_idle_no_more_when_it_hears_of_it(scheduler: Scheduler) -> None:
    """It says nothing; it is looked at again, and its TTL is its TTL."""
    load(scheduler, "a", 1, 80, 0.0)
    scheduler.on_acquire(A, acquire(2, 2, key="b"), 10.0)
    assert scheduler.on_tick(10.0, {1: idle(80, 1.0)}) == [order(1, m.DrainIfIdle())]
    at = scheduler.next_deadline() or 0.0
    assert at > 10.0
    assert scheduler.on_tick(at, {1: Seen(usage(80), Reading(busy=1, last_used=at))}) == []
    scheduler.on_draining(1, usage(80), at)
    (status,) = [s for s in scheduler.snapshot(at) if s.key == "a"]
    assert status.state is ModelState.DRAINING


def test_one_that_was_pinned_stays(scheduler: Scheduler) -> None:
    """However long it was idle."""
    load(scheduler, "a", 1, 40, 0.0)
    load(scheduler, "c", 2, 40, 0.0)
    scheduler.on_acquire(A, msgspec.structs.replace(acquire(3, 3, key="b"), file_bytes=10 * MB), 10.0)
    scheduler.on_acquire(A, msgspec.structs.replace(acquire(4, 4, key="a"), pin=True), 10.0)
    assert scheduler.on_tick(10.0, {1: idle(40, 1.0), 2: idle(40, 9.9)}) == [order(2, m.DrainIfIdle())]


def test_nobody_waits_for_ever(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 80, 0.0, pin=True)
    assert scheduler.on_acquire(A, acquire(2, 2, key="b"), 10.0) == []
    error = denied(scheduler.on_tick(40.0))
    assert "did not become free within 30 seconds" in str(error)
    assert (error.limit, error.in_use) == (100 * MB, 80 * MB)
    assert scheduler.next_deadline() is None
    assert [s.key for s in scheduler.snapshot(40.0)] == ["a"]


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
    load(scheduler, "a", 1, 80, 0.0, pin=True)
    scheduler.on_acquire(A, acquire(2, 2, key="b"), 1.0)
    scheduler.on_acquire(A, acquire(3, 3, key="c"), 2.0)
    commands = scheduler.on_release(A, 1, 3.0)  # who pinned it has gone: it drains
    assert order(1, m.Drain()) in commands
    scheduler.on_drained(1, usage(80), 3.0)
    commands = scheduler.on_exited(1, 0, "", 3.0)
    assert [c.spec.key for c in commands if isinstance(c, StartWorker)] == ["b", "c"]


def test_who_waits_may_go(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 80, 0.0, pin=True)
    scheduler.on_acquire(A, acquire(2, 2, key="b"), 1.0)
    scheduler.on_release(A, 2, 2.0)
    assert [s.key for s in scheduler.snapshot(2.0)] == ["a"]
    assert scheduler.next_deadline() is None


def test_what_was_measured_counts_the_next_time(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 95, 0.0)
    scheduler.on_draining(1, usage(95), 1.0)
    scheduler.on_drained(1, usage(95), 1.0)
    scheduler.on_exited(1, 0, "", 1.0)
    load(scheduler, "b", 2, 10, 2.0, pin=True)
    assert not [c for c in scheduler.on_acquire(A, acquire(3, 3, key="a"), 3.0) if isinstance(c, StartWorker)]


def test_a_host_that_closes_denies_who_waits(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 80, 0.0, pin=True)
    scheduler.on_acquire(A, acquire(2, 2, key="b"), 1.0)
    commands = scheduler.on_shutdown(A, m.Shutdown(ticket=9), 2.0)
    assert [message.ticket for message in told(commands, m.Denied)] == [2]


@pytest.mark.parametrize(
    ("limit", "memory", "needed", "fits"),
    [("", None, 10_000, True), ("", 100, 79, True), ("", 100, 81, False), ("90MiB", 10, 89, True)],
)
def test_the_limit_is_a_share_of_the_machine_unless_it_was_set(
    limit: str, memory: int | None, needed: int, fits: bool
) -> None:
    settings = msgspec.structs.replace(SETTINGS, memory_limit=limit)
    scheduler = Scheduler(settings, 0.0, memory and memory * MB)
    file_bytes = needed * MB - room.BASE
    commands = scheduler.on_acquire(A, msgspec.structs.replace(acquire(1), file_bytes=file_bytes), 0.0)
    assert [isinstance(c, StartWorker) for c in commands][:1] == [fits]
