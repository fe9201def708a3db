"""The benchmark of the server runs without its peers; how fast anything is, no test says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tritonclient.http")
pytest.importorskip("tritonclient.grpc")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def test_a_table_and_json_come_of_a_quick_run_without_peers(tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    environ = {name: value for name, value in os.environ.items() if name != "ONNX_DL_BENCH_PEERS"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serving", "--quick", "--only", "tiny", "--json", str(target)],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(target.read_text())
    ways = {"HTTP", "HTTP + shm", "gRPC", "gRPC + shm", "JSON"}
    measured = {row["work"].split(", ")[2] for row in found["rows"] if row["way"] == "onnx-dl"}
    assert measured == ways
    mapped = {row["work"].split(", ")[2] for row in found["rows"] if row["way"] == "onnx-dl, mapped"}
    assert mapped == {"HTTP + shm", "gRPC + shm"}
    assert all(row["value"] > 0 for row in found["rows"] if row["way"].startswith("onnx-dl"))
    missing = {row["way"]: row["note"] for row in found["rows"] if row["value"] is None}
    assert missing == {"Triton": "no --peers", "MLServer": "no --peers"}
    assert "tiny Add, 1x16, HTTP, p50" in done.stdout
