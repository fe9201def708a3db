"""Processes that start beside a worker that is leaving, before there is memory for their loads."""

from __future__ import annotations

import msgspec
import pytest

from onnx_dl.core.lifecycle import ModelState
from onnx_dl.core.status import Usage
from onnx_dl.protocol import control as m
from onnx_dl.protocol import failures
from onnx_dl.supervisor.policy.commands import KillWorker
from onnx_dl.supervisor.policy.early_starts import CONTEXT, can_prepare
from onnx_dl.supervisor.policy.measuring import Sample
from onnx_dl.supervisor.policy.memory_amount import MemoryAmount
from onnx_dl.supervisor.policy.requirements import Peak, Requirement
from onnx_dl.supervisor.policy.scheduler import Scheduler
from onnx_dl.supervisor.processes.worker_process import exit_status
from onnx_dl.transport.gauges import Reading
from tests.support.builders import SETTINGS, A, B, acquire, order, ready, spec, starts, told, unload
from tests.unit.supervisor.policy.test_admission import denied, told_to_load

MB = 1 << 20
KILLED = exit_status(9)
CPU = ["CPUExecutionProvider"]
CUDA = [["CUDAExecutionProvider", {"device_id": "1"}], *CPU]


def on_gpu(ticket: int, key: str, **fields: object) -> m.Acquire:
    ask = acquire(ticket, ticket, key=key)
    return msgspec.structs.replace(
        ask, spec=msgspec.structs.replace(ask.spec, **{"providers": CUDA, **fields})
    )


def holds(gpu: int, *, estimated: bool = False) -> Usage:
    """What a worker has: 600 MB of RAM, and so much on its GPU."""
    ram = 600 * MB
    return Usage(rss=ram, pss=ram, peak=ram, gpu=gpu * MB, gpu_estimated=estimated)


def needs(gpu: int) -> Requirement:
    """A model that was measured before."""
    amount = MemoryAmount(600 * MB, gpu * MB)
    return Requirement(load=Peak(600 * MB), steady=amount, peak=amount)


KNOWN = needs(2000)


class Rig:
    """A GPU on which model a has 2000 MB.  Model b is wanted, which needs as much."""

    def __init__(
        self, gpu: int, ram: int | None = None, known: Requirement | None = KNOWN, **fields: object
    ) -> None:
        """``gpu``, ``ram``: the limits in MB; ``known``: of b; ``fields``: of its spec."""
        limits = {"gpu_memory_limit": gpu * MB, "memory_limit": None if ram is None else ram * MB}
        settings = msgspec.structs.replace(SETTINGS, room_timeout=30.0, **limits)
        self.scheduler = s = Scheduler(settings, known={"b": known}.get)
        s.on_acquire(A, on_gpu(1, "a"), 0.0)
        s.on_spawned(1, 101)
        s.on_ready(ready(1), holds(2000), 0.0)
        ask = msgspec.structs.replace(on_gpu(2, "b", **fields), file_bytes=1000 * MB)
        assert s.on_acquire(B, ask, 10.0) == []

    def evict(self, usage: Usage | None = None) -> list:
        """Model a leaves.  Returns what is done when it says so."""
        usage = usage or holds(2000)
        sample = Sample(usage, Reading(runs=1, last_used=1.0))
        assert self.scheduler.on_tick(10.0, {1: sample}) == [order(1, m.DrainIfIdle())]
        return self.scheduler.on_draining(1, usage, 10.0, "evicted")

    def gone(self, at: float = 10.5) -> list:
        """Model a has ended, and the driver has its memory back.  Returns what is done then."""
        s = self.scheduler
        commands = [*s.on_drained(1, Usage(), at), *s.on_exited(1, exit_status(0), "", at)]
        return [*commands, *s.on_tick(at, {1: Sample(Usage())}), *s.on_tick(at + 0.05, {1: Sample(Usage())})]

    def begin(self) -> list:
        """The process of model b is there.  Returns what it is told."""
        return [*self.scheduler.on_spawned(2, 102), *self.scheduler.on_started(2)]

    @property
    def state(self) -> ModelState:
        return self.scheduler.fleet.models["b"].state


@pytest.fixture
def rig() -> Rig:
    """Both models do not fit; one of them and a context do."""
    return Rig(3000)


def test_a_process_and_its_context_start_beside_the_worker_that_leaves(rig: Rig) -> None:
    assert starts(rig.evict())
    assert rig.begin() == [order(2, m.Prepare(device_id=1))], "it loads nothing"
    assert rig.scheduler.in_use(10.0).gpu == 2000 * MB + CONTEXT.gpu < 3000 * MB
    (load,) = told_to_load(rig.gone())
    assert load.spec.key == "b"
    assert rig.scheduler.in_use(11.0).gpu == 2000 * MB, "what it got before is a part of what it needs"
    assert told(rig.scheduler.on_ready(ready(2), holds(2000), 11.0), m.Granted)


def test_a_process_that_comes_late_loads_at_once(rig: Rig) -> None:
    assert starts(rig.evict())
    assert not told_to_load(rig.gone()), "there is nobody to tell"
    assert told_to_load(rig.begin())


def test_a_process_without_a_context_where_that_does_not_fit() -> None:
    rig = Rig(2500)
    assert starts(rig.evict()) and rig.begin() == []
    assert rig.scheduler.in_use(10.0).gpu == 2000 * MB
    assert told_to_load(rig.gone())


def test_nothing_starts_that_does_not_fit_beside_it() -> None:
    rig = Rig(2500, ram=610)
    assert not starts(rig.evict())
    assert starts(rig.gone())


def test_a_model_that_was_never_measured_makes_no_context() -> None:
    rig = Rig(3000, known=None)
    assert starts(rig.evict()) and rig.begin() == []


def test_models_without_a_gpu_wait() -> None:
    rig = Rig(3000, ram=1000, providers=CPU, known=needs(0))
    assert not starts(rig.evict())
    assert starts(rig.gone())


def test_loads_wait_where_the_driver_tells_nothing_of_processes(rig: Rig) -> None:
    """What becomes less on the whole device is taken for the model's: nobody else may leave meanwhile."""
    assert not starts(rig.evict(holds(2000, estimated=True)))


def test_nothing_starts_until_what_leaves_is_enough() -> None:
    rig = Rig(4000, known=needs(3700))
    s = rig.scheduler
    s.on_withdraw(B, m.Withdraw(ticket=2, proxy=2, keep=False), 10.0)
    assert starts(s.on_acquire(A, on_gpu(3, "c"), 10.0))
    s.on_spawned(2, 102)
    s.on_ready(ready(2), holds(1000), 10.0)
    assert not starts(s.on_acquire(B, on_gpu(4, "b"), 11.0))
    assert not starts(s.on_draining(1, holds(2000), 11.0, "evicted")), "c has to leave, too"
    assert starts(s.on_draining(2, holds(1000), 11.0, "evicted"))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, True),
        ({"engine": "onnx_mlir"}, False),
        ({"sandbox": True}, False),
        ({"providers": ["TensorrtExecutionProvider"]}, False),
        ({"options": {"config": {"session.set_denormal_as_zero": "1"}}}, False),
    ],
)
def test_who_can_have_a_context_before_its_model(fields: dict, expected: bool) -> None:
    assert can_prepare(spec(**({"providers": CUDA} | fields))) is expected


def test_a_load_that_is_refused_ends_its_process(rig: Rig) -> None:
    rig.evict()
    rig.begin()
    commands = rig.scheduler.on_tick(40.1)
    assert denied(commands).resource == "gpu memory" and KillWorker(2) in commands
    assert rig.state is ModelState.DRAINING
    rig.scheduler.on_exited(2, KILLED, "", 40.2)
    assert "b" not in rig.scheduler.fleet.models
    rig.scheduler.on_measured(2, Sample(Usage()), 40.3)
    assert rig.scheduler.in_use(40.3).gpu == 2000 * MB


def test_a_load_that_nobody_wants_any_more_ends_its_process(rig: Rig) -> None:
    rig.evict()
    assert KillWorker(2) in rig.scheduler.on_withdraw(B, m.Withdraw(ticket=2, proxy=2, keep=False), 10.1)
    rig.scheduler.on_exited(2, KILLED, "", 10.2)
    assert not starts(rig.gone()) and rig.scheduler.admission.pending == {}


def test_a_group_waits() -> None:
    """It may get members until its load begins, which would have to wait for the next one."""
    rig = Rig(3000, group="g")
    assert not starts(rig.evict())
    assert starts(rig.gone())


def test_a_load_that_is_repeated_comes_first(rig: Rig) -> None:
    """It may need all memory that there is."""
    s = rig.scheduler
    rig.evict()
    rig.begin()
    s.on_acquire(A, on_gpu(5, "c"), 10.1)  # waits behind b
    model = s.fleet.models["c"]
    s.orders.carry_out(s.admission.want_again(model, model.spec, 10.2, alone=True))
    assert KillWorker(2) in s.outbox.take() and rig.state is ModelState.DRAINING
    s.on_exited(2, KILLED, "", 10.3)
    assert list(s.admission.pending) == ["c", "b"], "b keeps its place"


def test_an_unload_ends_the_process_and_the_load_goes_on(rig: Rig) -> None:
    rig.evict()
    rig.begin()
    assert KillWorker(2) in rig.scheduler.on_unload(A, unload(9, "b"), 10.1)
    assert told(rig.scheduler.on_exited(2, KILLED, "", 10.2), m.Unloaded)
    assert starts(rig.gone())


def test_a_process_ends_if_nobody_looks_for_memory_any_more(rig: Rig) -> None:
    rig.evict()
    commands = rig.scheduler.on_stuck(failures.describe(ValueError("a bug")), 10.1)
    assert told(commands, m.Denied) and KillWorker(2) in commands
