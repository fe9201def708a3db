"""Which workers are measured when the scheduler looks at all."""

from __future__ import annotations

from typing import Any

from onnx_dl.core.status import Usage
from onnx_dl.supervisor.measure.sampler import Sampler
from onnx_dl.transport.gauges import Reading
from tests.unit.supervisor.policy.test_early_starts import Rig, holds


class Probe:
    """Notes which processes are measured."""

    def __init__(self) -> None:
        self.pids: list[int] = []

    def measure(self, pid: int) -> Usage:
        self.pids.append(pid)
        return holds(2000 if pid == 101 else 500)

    def gpu_bytes(self, pid: int) -> int:
        return 0


class Processes:
    def readings(self) -> dict[int, Reading]:
        return {1: Reading(runs=1, last_used=1.0), 2: Reading()}


def test_a_process_is_measured_again_while_it_prepares() -> None:
    """Its context comes some time after it was first looked at."""
    rig = Rig(3000)
    rig.evict()
    rig.begin()
    probe: Any = Probe()
    processes: Any = Processes()
    sampler = Sampler(rig.scheduler, processes, None, list, _probe=probe)
    for _ in range(3):
        sampler.refresh(10.1)
    assert probe.pids == [101, 102, 102, 102]
    rig.gone()
    rig.scheduler.on_loading(2)
    probe.pids.clear()
    sampler.refresh(11.0)
    assert probe.pids == []
