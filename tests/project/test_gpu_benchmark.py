"""The benchmark on a GPU: without one it says so.  How fast anything is, no test says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.gpu import machine

from onnx_dl.supervisor.measure.memory_probe import gpus

ROOT = Path(__file__).parents[2]


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


def _is_there() -> bool:
    try:
        return bool(gpus())
    except OSError:
        return False


def test_without_a_gpu_nothing_is_measured() -> None:
    if _is_there():
        pytest.skip("this machine has a GPU")
    done = _run()
    assert done.returncode == 1
    assert done.stderr.startswith("There is nothing to measure: there is no NVIDIA GPU")
    assert done.stdout == ""


def test_the_reason_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("NVML is broken")

    monkeypatch.setattr(machine, "gpus", broken)
    assert machine.why_not(b"") == "there is no NVIDIA GPU: NVML is broken"
    monkeypatch.setattr(machine, "gpus", list)
    assert machine.why_not(b"") == "there is no NVIDIA GPU"


@pytest.mark.gpu
@pytest.mark.slow
def test_a_table_and_json_come_of_a_quick_run(tmp_path: Path) -> None:
    if not _is_there():
        pytest.skip("there is no NVIDIA GPU")
    target = tmp_path / "found.json"
    done = _run("--quick", "--only", "tiny", "conv", "device", "--json", str(target))
    assert done.returncode == 0, done.stderr
    found = json.loads(target.read_text())
    assert {"in-process", "onnx-dl", "onnx-dl, latency low"} <= {row["way"] for row in found["rows"]}
    assert all(row["value"] is not None for row in found["rows"])
    assert "all on the device" in done.stdout
