"""Loads that are weighed, and what is measured of workers that end: facts and times in, commands out."""

from __future__ import annotations

import signal
from typing import Any

import msgspec
import pytest

from onnx_dl.core.status import Usage
from onnx_dl.errors import CapacityError
from onnx_dl.protocol import control as m
from onnx_dl.protocol import failures
from onnx_dl.supervisor.policy.commands import EndSaver, KillWorker, Remember, SendToWorker
from onnx_dl.supervisor.policy.measuring import LoadToWeigh, Sample
from onnx_dl.supervisor.policy.memory_amount import MemoryAmount
from onnx_dl.supervisor.policy.requirements import Peak, Requirement
from onnx_dl.supervisor.policy.scheduler import Scheduler
from onnx_dl.supervisor.processes.worker_process import exit_status
from onnx_dl.transport.gauges import Reading
from tests.support.builders import SETTINGS, A, events, kill, ready, starts, told
from tests.unit.supervisor.policy.test_admission import (
    ask,
    busy,
    denied,
    idle,
    leave,
    load,
    peaked,
    remembered,
    taken,
    usage,
)

MB = 1 << 20
KILLED = exit_status(signal.SIGKILL)


def host(limit: int | None = 300, known: dict[str, Requirement] | None = None, **more: Any) -> Scheduler:
    nbytes = None if limit is None else limit * MB
    settings = msgspec.structs.replace(SETTINGS, memory_limit=nbytes, room_timeout=30.0)
    return Scheduler(settings, known=(known or {}).get, **more)


def begin(scheduler: Scheduler, worker_id: int, mb: int, now: float = 0.0, **terms: Any) -> None:
    """A load of a model ``m`` of so many MB, whose worker has a process."""
    assert starts(scheduler.on_acquire(A, ask(worker_id, "m", mb, **terms), now))
    scheduler.on_spawned(worker_id, 100 + worker_id)


def weigh(scheduler: Scheduler, worker_id: int, mb: int, now: float) -> list:
    return scheduler.on_weighed(worker_id, mb * MB, now)


# --- when --------------------------------------------------------------------------------------------------


def test_a_load_is_looked_at_before_it_can_have_taken_all() -> None:
    """Every 5 ms near to the bound, seldom far from it, and never without a limit."""
    scheduler = host(300)
    begin(scheduler, 1, 190)  # 450 MB by guess, so it gets all there is
    first = scheduler.next_deadline()
    assert first == pytest.approx(300 * MB / 5e9)
    assert scheduler.to_weigh(0.001) == []
    assert scheduler.to_weigh(0.063) == [LoadToWeigh(1, 101, 300 * MB)]
    weigh(scheduler, 1, 299, 0.063)
    assert scheduler.next_deadline() == pytest.approx(0.068)
    roomy = host(900_000)
    begin(roomy, 1, 190)
    assert roomy.next_deadline() == 1.0
    scheduler = host(None)
    begin(scheduler, 1, 190)
    assert scheduler.to_weigh(9.0) == [] and scheduler.next_deadline() == SETTINGS.load_timeout


def test_only_loads_are_weighed() -> None:
    scheduler = host(300)
    assert starts(scheduler.on_acquire(A, ask(1, "m", 190), 0.0))
    assert scheduler.to_weigh(1.0) == []  # it has no process yet
    scheduler.on_spawned(1, 101)
    assert scheduler.to_weigh(1.0)
    scheduler.on_ready(ready(1), usage(100), 1.0)
    assert scheduler.to_weigh(9.0) == []
    assert weigh(scheduler, 1, 5000, 9.0) == []


# --- that is too large -------------------------------------------------------------------------------------


def test_a_load_that_takes_more_than_there_is_is_ended_and_refused_with_both_numbers() -> None:
    scheduler = host(300)
    begin(scheduler, 1, 190)
    assert weigh(scheduler, 1, 300, 0.1) == []
    commands = weigh(scheduler, 1, 304, 0.11)
    assert kill(1) in commands
    (need,) = remembered(commands)
    assert need.load == Peak(304 * MB, ended=True)
    assert not told(scheduler.on_ready(ready(1), usage(200), 0.12), m.Granted)  # it crossed the kill
    first = denied(scheduler.on_exited(1, KILLED, "", 0.2))
    second = denied(scheduler.on_acquire(A, ask(2, "m", 190), 1.0))
    later = denied(host(300, {"m": need}).on_acquire(A, ask(1, "m", 190), 0.0))
    for error in (first, second, later):
        assert isinstance(error, CapacityError)
        assert (error.needed, error.limit) == (304 * MB + 1, 300 * MB)
        assert (
            "more than 318.8 MB to load (its worker was ended at this size; its files have 199.2 MB)"
            in str(error)
        )
    assert starts(host(450, {"m": need}).on_acquire(A, ask(1, "m", 190), 0.0))
    (status,) = scheduler.snapshot(1.0)
    assert (status.failures, status.retry_after) == (0, 0.0)


def test_between_two_looks_it_is_seen_when_it_is_ready() -> None:
    """Then its size is known, too, and what would be refused the next time is refused the first."""
    scheduler = host(300)
    begin(scheduler, 1, 190)
    commands = scheduler.on_ready(ready(1), peaked(200, 421), 0.5)
    assert kill(1) in commands and not told(commands, m.Granted)
    (need,) = remembered(commands)
    for error in (
        denied(scheduler.on_exited(1, KILLED, "", 0.6)),
        denied(scheduler.on_acquire(A, ask(2, "m", 190), 1.0)),
        denied(host(300, {"m": need}).on_acquire(A, ask(1, "m", 190), 0.0)),
    ):
        assert (error.needed, error.size, error.limit) == (421 * MB, 200 * MB, 300 * MB)
    assert starts(host(421, {"m": need}).on_acquire(A, ask(1, "m", 190), 0.0))


def test_one_whose_guess_was_too_low_is_loaded_again_when_there_is_more() -> None:
    scheduler = host(300)
    load(scheduler, "idle", 1, 100, 0.0)
    begin(scheduler, 2, 60, 1.0)  # 164 MB by guess, and 200 are free
    assert weigh(scheduler, 2, 190, 1.1) == []
    assert taken(scheduler, 1.1) == 290  # nobody else is let in who needs what it has
    assert kill(2) in weigh(scheduler, 2, 203, 1.2)
    commands = scheduler.on_exited(2, KILLED, "", 1.3)
    assert not told(commands, m.Denied) and [event.type for event in events(commands)] == ["failed"]
    commands = scheduler.on_tick(1.3, {1: idle(100, 0.1)})
    assert [command.worker_id for command in commands if isinstance(command, SendToWorker)] == [1]
    leave(scheduler, 1, usage(100), 1.4)
    scheduler.on_spawned(3, 103)
    assert weigh(scheduler, 3, 290, 1.5) == []
    assert told(scheduler.on_ready(ready(3), peaked(150, 290), 1.6), m.Granted)


def test_a_second_time_it_is_refused() -> None:
    scheduler = host(300)
    load(scheduler, "used", 1, 100, 0.0)
    begin(scheduler, 2, 60, 1.0)
    weigh(scheduler, 2, 203, 1.2)
    scheduler.on_exited(2, KILLED, "", 1.3)
    error = denied(scheduler.on_tick(31.3, {1: busy(100)}))
    assert "did not become free within 30 seconds" in str(error) and error.in_use == 100 * MB


def test_one_that_was_measured_may_take_a_little_more_than_that() -> None:
    known = {
        "m": Requirement(load=Peak(300 * MB), steady=MemoryAmount(100 * MB), peak=MemoryAmount(100 * MB))
    }
    scheduler = host(300, known)
    begin(scheduler, 1, 90)
    assert weigh(scheduler, 1, 314, 0.1) == []
    assert kill(1) in weigh(scheduler, 1, 316, 0.2)


def test_what_others_have_grown_by_is_not_taken_from_a_load() -> None:
    scheduler = host(300)
    load(scheduler, "used", 1, 50, 0.0)
    begin(scheduler, 2, 90, 1.0)  # 230 by guess
    scheduler.on_measured(1, busy(200), 1.1)
    assert weigh(scheduler, 2, 229, 1.2) == []


def test_a_saver_goes_first() -> None:
    scheduler = host(300)
    begin(scheduler, 1, 50, 0.0)  # 142 by guess
    before = scheduler.in_use(0.0).ram
    scheduler.on_saveable(m.Saveable(worker_id=1, key="s", nbytes=1, blob=None, order=""), 0.1)
    scheduler.on_tick(0.1, {})
    saver = (scheduler.in_use(0.1).ram - before) // MB
    assert saver == 96
    assert weigh(scheduler, 1, 299 - saver, 0.2) == []
    assert weigh(scheduler, 1, 301 - saver, 0.3) == [EndSaver()]
    assert weigh(scheduler, 1, 299, 0.3) == []
    assert KillWorker(1) in weigh(scheduler, 1, 301, 0.4)


# --- from the load cache -----------------------------------------------------------------------------------

LARGE = Requirement(
    load=Peak(400 * MB), steady=MemoryAmount(100 * MB), peak=MemoryAmount(100 * MB), entry="ab"
)


def mapped_loads(commands: list) -> list[bool]:
    return [
        command.message.mapped
        for command in commands
        if isinstance(command, SendToWorker) and isinstance(command.message, m.Load)
    ]


def test_one_that_fits_only_when_it_is_mapped_is_loaded_so() -> None:
    scheduler = host(300, {"m": LARGE}, is_saved="ab".__eq__)
    begin(scheduler, 1, 190)
    assert mapped_loads(scheduler.on_started(1)) == [True]
    mapped = msgspec.structs.replace(ready(1), entry="ab", mapped=True)
    commands = scheduler.on_ready(mapped, peaked(80, 120), 1.0)
    (need,) = remembered(commands)
    assert (need.load, need.mapped) == (Peak(400 * MB), Peak(120 * MB))
    error = denied(host(300, {"m": need}).on_acquire(A, ask(1, "m", 190), 0.0))  # it is there no more
    assert (error.needed, error.size) == (400 * MB, 90 * MB)


def test_one_that_does_not_even_then_is_refused_the_next_time_at_once() -> None:
    scheduler = host(300, {"m": LARGE}, is_saved="ab".__eq__)
    begin(scheduler, 1, 190)
    (need,) = remembered(weigh(scheduler, 1, 301, 0.1))
    assert (need.load, need.mapped) == (Peak(400 * MB), Peak(301 * MB, ended=True))
    assert denied(scheduler.on_exited(1, KILLED, "", 0.2)).needed == 301 * MB + 1
    again = host(300, {"m": need}, is_saved="ab".__eq__)
    assert denied(again.on_acquire(A, ask(1, "m", 190), 0.0)).size == 100 * MB


def test_where_it_is_no_more_it_loads_plainly_if_it_fits() -> None:
    known = msgspec.structs.replace(LARGE, load=Peak(200 * MB), mapped=Peak(120 * MB))
    scheduler = host(300, {"m": known}, is_saved="ab".__eq__)
    begin(scheduler, 1, 190)
    assert taken(scheduler, 0.0) == 120
    gone = m.WorkerFailed(worker_id=1, failure=failures.describe(ValueError("gone")), unsaved=True)
    scheduler.on_load_failed(gone, 0.1)
    commands = scheduler.on_exited(1, exit_status(0), "", 0.2)
    assert [start.worker_id for start in starts(commands)] == [2] and not told(commands, m.Denied)
    assert taken(scheduler, 0.2) == 200
    scheduler.on_spawned(2, 102)
    assert mapped_loads(scheduler.on_started(2)) == [False]


# --- what cannot have been measured ------------------------------------------------------------------------


def test_a_figure_beyond_the_machine_locks_nobody_out() -> None:
    nonsense = Requirement(load=Peak(1 << 45), steady=MemoryAmount(1 << 45), peak=MemoryAmount(1 << 45))
    scheduler = host(300, {"m": nonsense}, memory=1000 * MB)
    begin(scheduler, 1, 50)
    (need,) = remembered(scheduler.on_ready(ready(1), peaked(80, 120), 1.0))
    assert (need.load, need.steady) == (Peak(120 * MB), MemoryAmount(80 * MB))


# --- of workers that end -----------------------------------------------------------------------------------

GOING = Usage(rss=3 * MB, private=1 * MB, pss=2 * MB)
GONE = Usage()


@pytest.mark.parametrize("how", ["drained", "killed", "crashed", "given up"])
@pytest.mark.parametrize("last", [GOING, GONE])
def test_what_is_measured_of_it_does_not_count(how: str, last: Usage) -> None:
    """Somebody asks for figures all the time; what a model gave back is what it had."""
    scheduler = host(300)
    load(scheduler, "m", 1, 100, 0.0)
    match how:
        case "drained":
            scheduler.on_draining(1, usage(110), 1.0)
            scheduler.on_measured(1, Sample(usage(112)), 1.0)
            scheduler.on_drained(1, usage(111), 1.0)
        case "killed":
            scheduler.on_unload(A, m.Unload(ticket=1, key="m", force=True), 1.0)
        case "given up":
            scheduler.on_abandoned(1.0)
        case "crashed":
            last = GONE
    for _ in range(3):
        scheduler.on_measured(1, Sample(last, Reading(runs=9)), 1.1)
    (status,) = scheduler.snapshot(1.1)
    had = (111 if how == "drained" else 100) * MB
    assert status.usage.private == had
    commands = scheduler.on_exited(1, KILLED, "", 1.2, runs=9)
    assert [event.freed for event in events(commands) if event.type == "unloaded"] == [had]


def test_one_that_is_gone_when_it_says_that_it_is_ready_teaches_nothing() -> None:
    scheduler = host(300)
    begin(scheduler, 1, 50)
    commands = scheduler.on_ready(ready(1), GONE, 1.0)
    assert not [command for command in commands if isinstance(command, Remember)]
    assert taken(scheduler, 1.0) == 142  # until it is reaped


def test_a_worker_that_is_reaped_is_not_weighed() -> None:
    assert host(300).on_weighed(7, 1, 0.0) == []
