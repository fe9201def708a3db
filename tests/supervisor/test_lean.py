"""What lies around while nothing runs: pages, libraries, wake-ups.  Sizes are bounds; figures are in docs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from onnx_dl import InferenceSessionProxy, ModelHost
from onnx_dl.demo.assets import model_path
from tests.support.waiting import eventually, family, template_of, with_standby, worker_pid

FEED = {"pixels": np.linspace(0, 16, 128, dtype=np.float32).reshape(2, 64)}
WINDOW = 0.3
"""Seconds; whatever polls more often than this is found out."""


@pytest.fixture
def digits(host: ModelHost) -> InferenceSessionProxy:
    proxy = InferenceSessionProxy(model_path("digits"), ttl=3600, host=host)
    for _ in range(20):
        proxy.run(None, FEED)
    return proxy


def mapped(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def activity(pids: list[int]) -> tuple[list[int], float]:
    """How often the threads of these processes went to sleep or were put to sleep, and their CPU seconds."""
    lines = [
        line
        for pid in pids
        for task in Path(f"/proc/{pid}/task").iterdir()
        for line in (task / "status").read_text().splitlines()
    ]
    switches = [int(line.split()[1]) for line in lines if "ctxt_switches" in line]
    return switches, sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


def test_the_supervisor_carries_no_numbers(digits: InferenceSessionProxy, host: ModelHost) -> None:
    supervisor = host.snapshot().supervisor_pid or 0
    digits.load()
    template = template_of(host).pid
    for library in ("_multiarray_umath", "onnxruntime_pybind11_state"):
        assert library not in mapped(supervisor)
        assert library in mapped(template), "the name that is looked for is right"


def test_the_supervisor_imports_what_it_needs() -> None:
    """No reader of host files, no server of metrics, unless they are asked for; no terminal, no database, no
    reader of packages, no temporary files."""
    unwanted = {
        *(
            "asyncio",
            "http",
            "numpy",
            "onnxruntime",
            "prometheus_client",
            "rich",
            "sqlite3",
            "tomllib",
            "zmq",
        ),
        *("zmq", "email", "importlib.metadata", "importlib.resources", "pynvml", "tempfile"),
    }
    script = (
        "import sys, onnx_dl.supervisor.main, onnx_dl.supervisor.loop; "
        "from onnx_dl.supervisor.measure.memory_probe import MemoryProbe; MemoryProbe(); print(*sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "onnx_dl.supervisor.policy.scheduler" in found.split()
    assert not unwanted & set(found.split())


def test_a_small_worker_has_little_of_its_own(digits: InferenceSessionProxy, host: ModelHost) -> None:
    assert psutil.Process(worker_pid(host)).memory_full_info().uss < 16e6


def test_idle_processes_are_not_woken(digits: InferenceSessionProxy, host: ModelHost) -> None:
    supervisor = host.snapshot().supervisor_pid or 0
    with_standby(supervisor)
    pids = [process.pid for process in family(supervisor)]
    assert len(pids) == 4  # supervisor, template, worker, standby worker

    def at_rest() -> bool:
        before = activity(pids)
        time.sleep(WINDOW)
        return activity(pids) == before

    eventually(at_rest, f"{WINDOW} s in which no thread of these wakes or runs")
