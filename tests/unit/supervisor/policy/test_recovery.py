"""A fact that could not be taken in ends what it concerns; the scheduler's state is one that is allowed."""

from __future__ import annotations

import random

import pytest

from onnx_dl.core.lifecycle import ModelState
from onnx_dl.errors import SupervisorError
from onnx_dl.protocol import control as m
from onnx_dl.protocol import failures
from onnx_dl.supervisor.policy.scheduler import Scheduler
from onnx_dl.supervisor.processes.worker_process import exit_status
from tests.support.builders import USAGE, A, B, Rig, acquire, kill, ready, starts, told, unload

BUG = failures.describe(SupervisorError("a bug"))


def states(scheduler: Scheduler) -> dict[str, ModelState]:
    return {status.key: status.state for status in scheduler.snapshot(0.0)}


def is_legal(scheduler: Scheduler) -> bool:
    """A model has a worker if and only if its state says so."""
    with_worker = {ModelState.LOADING, ModelState.READY, ModelState.DRAINING}
    models = scheduler.fleet.models.values()
    listed = {model.worker.id for model in models if model.worker is not None}
    return listed == set(scheduler.fleet.by_worker) and all(
        (model.worker is not None) == (model.state in with_worker) for model in models
    )


@pytest.mark.parametrize("is_ready", [False, True])
def test_a_worker_that_something_is_wrong_with_is_ended(is_ready: bool) -> None:
    rig = Rig()
    rig.loading()
    rig.loading(key="other", client=B)
    if is_ready:
        rig.scheduler.on_ready(ready(1), USAGE, 1.0)
    assert rig.scheduler.on_broken(1, BUG) == [kill(1)]
    commands = rig.scheduler.on_exited(1, exit_status(9), "", 2.0)
    assert states(rig.scheduler) == {"m": ModelState.FAILED, "other": ModelState.LOADING}
    assert [denied.failure.args for denied in told(commands, m.Denied)] == ([] if is_ready else [["a bug"]])
    assert is_legal(rig.scheduler)
    assert starts(rig.scheduler.on_acquire(A, acquire(2), 3.0))


def test_a_worker_that_is_not_there_any_more() -> None:
    assert Rig().scheduler.on_broken(7, BUG) == []
    assert Rig().scheduler.on_lost(7, BUG, 0.0) == []


def test_an_end_that_could_not_be_taken_in() -> None:
    """Everybody who waits is answered; the other model has not noticed."""
    rig = Rig()
    rig.loading()
    rig.loading(key="other", client=B)
    scheduler = rig.scheduler
    scheduler.on_acquire(B, acquire(5), 1.0)
    scheduler.on_unload(A, unload(6), 1.0)
    scheduler.on_ask_outcome(A, m.AskOutcome(ticket=7, worker_id=1))
    commands = scheduler.on_lost(1, BUG, 2.0)
    assert sorted(denied.ticket for denied in told(commands, m.Denied)) == [1, 5]
    assert [answer.ticket for answer in told(commands, m.Unloaded)] == [6]
    assert [fate.failure for fate in told(commands, m.Outcome)] == [BUG]
    assert states(scheduler) == {"m": ModelState.FAILED, "other": ModelState.LOADING}
    assert is_legal(scheduler)
    assert starts(scheduler.on_acquire(A, acquire(8), 3.0))


def test_an_end_that_was_taken_in_by_half() -> None:
    """The worker was struck off already when it went wrong."""
    rig = Rig()
    rig.loading()
    model = rig.scheduler.fleet.by_worker.pop(1)
    model.worker = None
    assert not is_legal(rig.scheduler)
    assert told(rig.scheduler.on_lost(1, BUG, 2.0), m.Denied)
    assert is_legal(rig.scheduler)


def test_the_last_worker_of_a_host_that_closes() -> None:
    rig = Rig()
    rig.loading()
    rig.scheduler.on_shutdown(A, m.Shutdown(ticket=3), 1.0)
    assert [bye.ticket for bye in told(rig.scheduler.on_lost(1, BUG, 2.0), m.Bye)] == [3]
    assert rig.scheduler.shutdown.finished


def test_a_client_whose_end_could_not_be_taken_in() -> None:
    rig = Rig()
    rig.loading()
    scheduler = rig.scheduler
    scheduler.on_acquire(B, acquire(2), 0.0)
    scheduler.on_ready(ready(1), USAGE, 1.0)
    scheduler.forget_client(A)
    assert [status.leases for status in scheduler.snapshot(1.0)] == [1]
    scheduler.on_client_gone(B, 2.0)
    assert states(scheduler) == {"m": ModelState.DRAINING}


def test_wishes_that_could_not_be_decided() -> None:
    rig = Rig()
    rig.loading()
    scheduler = rig.scheduler
    # As if there were no room for these: they wait.
    scheduler.admission._decide = lambda *_: (_ for _ in ()).throw(OverflowError("too large"))  # type: ignore[method-assign]
    with pytest.raises(OverflowError):
        scheduler.on_acquire(B, acquire(4, key="huge"), 1.0)
    commands = scheduler.on_stuck(BUG, 1.0)
    assert [denied.ticket for denied in told(commands, m.Denied)] == [4]
    assert scheduler.next_deadline() == 100.0, "that of the load that is under way"
    assert is_legal(scheduler)
    del scheduler.admission._decide
    assert starts(scheduler.on_acquire(B, acquire(5, key="huge"), 2.0))


@pytest.mark.parametrize("seed", range(20))
def test_whatever_breaks_the_state_is_legal_and_nobody_waits_in_vain(seed: int) -> None:
    """A walk with failures at any point; at its end each Acquire was answered once."""
    dice, rig = random.Random(seed), Rig()
    scheduler, asked, now = rig.scheduler, set(), 0.0
    commands = []
    for ticket in range(1, 60):
        now += dice.random()
        asked.add(ticket)
        key = dice.choice("ab")
        commands += scheduler.on_acquire(A, acquire(ticket, proxy=ticket, key=key), now)
        for worker_id in list(scheduler.fleet.by_worker):
            match dice.randrange(6):
                case 0 if scheduler.fleet.by_worker[worker_id].state is ModelState.LOADING:
                    scheduler.on_spawned(worker_id, 100 + worker_id)
                    commands += scheduler.on_ready(ready(worker_id), USAGE, now)
                case 1:
                    commands += scheduler.on_broken(worker_id, BUG)
                case 2:
                    commands += scheduler.on_broken(worker_id, BUG)
                    commands += scheduler.on_exited(worker_id, exit_status(9), "", now)
                case 3:
                    commands += scheduler.on_lost(worker_id, BUG, now)
                case 4:
                    commands += scheduler.on_spawn_failed(worker_id, "no process", now)
            assert is_legal(scheduler)
    for worker_id in list(scheduler.fleet.by_worker):
        commands += scheduler.on_lost(worker_id, BUG, now)
    answers = [answer.ticket for answer in [*told(commands, m.Granted), *told(commands, m.Denied)]]
    assert sorted(answers) == sorted(asked)
