"""The scheduler under limits by device."""

from __future__ import annotations

import msgspec
import pytest

from onnx_dl.core.status import Usage
from onnx_dl.protocol import control as m
from onnx_dl.supervisor.policy.gpu_devices import HostGpus, MachineGpu
from onnx_dl.supervisor.policy.measuring import Sample
from onnx_dl.supervisor.policy.memory_amount import MemoryAmount
from onnx_dl.supervisor.policy.requirements import Peak, Requirement
from onnx_dl.supervisor.policy.scheduler import Scheduler
from onnx_dl.supervisor.processes.worker_process import exit_status
from onnx_dl.transport.gauges import Reading
from tests.support.builders import SETTINGS, A, acquire, kill, order, ready, starts
from tests.unit.supervisor.policy.test_admission import denied, told_to_load

MB = 1 << 20
LIMITS = {0: 1000 * MB, 1: 500 * MB}


def on_device(ticket: int, key: str, *devices: int, file_mb: int = 0) -> m.Acquire:
    ask = acquire(ticket, ticket, key=key)
    providers = [["CUDAExecutionProvider", {"device_id": str(device)}] for device in devices]
    spec = msgspec.structs.replace(ask.spec, providers=providers)
    return msgspec.structs.replace(ask, spec=spec, file_bytes=file_mb * MB)


def used(gpu: int, on: dict[int, int] | None = None) -> Usage:
    by_device = {number: mb * MB for number, mb in (on or {}).items()}
    return Usage(rss=MB, pss=MB, peak=MB, gpu=gpu * MB, gpus=by_device)


def settings(limits: dict[int, int] | int = LIMITS):
    return msgspec.structs.replace(SETTINGS, gpu_memory_limit=limits, room_timeout=30.0)


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(settings())


def load(scheduler: Scheduler, ask: m.Acquire, worker_id: int, usage: Usage, now: float = 0.0) -> None:
    assert starts(scheduler.on_acquire(A, ask, now))
    scheduler.on_spawned(worker_id, 100 + worker_id)
    scheduler.on_ready(ready(worker_id), usage, now)


def idle(gpu: int) -> Sample:
    return Sample(used(gpu), Reading(runs=1, last_used=1.0))


def test_a_full_device_is_no_obstacle_on_another(scheduler: Scheduler) -> None:
    load(scheduler, on_device(1, "a", 0), 1, used(900))
    assert scheduler.in_use(0.0).devices == {0: 900 * MB}
    load(scheduler, on_device(2, "b", 1), 2, used(400))
    assert not starts(scheduler.on_acquire(A, on_device(3, "c", 1), 10.0))
    commands = scheduler.on_tick(10.0, {1: idle(900), 2: idle(400)})
    assert commands == [order(2, m.DrainIfIdle())], "only what lies on that device makes way"


def test_a_device_counts_until_the_driver_has_it_back(scheduler: Scheduler) -> None:
    load(scheduler, on_device(1, "a", 1), 1, used(400))
    scheduler.on_acquire(A, on_device(2, "b", 1), 10.0)
    scheduler.on_tick(10.0, {1: idle(400)})
    scheduler.on_draining(1, used(400), 10.0, "evicted")
    scheduler.on_drained(1, used(400), 10.0)
    assert not starts(scheduler.on_exited(1, exit_status(0), "", 10.0))
    assert scheduler.in_use(10.0).devices == {1: 400 * MB}
    scheduler.on_tick(10.0, {1: Sample(Usage(gpu=400 * MB))})  # its process starts, see test_early_starts.py
    scheduler.on_spawned(2, 102)
    assert not told_to_load(scheduler.on_started(2))
    assert told_to_load(scheduler.on_tick(10.05, {1: Sample(Usage())}))


def test_a_device_without_a_limit(scheduler: Scheduler) -> None:
    load(scheduler, on_device(1, "a", 2), 1, used(90_000))
    load(scheduler, on_device(2, "b", 2), 2, used(90_000))


def test_a_device_has_a_share_of_its_memory_if_it_is_given_none(scheduler: Scheduler) -> None:
    gpus = [MachineGpu(f"GPU-{n}", "H100", 1000 * MB) for n in range(3)]
    scheduler.know_gpus(3000 * MB, HostGpus.of(gpus, {}))
    assert scheduler.limits.memory.devices == {0: 1000 * MB, 1: 500 * MB, 2: 800 * MB}
    assert scheduler.gpu_memory_limit == 2300 * MB
    scheduler.know_gpus(3000 * MB, HostGpus.of(gpus, {"CUDA_VISIBLE_DEVICES": "2"}))
    assert scheduler.limits.memory.devices == LIMITS


def test_what_a_device_can_never_hold_is_refused(scheduler: Scheduler) -> None:
    scheduler.on_acquire(A, on_device(1, "a", 1), 0.0)
    scheduler.on_spawned(1, 101)
    assert kill(1) in scheduler.on_ready(ready(1), used(600), 0.0)
    error = denied(scheduler.on_exited(1, exit_status(9), "", 5.0))
    assert (error.resource, error.needed, error.limit) == ("gpu memory", 600 * MB, 500 * MB)
    assert "a.onnx needs about 629.1 MB of GPU memory on device 1" in str(error)
    assert "Raise gpu_memory_limit" in str(error)


def test_a_guess_is_reduced_to_the_device(scheduler: Scheduler) -> None:
    assert starts(scheduler.on_acquire(A, on_device(1, "a", 1, file_mb=900), 0.0))
    assert scheduler.in_use(0.0) == MemoryAmount(scheduler.in_use(0.0).ram, 500 * MB, {1: 500 * MB})


def test_figures_of_a_host_without_limits_by_device_count_on_the_device() -> None:
    """They were stored without a device, or with the number that it had on another host."""
    for devices in ({}, {3: 400 * MB}):
        known = Requirement(
            load=Peak(MB),
            steady=MemoryAmount(MB, 400 * MB, devices),
            peak=MemoryAmount(MB, 400 * MB, devices),
        )
        scheduler = Scheduler(settings(), known={"a": known, "b": known}.get)
        assert starts(scheduler.on_acquire(A, on_device(1, "a", 1), 0.0))
        assert scheduler.in_use(0.0).devices == {1: 400 * MB}
        assert not starts(scheduler.on_acquire(A, on_device(2, "b", 1), 0.0))


def test_a_model_on_two_devices_counts_as_it_was_measured(scheduler: Scheduler) -> None:
    load(scheduler, on_device(1, "a", 0, 1), 1, used(700, {0: 400, 1: 300}))
    assert scheduler.in_use(0.0).devices == {0: 400 * MB, 1: 300 * MB}


def test_one_total_is_as_before() -> None:
    scheduler = Scheduler(settings(1000 * MB))
    load(scheduler, on_device(1, "a", 0), 1, used(600))
    assert not starts(scheduler.on_acquire(A, on_device(2, "b", 1, file_mb=200), 0.0))


def test_limits_by_device_may_follow_a_total() -> None:
    scheduler = Scheduler(settings(2000 * MB))
    load(scheduler, on_device(1, "a", 0), 1, used(600))
    assert scheduler.on_configured(settings({0: 500 * MB}), {}, {}, 10.0) == []
    assert scheduler.on_tick(10.0, {1: idle(600)}) == [order(1, m.DrainIfIdle())]
