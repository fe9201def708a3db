"""The benchmarks run; how fast anything is, no test says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def _run(tmp_path: Path, *names: str) -> tuple[str, dict[str, Any]]:
    target = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "--json", str(target), "--only", *names],
        cwd=ROOT,
        env=os.environ | {"ONNX_DL_LANE": "socket"},  # the steps of a call are those of a bell
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(target.read_text())


def test_a_table_and_json_come_of_a_quick_run(tmp_path: Path) -> None:
    table, found = _run(tmp_path, "tiny")
    assert found.keys() == {"machine", "rounds", "rows"}
    rows = {row["way"]: row for row in found["rows"]}
    ours = rows["onnx-dl"]
    assert ours.keys() == {
        *("work", "way", "value", "unit", "least", "most", "p99"),
        *("limit", "at_least", "met", "floor", "note"),
    }
    assert rows["in-process"]["value"] > 0
    assert ours["met"] == (ours["value"] <= ours["limit"])
    assert all(f"  {way}  " in table for way in rows)


def test_every_step_of_a_call_is_found_by_the_breakdown(tmp_path: Path) -> None:
    table, found = _run(tmp_path, "breakdown")
    for kind in found["breakdown"]:
        assert min(kind["steps"]) >= 0
        assert sum(kind["steps"]) == pytest.approx(kind["with stamps"], rel=0.5)
    assert "wake the worker" in table
