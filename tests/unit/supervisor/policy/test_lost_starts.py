"""Processes that started early and end before their loads begin: no load fails for its early start."""

from __future__ import annotations

import msgspec
import pytest

from onnx_dl.core.events import EventType, ModelEvent
from onnx_dl.core.lifecycle import ModelState
from onnx_dl.core.status import Usage
from onnx_dl.protocol import control as m
from onnx_dl.protocol import failures
from onnx_dl.supervisor.policy.commands import Command, KillWorker
from onnx_dl.supervisor.policy.early_starts import CONTEXT
from onnx_dl.supervisor.policy.measuring import Sample
from onnx_dl.supervisor.policy.outcomes import ExitStatus
from onnx_dl.supervisor.processes.worker_process import exit_status
from tests.support.builders import A, B, events, ready, starts, told, unload
from tests.unit.supervisor.policy.test_admission import denied, told_to_load
from tests.unit.supervisor.policy.test_early_starts import KILLED, MB, Rig, holds, on_gpu


@pytest.fixture
def rig() -> Rig:
    """Both models do not fit; one of them and a context do."""
    return Rig(3000)


def limit_time(rig: Rig, seconds: float) -> None:
    """Sets the time limit of loads."""
    limits = rig.scheduler.limits
    limits.follow(msgspec.structs.replace(limits.settings, load_timeout=seconds))


def refusals(commands: list[Command]) -> list[str]:
    return [message.failure.name for message in told(commands, m.Denied)]


def assert_spared(
    rig: Rig, commands: list[Command], state: ModelState = ModelState.UNLOADED
) -> list[ModelEvent]:
    """The end of the process has not failed the load.  Returns the events about its end."""
    model = rig.scheduler.fleet.models["b"]
    assert not told(commands, m.Denied) and model.state is state
    assert [ask.ticket for _, ask in model.waiters] == [2]
    assert (model.failures, model.retry_at, model.last_failure) == (0, 0.0, None)
    ended = [event for event in events(commands) if event.worker_id == 2]
    assert [(event.type, event.reason) for event in ended] == [(EventType.UNLOADED, "crash")]
    return ended


@pytest.mark.parametrize("status", [exit_status(11), exit_status(1 << 8), exit_status(71 << 8), KILLED])
def test_a_process_that_dies_does_not_fail_its_load(rig: Rig, status: ExitStatus) -> None:
    rig.evict()
    rig.begin()
    s = rig.scheduler
    died = s.on_exited(2, status, "why", 10.1)
    assert_spared(rig, died)
    assert s.in_use(10.1).gpu == 2000 * MB + CONTEXT.gpu, "the driver may still have its context"
    driver = {1: Sample(None), 2: Sample(Usage())}
    assert not starts(s.on_tick(10.2, driver)), "the load does not start early again"
    assert s.in_use(10.2).gpu == 2000 * MB, "what it was promised is free"
    (begun,) = starts(rig.gone())
    s.on_spawned(begun.worker_id, 103)
    assert told_to_load(s.on_started(begun.worker_id)) == [m.Load(spec=begun.spec, ttl=-1.0)]
    assert told(s.on_ready(ready(begun.worker_id), holds(2000), 11.0), m.Granted)


def test_no_process_could_be_started(rig: Rig) -> None:
    (begun,) = starts(rig.evict())
    why = "the template process ended"
    (ended,) = assert_spared(rig, rig.scheduler.on_spawn_failed(begun.worker_id, why, 10.1))
    assert ended.detail == f"No worker process could be started for b.onnx: {why}."
    assert starts(rig.gone())


def test_a_process_that_cannot_be_told_anything(rig: Rig) -> None:
    rig.evict()
    rig.begin()
    assert rig.scheduler.on_broken(2, failures.describe(ValueError("no such peer"))) == [KillWorker(2)]
    assert not told_to_load(rig.gone()), "there is memory, but nobody to tell"
    assert starts(rig.scheduler.on_exited(2, KILLED, "", 11.0)), "the load begins at once in another process"


def test_the_load_keeps_its_place_and_its_time(rig: Rig) -> None:
    rig.evict()
    rig.begin()
    s = rig.scheduler
    s.on_acquire(A, on_gpu(5, "c"), 12.0)  # waits behind b
    s.on_exited(2, exit_status(11), "", 13.0)
    assert list(s.admission.pending) == ["b", "c"]
    assert refusals(s.on_tick(39.9)) == []
    assert denied(s.on_tick(40.0)).resource == "gpu memory", "30 seconds after it was wanted"


def test_the_next_load_of_the_model_may_start_early_again(rig: Rig) -> None:
    rig.evict()
    s = rig.scheduler
    s.on_exited(2, exit_status(11), "", 10.1)
    s.on_withdraw(B, m.Withdraw(ticket=2, proxy=2, keep=False), 10.2)
    s.on_acquire(B, on_gpu(3, "b"), 10.3)
    assert starts(s.on_tick(10.4, {1: Sample(None)}))


@pytest.mark.parametrize("begins", [False, True])
def test_a_process_that_dies_when_its_load_was_sent(rig: Rig, begins: bool) -> None:
    """It may still have prepared, or have died before the message was there; later it is the load's end."""
    rig.evict()
    rig.begin()
    s = rig.scheduler
    (load,) = told_to_load(rig.gone())
    assert load.early
    s.on_acquire(A, on_gpu(5, "c"), 11.0)  # waits for room
    if begins:
        assert s.on_loading(2) == []
    died = s.on_exited(2, exit_status(11), "", 11.1)
    if begins:
        assert told(died, m.Denied) and rig.state is ModelState.FAILED
    else:
        assert_spared(rig, died)
        begun = s.on_tick(11.2, {2: Sample(Usage())})
        assert [start.spec.key for start in starts(begun)] == ["b"], "it had its turn"


def test_a_process_that_hangs_while_it_prepares(rig: Rig) -> None:
    limit_time(rig, 7.0)
    rig.evict()
    rig.begin()
    s = rig.scheduler
    assert KillWorker(2) not in s.on_tick(16.9) and s.next_deadline() <= 17.0
    assert KillWorker(2) in s.on_tick(17.0), "7 seconds after its start"
    assert KillWorker(2) not in s.on_tick(17.1)
    assert not told_to_load(rig.gone(17.2)), "it hears nothing any more"
    ended = s.on_exited(2, KILLED, "", 18.0)
    (event,) = assert_spared(rig, ended, state=ModelState.LOADING)
    assert event.detail == "The load of b.onnx did not begin in its process within 7 seconds."
    assert starts(ended)


@pytest.mark.parametrize("gpu", [3000, 2500])
def test_a_process_that_is_prepared_waits_as_long_as_its_load(gpu: int) -> None:
    """With a context and without; the time limit of the load begins with the load."""
    rig = Rig(gpu)
    limit_time(rig, 7.0)
    rig.evict()
    s = rig.scheduler
    if rig.begin():
        assert s.on_prepared(2) == []
    assert KillWorker(2) not in s.on_tick(30.0)
    assert told_to_load(rig.gone(30.1))
    assert KillWorker(2) not in s.on_tick(37.0)
    assert KillWorker(2) in s.on_tick(37.2)


def test_a_process_that_still_hangs_when_there_is_memory(rig: Rig) -> None:
    """The load has its whole time from then on."""
    limit_time(rig, 7.0)
    rig.evict()
    rig.begin()
    assert told_to_load(rig.gone(15.0))
    s = rig.scheduler
    assert KillWorker(2) not in s.on_tick(21.9)
    assert KillWorker(2) in s.on_tick(22.1), "7 seconds after the load could begin"
    assert_spared(rig, s.on_exited(2, KILLED, "", 22.2))
    (begun,) = starts(s.on_tick(22.3, {2: Sample(Usage())}))
    s.on_spawned(begun.worker_id, 103)
    s.on_started(begun.worker_id)
    assert KillWorker(begun.worker_id) in s.on_tick(29.3)
    assert refusals(s.on_exited(begun.worker_id, KILLED, "", 29.4)) == ["load-timeout"]


def test_a_load_that_takes_too_long_in_such_a_process(rig: Rig) -> None:
    rig.evict()
    rig.begin()
    rig.gone()
    s = rig.scheduler
    s.on_loading(2)
    assert KillWorker(2) in s.on_tick(200.0)
    assert refusals(s.on_exited(2, KILLED, "", 200.1)) == ["load-timeout"]


def test_what_it_takes_before_its_load_says_nothing_of_the_load() -> None:
    rig = Rig(3000, ram=3000)
    rig.evict()
    rig.begin()
    s = rig.scheduler
    rig.gone()
    assert s.to_weigh(50.0) == []
    s.on_loading(2)
    assert [load.worker_id for load in s.to_weigh(50.0)] == [2]


@pytest.mark.parametrize("unloaded", [False, True])
def test_one_that_is_lost_and_then_makes_way_does_not_start_early_again(rig: Rig, unloaded: bool) -> None:
    """Another load comes first, or the model is unloaded, before the process is reaped."""
    rig.evict()
    rig.begin()
    s = rig.scheduler
    s.on_broken(2, failures.describe(ValueError("no such peer")))
    if unloaded:
        s.on_unload(A, unload(9, "b"), 10.1)
        s.on_exited(2, KILLED, "", 10.2)
    else:
        s.on_acquire(A, on_gpu(5, "c"), 10.1)  # waits behind b
        model = s.fleet.models["c"]
        s.orders.carry_out(s.admission.want_again(model, model.spec, 10.1, alone=True))
        (event,) = assert_spared(rig, s.on_exited(2, KILLED, "", 10.2))
        assert event.detail == "no such peer"
        s.on_release(A, 5, 10.3)
    assert list(s.admission.pending) == ["b"]
    assert not starts(s.on_tick(10.4, {1: Sample(None), 2: Sample(Usage())}))
    assert starts(rig.gone())


# --- it is ended ------------------------------------------------------------------------------------------


def test_limits_that_are_lowered_end_it(rig: Rig) -> None:
    """One of both models still fits, but not with a context beside it."""
    rig.evict()
    rig.begin()
    s = rig.scheduler
    lower = msgspec.structs.replace(s.limits.settings, gpu_memory_limit=2500 * MB)
    assert KillWorker(2) in s.on_configured(lower, {}, {}, 10.1)
    s.on_exited(2, KILLED, "", 10.2)
    driver = {1: Sample(None), 2: Sample(Usage())}
    assert not starts(s.on_tick(10.3, driver)), "it would be ended again"
    assert starts(rig.gone())


def test_one_that_takes_more_than_was_known_ends(rig: Rig) -> None:
    rig.evict()
    rig.begin()
    s = rig.scheduler
    s.on_measured(2, Sample(holds(1100)), 10.1)
    assert KillWorker(2) in s.on_tick(10.2, {1: Sample(None)})
    s.on_exited(2, KILLED, "", 10.3)
    driver = {1: Sample(None), 2: Sample(Usage())}
    assert not starts(s.on_tick(10.4, driver)), "it would be ended again"
    assert starts(rig.gone())


@pytest.mark.parametrize("how", ["on_stop", "on_abandoned"])
def test_the_end_of_the_host_ends_it(rig: Rig, how: str) -> None:
    rig.evict()
    rig.begin()
    s = rig.scheduler
    commands = getattr(s, how)(10.1)
    assert refusals(commands) == ["host-closing"] and KillWorker(2) in commands
    assert s.on_exited(2, exit_status(11), "", 10.2) != [] and not s.shutdown.finished
    assert not starts(rig.gone()) and s.shutdown.finished


def test_the_end_of_the_application_ends_it(rig: Rig) -> None:
    rig.evict()
    rig.begin()
    s = rig.scheduler
    assert KillWorker(2) in s.on_client_gone(B, 10.1)
    s.on_exited(2, KILLED, "", 10.2)
    assert "b" not in s.fleet.models and not starts(rig.gone())


def test_who_asks_while_it_ends_gets_another(rig: Rig) -> None:
    rig.evict()
    rig.begin()
    s = rig.scheduler
    assert KillWorker(2) in s.on_withdraw(B, m.Withdraw(ticket=2, proxy=2, keep=False), 10.1)
    assert s.on_acquire(A, on_gpu(3, "b"), 10.2) == []
    assert not starts(rig.gone()), "two processes of one model"
    s.on_exited(2, KILLED, "", 11.0)
    assert starts(s.on_tick(11.1, {1: Sample(Usage())}))


def test_who_asks_when_nobody_looks_for_memory_any_more_gets_another(rig: Rig) -> None:
    rig.evict()
    s = rig.scheduler
    assert KillWorker(2) in s.on_stuck(failures.describe(ValueError("a bug")), 10.1)
    assert s.on_acquire(A, on_gpu(3, "b"), 10.2) == []
    s.on_exited(2, KILLED, "", 10.3)
    assert starts(rig.gone())


def test_an_unload_while_the_load_is_on_its_way(rig: Rig) -> None:
    rig.evict()
    rig.begin()
    s = rig.scheduler
    rig.gone()
    assert KillWorker(2) in s.on_unload(A, unload(9, "b"), 11.0)
    assert told(s.on_exited(2, KILLED, "", 11.1), m.Unloaded)
    assert starts(s.on_tick(11.2, {2: Sample(Usage())})), "who waits for the model gets it"


def test_a_process_that_makes_way_is_no_model_that_was_evicted(rig: Rig) -> None:
    """Else its first load would count as one that is repeated for want of memory."""
    rig.evict()
    rig.begin()
    s = rig.scheduler
    s.on_acquire(A, on_gpu(5, "c"), 10.1)
    model = s.fleet.models["c"]
    s.orders.carry_out(s.admission.want_again(model, model.spec, 10.2, alone=True))
    s.on_exited(2, KILLED, "", 10.3)
    assert "b" not in s.announcements._reloads._evicted
