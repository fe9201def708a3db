"""Which model is saved, and when: rules, and the scheduler that follows them under a limit."""

from __future__ import annotations

import os

import msgspec
import pytest

from onnx_dl.protocol import control as m
from onnx_dl.supervisor.policy import cache_saves
from onnx_dl.supervisor.policy.cache_saves import CacheSaves, SaveRequest
from onnx_dl.supervisor.policy.commands import Command, EndSaver, StartSaver
from onnx_dl.supervisor.policy.measuring import Sample
from onnx_dl.supervisor.policy.memory_amount import NOTHING, UNLIMITED, MemoryAmount
from onnx_dl.supervisor.policy.scheduler import Scheduler
from onnx_dl.supervisor.processes.worker_process import exit_status
from onnx_dl.transport.gauges import Reading
from tests.support.builders import SETTINGS, A, acquire, order, starts
from tests.unit.supervisor.policy.test_admission import MB, idle, load, usage

LIMIT = 500 * MB
ALL = MemoryAmount(UNLIMITED, UNLIMITED)
SHORT = exit_status(os.EX_TEMPFAIL << 8)
"""The wait status of a saver that may not take what it needs."""


def request(key: str, mb: int = 100) -> SaveRequest:
    return SaveRequest(key, f"order of {key}", None, MemoryAmount(mb * MB))


def begun(found: SaveRequest | None) -> str | None:
    return None if found is None else found.key


# --- the rules -------------------------------------------------------------------------------------------


def test_one_at_a_time_in_the_order_in_which_they_came() -> None:
    saves = CacheSaves()
    for key in "abab":
        saves.request(request(key))
    assert begun(saves.start(ALL, ALL, 0.0)) == "a"
    assert saves.taken == MemoryAmount(100 * MB) and saves.leaving == NOTHING
    saves.request(request("a"))  # it is being saved
    assert saves.start(ALL, ALL, 1.0) is None
    saves.ended(short=False)
    assert saves.taken == NOTHING
    assert begun(saves.start(ALL, ALL, 2.0)) == "b"
    saves.ended(short=False)
    assert saves.start(ALL, ALL, 3.0) is None


def test_the_first_that_fits_and_never_what_is_larger_than_the_limit() -> None:
    saves = CacheSaves()
    for key, mb in (("huge", 600), ("large", 300), ("small", 50)):
        saves.request(request(key, mb))
    limit = MemoryAmount(LIMIT)
    assert saves.start(MemoryAmount(49 * MB), limit, 0.0) is None
    assert begun(saves.start(MemoryAmount(299 * MB), limit, 0.0)) == "small"
    saves.ended(short=False)
    assert begun(saves.start(limit, limit, 0.0)) == "large"
    saves.ended(short=False)
    assert saves.start(ALL, ALL, 0.0) is None  # it was dropped


def test_so_many_wait_and_no_more() -> None:
    saves = CacheSaves()
    for number in range(65):
        saves.request(request(str(number)))
    found = []
    while (each := saves.start(ALL, ALL, 0.0)) is not None:
        found.append(each.key)
        saves.ended(short=False)
    assert found == [str(number) for number in range(64)]


def test_what_had_to_make_way_comes_last_and_not_for_ever() -> None:
    saves = CacheSaves()
    saves.request(request("a"))
    saves.request(request("b"))
    ended = []
    for _ in range(6):
        if (each := saves.start(ALL, ALL, 0.0)) is None:
            break
        ended.append(each.key)
        assert saves.end() and not saves.end()  # one word is enough
        assert saves.leaving == saves.taken == MemoryAmount(100 * MB)
        saves.ended(short=False)
    assert ended == ["a", "b", "a", "b", "a", "b"]
    assert saves.start(ALL, ALL, 0.0) is None
    saves.request(request("a"))  # its next load asks again
    assert begun(saves.start(ALL, ALL, 0.0)) == "a"


def test_what_was_too_little_is_doubled() -> None:
    saves = CacheSaves()
    saves.request(request("a", 100))
    taken = []
    while saves.start(ALL, ALL, 0.0) is not None:
        taken.append(saves.taken.ram // MB)
        saves.ended(short=True)
    assert taken == [100, 200, 400]


def test_it_is_looked_at_when_somebody_comes_or_goes_and_while_one_runs() -> None:
    saves = CacheSaves()
    saves.schedule_look(1.0)
    assert saves.look_at is None  # nobody waits
    saves.request(request("a", 100))
    saves.schedule_look(2.0)
    assert saves.look_at == 2.0
    assert saves.start(NOTHING, ALL, 2.0) is None and saves.look_at is None
    saves.schedule_look(3.0)
    assert saves.start(ALL, ALL, 3.0) and saves.look_at == pytest.approx(3.1)


def test_a_host_that_closes_saves_nothing() -> None:
    saves = CacheSaves()
    saves.request(request("a"))
    saves.start(ALL, ALL, 0.0)
    saves.close()
    assert saves.end()
    saves.ended(short=False)
    saves.request(request("b"))
    assert saves.start(ALL, ALL, 0.0) is None


# --- the scheduler ---------------------------------------------------------------------------------------


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(msgspec.structs.replace(SETTINGS, memory_limit=LIMIT, room_timeout=30.0))


def saveable(key: str = "a", mb: int = 100, worker_id: int = 1) -> m.Saveable:
    return m.Saveable(worker_id=worker_id, key=key, nbytes=mb * MB, blob=None, order="{}")


def saved(commands: list[Command]) -> list[str]:
    return [command.request.key for command in commands if isinstance(command, StartSaver)]


def look(scheduler: Scheduler, now: float, **seen: Sample) -> list[Command]:
    """After the loop looked at all workers, because the scheduler wants it to."""
    assert scheduler.wants_look(now)
    return scheduler.on_tick(now, {int(name[1:]): each for name, each in seen.items()})


NEED = cache_saves.need(100 * MB).ram


def test_a_sandboxed_worker_is_not_believed(scheduler: Scheduler) -> None:
    """The saver has no sandbox, and would load what the worker names, with its environment."""
    ask = acquire(1, key="a")
    ask = msgspec.structs.replace(ask, spec=msgspec.structs.replace(ask.spec, sandbox=True))
    commands = scheduler.on_acquire(A, ask, 0.0)
    (start,) = starts(commands)
    scheduler.on_spawned(start.worker_id, 1)
    assert scheduler.on_saveable(saveable(worker_id=start.worker_id), 1.0) == []
    assert not scheduler.saves.start(ALL, ALL, 1.0) and scheduler.saves.look_at is None


def test_a_save_begins_after_a_look_and_counts(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 50, 0.0)
    assert scheduler.on_saveable(saveable(), 1.0) == []
    assert scheduler.next_deadline() == 1.0
    assert saved(look(scheduler, 1.0, w1=idle(60, 0.5))) == ["a"]
    assert scheduler.in_use(1.0).ram == NEED + 60 * MB
    assert scheduler.on_saver_ended(exit_status(0), 2.0) == []
    assert scheduler.in_use(2.0).ram == 60 * MB
    assert not scheduler.wants_look(99.0)


def test_what_workers_have_grown_by_counts_before_it(scheduler: Scheduler) -> None:
    """One that maps its weights takes little until its first run."""
    load(scheduler, "a", 1, 20, 0.0)
    scheduler.on_saveable(saveable(), 1.0)
    assert not saved(look(scheduler, 1.0, w1=idle(LIMIT // MB - NEED // MB + 1, 0.5)))
    assert scheduler.next_deadline() is None  # nobody is asked again and again
    scheduler.on_exited(1, exit_status(0), "", 2.0)
    assert saved(look(scheduler, 2.0)) == ["a"]


def test_a_worker_that_grows_ends_it(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 50, 0.0)
    scheduler.on_saveable(saveable(), 1.0)
    look(scheduler, 1.0, w1=idle(50, 0.5))
    assert look(scheduler, 1.2, w1=idle(50, 0.5)) == []
    assert look(scheduler, 1.4, w1=idle(300, 0.5)) == [EndSaver()]
    assert look(scheduler, 1.6, w1=idle(300, 0.5)) == []
    scheduler.on_saver_ended(exit_status(9), 1.7)
    assert not saved(look(scheduler, 1.7, w1=idle(300, 0.5)))
    assert scheduler.in_use(1.8).ram == 300 * MB


def test_a_load_that_needs_its_room_ends_it_and_evicts_nobody(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 50, 0.0)
    scheduler.on_saveable(saveable(), 1.0)
    look(scheduler, 1.0, w1=idle(50, 0.5))
    ask = msgspec.structs.replace(acquire(2, 2, key="b"), file_bytes=100 * MB)
    assert scheduler.on_acquire(A, ask, 5.0) == [EndSaver()]
    assert scheduler.on_tick(5.0, {1: idle(50, 0.5)}) == []
    assert scheduler.in_use(5.1).ram == NEED + 50 * MB  # until it is gone
    commands = scheduler.on_saver_ended(exit_status(9), 5.2)
    assert [start.spec.key for start in starts(commands)] == ["b"]
    assert scheduler.in_use(5.2).ram <= LIMIT
    look(scheduler, 5.2, w1=idle(50, 0.5))  # the wish waits again; b takes too much
    scheduler.on_exited(2, exit_status(0), "", 6.0)
    assert saved(look(scheduler, 6.0, w1=idle(50, 0.5))) == ["a"]


def test_a_load_that_needs_more_than_its_room_has_others_evicted_too(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 150, 0.0)
    scheduler.on_saveable(saveable(mb=50), 1.0)
    assert saved(look(scheduler, 1.0, w1=idle(150, 0.5)))
    ask = msgspec.structs.replace(acquire(2, 2, key="b"), file_bytes=200 * MB)
    assert scheduler.on_acquire(A, ask, 5.0) == [EndSaver()]
    assert scheduler.on_tick(5.0, {1: idle(150, 0.5)}) == [order(1, m.DrainIfIdle())]


def test_one_that_there_is_room_for_beside_a_load_goes_on(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 20, 0.0)
    scheduler.on_saveable(saveable(mb=10), 1.0)
    look(scheduler, 1.0, w1=idle(20, 0.5))
    commands = scheduler.on_acquire(A, acquire(2, 2, key="b"), 5.0)
    assert starts(commands) and EndSaver() not in commands


def test_a_load_that_will_never_fit_ends_nothing(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 50, 0.0)
    scheduler.on_saveable(saveable(), 1.0)
    look(scheduler, 1.0, w1=idle(50, 0.5))
    ask = msgspec.structs.replace(acquire(2, 2, key="b"), file_bytes=600 * MB)
    assert EndSaver() not in scheduler.on_acquire(A, ask, 5.0)


def test_while_somebody_waits_for_room_nothing_is_saved(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 50, 0.0)
    ask = msgspec.structs.replace(acquire(2, 2, key="b"), file_bytes=460 * MB)
    assert scheduler.on_acquire(A, ask, 1.0) == []
    scheduler.on_saveable(saveable(), 1.1)
    assert not saved(look(scheduler, 1.1, w1=Sample(usage(50), Reading(busy=1, last_used=0.5))))
    scheduler.on_release(A, 2, 2.0)
    assert saved(look(scheduler, 2.0, w1=idle(50, 0.5))) == ["a"]


def test_one_that_may_not_take_what_it_needs_gets_more(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 20, 0.0)
    scheduler.on_saveable(saveable(mb=10), 1.0)
    look(scheduler, 1.0, w1=idle(20, 0.5))
    before = scheduler.in_use(1.0).ram
    scheduler.on_saver_ended(SHORT, 2.0)
    look(scheduler, 2.0, w1=idle(20, 0.5))
    assert scheduler.in_use(2.0).ram - before == cache_saves.need(10 * MB).ram


def test_without_a_limit_it_is_one_at_a_time_all_the_same() -> None:
    scheduler = Scheduler(SETTINGS)
    for worker_id, key in enumerate("ab", 1):
        load(scheduler, key, worker_id, 50, 0.0)
        scheduler.on_saveable(saveable(key, 10_000, worker_id), 1.0)
    assert saved(look(scheduler, 1.0)) == ["a"]
    assert saved(look(scheduler, 1.2)) == []
    scheduler.on_saver_ended(exit_status(0), 2.0)
    assert saved(look(scheduler, 2.0)) == ["b"]


def test_a_lower_limit_ends_it_before_a_model(scheduler: Scheduler) -> None:
    load(scheduler, "a", 1, 50, 0.0)
    scheduler.on_saveable(saveable(), 1.0)
    look(scheduler, 1.0, w1=idle(50, 0.5))
    lower = msgspec.structs.replace(SETTINGS, memory_limit=100 * MB)
    commands = scheduler.on_configured(lower, {}, {}, 2.0)
    assert commands + look(scheduler, 2.0, w1=idle(50, 0.5)) == [EndSaver()]


@pytest.mark.parametrize("how", ["on_stop", "on_abandoned"])
def test_closing_ends_it(scheduler: Scheduler, how: str) -> None:
    load(scheduler, "a", 1, 50, 0.0)
    scheduler.on_saveable(saveable(), 1.0)
    look(scheduler, 1.0, w1=Sample(usage(50)))
    assert EndSaver() in getattr(scheduler, how)(2.0)
    scheduler.on_saver_ended(exit_status(9), 2.1)
    scheduler.on_saveable(saveable("b"), 2.2)
    assert not scheduler.wants_look(9.9)
