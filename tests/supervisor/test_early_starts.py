"""A worker starts beside the one that is leaving: real processes; the figures of the GPU are made up."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper

from onnx_dl import EventType, InferenceSessionProxy, ModelHost
from onnx_dl.core.events import ModelEvent
from onnx_dl.system import boot
from tests.contract.both import F, model, node, tensor

_SUPERVISOR = """
import json, os, signal, sys
sys.path[:] = json.loads(sys.argv[1])[0]
from onnx_dl.protocol import control
from onnx_dl.supervisor import control as connections
from onnx_dl.supervisor.measure import sampler
from onnx_dl.supervisor.measure.memory_probe import MemoryProbe
from onnx_dl.supervisor.processes.worker_control import WorkerControl

END_IT = False

class Probe(MemoryProbe):
    loaded_ones = set()
    def loaded(self, pid):
        self.loaded_ones.add(pid)
    def _told_of(self, pid):
        is_there = pid in self.loaded_ones and os.path.exists(f"/proc/{pid}")
        return {0: 1000 << 20} if is_there else {}

def send(self, worker_id, message, plain=connections.Control.send_to_worker):
    if isinstance(message, control.Prepare):
        print("told to prepare", worker_id, file=sys.stderr, flush=True)
        if END_IT:
            os.kill(pids[worker_id], signal.SIGKILL)
    plain(self, worker_id, message)

pids = {}
def spawned(self, worker_id, pid, plain=WorkerControl.spawned):
    pids[worker_id] = pid
    plain(self, worker_id, pid)

def ready(self, message, now, plain=WorkerControl._on_ready):
    assert not self.scheduler.fleet.find(message.worker_id)[1].early, "it never said that it loads"
    return plain(self, message, now)

WorkerControl.spawned, WorkerControl._on_ready = spawned, ready

sampler.MemoryProbe = Probe
connections.Control.send_to_worker = send
from onnx_dl.supervisor.main import main
main()
"""
CUDA = ["CUDAExecutionProvider", "CPUExecutionProvider"]


def added(number: float) -> bytes:
    """y = x + number."""
    nodes = [node("Add", ["x", "number"], ["y"])]
    values = [numpy_helper.from_array(np.array([number], np.float32), "number")]
    return model(nodes, [tensor("x", F, [1])], [tensor("y", F, [1])], values)


def taken_turns(number: int) -> list[ModelEvent]:
    """Two models are called by turns.  Returns what happened to them.

    Each has 1000 MiB on the GPU.  One of them and a context fit, two do not.
    """
    with ModelHost(gpu_memory_limit={0: 1800 << 20}) as host:
        proxies = [InferenceSessionProxy(added(number), providers=CUDA, host=host) for number in (2.0, 3.0)]
        for proxy in proxies:  # what a model needs is known from its first load on
            proxy.load()
            proxy.unload()
        before = host.snapshot().seq
        for turn in range(number):
            (result,) = proxies[turn % 2].run(None, {"x": np.ones(1, np.float32)})
            assert result == [3.0 + turn % 2]
            assert host.snapshot().gpu_memory_in_use_on == {0: 1000 << 20}
        events = [event for event in host.recent_events() if event.seq > before]
    return [event for event in events if event.type != EventType.THRASH]


@pytest.mark.slow
def test_models_take_turns_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A process that comes late loads at once."""
    monkeypatch.setattr(boot, "_BOOT", _SUPERVISOR)
    seen = [event.type for event in taken_turns(6)]
    warm = [EventType.DRAINING, EventType.LOADING, EventType.UNLOADED, EventType.READY]
    assert seen == [EventType.LOADING, EventType.READY] + 5 * warm, "it starts early, and loads in its time"
    assert "told to prepare" in capfd.readouterr().err


@pytest.mark.slow
def test_a_process_that_dies_before_its_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each load has its result.  None has failed, and each begins in the process that comes next."""
    monkeypatch.setattr(boot, "_BOOT", _SUPERVISOR.replace("END_IT = False", "END_IT = True"))
    events = taken_turns(6)
    lost = [event for event in events if (event.type, event.reason) == (EventType.UNLOADED, "crash")]
    assert lost, "none was told to prepare"
    assert all("SIGKILL" in str(event.detail) for event in lost)
    assert not [event for event in events if event.type == EventType.FAILED]
    assert len([event for event in events if event.type == EventType.READY]) == 6
