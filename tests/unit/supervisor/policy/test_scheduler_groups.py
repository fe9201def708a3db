"""The scheduler: models of one group, which have one worker."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelDescription
from onnx_dl.core.terms import Terms
from onnx_dl.protocol import codec, control, failures
from onnx_dl.supervisor.policy import eviction
from onnx_dl.supervisor.policy.commands import Command
from onnx_dl.supervisor.policy.records import HOST
from onnx_dl.supervisor.processes.worker_process import exit_status
from tests.support.builders import SETTINGS, USAGE, A, B, Rig, failed, ready, spec, starts, told


def member(key: str, **fields: Any) -> ModelSpec:
    return spec(key, group="g", **fields)


def ask(ticket: int, key: str, *companions: str, proxy: int = 1, **fields: Any) -> control.Acquire:
    others = [member(other) for other in companions]
    return control.Acquire(
        ticket=ticket, proxy=proxy, spec=member(key), companions=others, terms=Terms(), **fields
    )


def loaded(*keys: str, worker_id: int = 1, broken: tuple[str, ...] = ()) -> control.WorkerReady:
    """The group's worker is ready with these."""
    failure = msgspec.to_builtins(failures.describe(ValueError("not a model")))
    description = ModelDescription(
        members={key: ModelDescription() for key in keys}, failed=dict.fromkeys(broken, failure)
    )
    return msgspec.structs.replace(ready(worker_id), description=description)


def begun(rig: Rig, commands: list[Command]) -> list[list[str]]:
    """The members of each worker that is started by these, which has a process afterwards."""
    for command in starts(commands):
        rig.scheduler.on_spawned(command.worker_id, 100 + command.worker_id)
        rig.scheduler.on_started(command.worker_id)
    return [[each.key for each in command.spec.members] for command in starts(commands)]


def tickets(commands: list[Command], kind: type[codec.Message]) -> list[int]:
    return [message.ticket for message in told(commands, kind)]


@pytest.fixture
def rig() -> Rig:
    return Rig()


# --- members that do not load ----------------------------------------------------------------------------


def test_who_comes_while_a_broken_one_loads_alone_gets_a_load_of_its_own(rig):
    s = rig.scheduler
    assert begun(rig, s.on_acquire(A, ask(1, "bad"), 0.0)) == [["bad"]]
    s.on_acquire(B, ask(2, "good"), 0.1)
    s.on_load_failed(failed(), 0.2)
    commands = s.on_exited(1, exit_status(0), "", 0.3)
    assert tickets(commands, control.Denied) == [1]
    assert begun(rig, commands) == [["bad", "good"]]
    commands = s.on_ready(loaded("good", worker_id=2, broken=("bad",)), USAGE, 0.4)
    assert tickets(commands, control.Granted) == [2]


def test_a_broken_one_that_backs_off_keeps_no_other_waiting(rig):
    s = rig.scheduler
    for number in (1, 2):
        begun(rig, s.on_acquire(A, ask(number, "bad"), number))
        s.on_load_failed(failed(number), number + 0.1)
        s.on_exited(number, exit_status(0), "", number + 0.2)
    assert tickets(s.on_acquire(A, ask(3, "bad"), 2.3), control.Denied) == [3]
    assert begun(rig, s.on_acquire(B, ask(4, "good"), 2.4)) == [["bad", "good"]]


# --- the terms of the host's file -------------------------------------------------------------------------


@pytest.mark.parametrize("order", [("keep", "brief"), ("brief", "keep")])
def test_of_several_that_the_host_loads_each_has_its_say(rig, order):
    """The longest TTL, the highest priority, pinned if one is; not what the last one says."""
    s = rig.scheduler
    terms = {"keep": Terms(ttl=-1.0, pin=True, priority=3), "brief": Terms(ttl=60.0, pin=False, priority=5)}
    s.on_configured(SETTINGS, terms, {"group:g": [member("keep"), member("brief")]}, 0.0)
    for key in order:
        own = terms[key]
        wanted = control.Acquire(
            ticket=0,
            proxy=0,
            spec=member(key),
            terms=own,
            for_host=True,
        )
        begun(rig, s.on_acquire(HOST, wanted, 0.0))
    s.on_ready(loaded("keep", "brief"), USAGE, 1.0)
    (status,) = s.snapshot(1.0)
    assert (status.ttl, status.pinned, status.priority, status.leases) == (-1.0, True, 5, 1)


# --- who is in it -----------------------------------------------------------------------------------------


def replaced(rig: Rig, commands: list[Command], number: int = 1) -> list[list[str]]:
    """The members of the worker that comes after this one, which has drained."""
    rig.scheduler.on_drained(number, USAGE, 5.0)
    return begun(rig, commands + rig.scheduler.on_exited(number, exit_status(0), "", 5.1))


def test_models_of_two_clients_stay_together_whoever_asks_next(rig):
    s = rig.scheduler
    begun(rig, s.on_acquire(A, ask(1, "x"), 0.0))
    s.on_ready(loaded("x"), USAGE, 0.1)
    assert replaced(rig, s.on_acquire(B, ask(2, "y"), 1.0)) == [["x", "y"]]
    s.on_ready(loaded("x", "y", worker_id=2), USAGE, 5.2)
    assert tickets(s.on_acquire(A, ask(3, "x"), 5.3), control.Granted) == [3]
    assert replaced(rig, s.on_acquire(A, ask(4, "z", "x"), 6.0), 2) == [["z", "x", "y"]]


def test_what_a_client_had_goes_with_it(rig):
    s = rig.scheduler
    begun(rig, s.on_acquire(A, ask(1, "x"), 0.0))
    s.on_ready(loaded("x"), USAGE, 0.1)
    commands = s.on_acquire(B, ask(2, "y"), 1.0)
    assert replaced(rig, commands + s.on_client_gone(A, 1.1)) == [["y"]]


def test_what_a_client_has_no_more_is_not_loaded_again(rig):
    """Its proxy is closed, or has other providers now."""
    s = rig.scheduler
    begun(rig, s.on_acquire(A, ask(1, "x", "old"), 0.0))
    s.on_ready(loaded("x", "old"), USAGE, 0.1)
    assert replaced(rig, s.on_acquire(A, ask(2, "new", "x"), 1.0)) == [["new", "x"]]


def test_who_waits_is_served_though_another_thread_did_not_know_of_it(rig):
    s = rig.scheduler
    begun(rig, s.on_acquire(A, ask(1, "x"), 0.0))
    s.on_acquire(A, ask(2, "y", "x", proxy=2), 0.1)
    s.on_acquire(A, ask(3, "x", proxy=1), 0.2)
    assert replaced(rig, s.on_ready(loaded("x"), USAGE, 0.3)) == [["x", "y"]]
    assert tickets(s.on_ready(loaded("x", "y", worker_id=2), USAGE, 6.0), control.Granted) == [2]


def test_what_the_file_has_no_more_is_not_loaded_again(rig):
    s = rig.scheduler
    terms = Terms(ttl=-1.0, pin=False, priority=0)
    s.on_configured(SETTINGS, {"x": terms, "old": terms}, {"group:g": [member("x"), member("old")]}, 0.0)
    assert begun(rig, s.on_acquire(A, ask(1, "x"), 0.1)) == [["x", "old"]]
    s.on_ready(loaded("x", "old"), USAGE, 0.2)
    s.on_configured(SETTINGS, {"x": terms, "new": terms}, {"group:g": [member("x"), member("new")]}, 0.3)
    assert replaced(rig, s.on_acquire(A, ask(2, "new", "x"), 1.0)) == [["x", "new"]]


# --- what it needs ----------------------------------------------------------------------------------------


def test_a_group_needs_gpu_memory_if_any_of_its_models_does(rig):
    """Also if another one is asked for."""
    s = rig.scheduler
    s.know_gpus(2000 << 20)
    cuda = member("cuda", providers=["CUDAExecutionProvider"])
    wanted = control.Acquire(
        ticket=1, proxy=1, spec=member("cpu"), companions=[cuda], terms=Terms(), file_bytes=100 << 20
    )
    begun(rig, s.on_acquire(A, wanted, 0.0))
    assert s.in_use(0.0).gpu == eviction.GPU_BASE + (150 << 20)


# --- what the host's file has ----------------------------------------------------------------------------


def test_an_eager_member_that_the_file_loses_while_it_loads_holds_nothing(rig):
    s, kept = rig.scheduler, Terms(ttl=-1.0, pin=False, priority=0)
    s.on_acquire(A, ask(1, "b"), 0.0)
    s.on_configured(SETTINGS, {"a": kept}, {"group:g": [member("a")]}, 0.1)
    s.on_acquire(HOST, msgspec.structs.replace(ask(0, "a", proxy=0), for_host=True), 0.1)
    s.on_configured(SETTINGS, {"b": kept}, {"group:g": [member("b")]}, 0.2)
    s.on_client_gone(A, 0.3)
    s.on_configured(SETTINGS, {}, {}, 0.4)
    assert starts(s.on_exited(1, exit_status(9), "", 0.5)) == []
    assert s.snapshot(0.5) == [] and not s.leases.holds_any


def test_the_host_lets_go_of_a_member_that_its_file_named_after_the_load(rig):
    s, kept = rig.scheduler, Terms(ttl=-1.0, pin=False, priority=0)
    begun(rig, s.on_acquire(A, ask(1, "b"), 0.0))
    s.on_ready(loaded("b"), USAGE, 0.1)
    s.on_configured(SETTINGS, {"b": kept}, {"group:g": [member("b")]}, 0.2)
    s.on_client_gone(A, 0.3)
    assert s.leases.holds_any
    s.on_configured(SETTINGS, {}, {}, 0.4)
    assert not s.leases.holds_any
