"""What is written for a GPU, executed without one: it would rot, because few machines have one.

Says nothing about a GPU: sessions compute on the CPU, and CUDA's driver, torch and NVML are stand-ins.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import dry_gpu

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow

FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "gpu").glob("test_*.py"))
FEWER = "(not 5mb and not conv) or shared_memory"
"""Each test, but not with each model."""
SMALL = """
import sys
from benchmarks.gpu import loads, works
from benchmarks.models import convolutions, heavy
works.images = lambda batch: convolutions(layers=2, channels=4, size=256, batch=batch)
loads.heavy = lambda layers: heavy(layers=2)
from benchmarks.gpu.__main__ import main
main(sys.argv[1:])
"""
"""The benchmark with models that a CPU computes in no time."""


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python there."""
    environment = {n: v for n, v in dry_gpu.environment(folder).items() if "XDIST" not in n}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment | {"PYTEST_ADDOPTS": "-p no:cacheprovider"},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.parametrize("file", FILES)
def test_the_tests_of_a_gpu_pass_on_stand_ins(tmp_path: Path, file: str) -> None:
    done = _run(tmp_path, "-m", "pytest", "-m", "gpu", "-n", "0", "-q", "--tb=short", "-k", FEWER, file)
    assert done.returncode == 0, done.stdout[-8000:]
    (count,) = re.findall(r"^\d+ passed.* in ", done.stdout, re.MULTILINE)
    assert "skipped" not in count


def test_the_benchmark_runs_on_stand_ins(tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    done = _run(tmp_path, "-c", SMALL, "--rounds", "1", "--json", os.fspath(target))
    assert done.returncode == 0, done.stderr
    rows = json.loads(target.read_text())["rows"]
    assert len(rows) > 30 and not [row for row in rows if row["value"] is None]
