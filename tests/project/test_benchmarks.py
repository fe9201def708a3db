"""The benchmarks run; how fast anything is, no test says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks import bound
from benchmarks.breakdown import STEPS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


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
        assert len(kind["steps"]) == len(STEPS)
        assert min(kind["steps"]) >= 0 < sum(kind["steps"])
    assert all(step in table for step in STEPS)


def test_a_capped_host_is_compared_with_the_other_ways(tmp_path: Path) -> None:
    table, found = _run(tmp_path, "capped")
    ways = {result["way"]: result for result in found["capped"]}
    assert ways.keys() == {"capped", "capped cached", "all", "all cached", "lru"}
    for result in ways.values():
        assert result["loads"] >= 4 and result["peak"] > 0  # four models are asked for
        assert result["hit_rate"] == pytest.approx(1 - result["loads"] / result["requests"])
        assert result["p99"] >= result["load_p50"] > result["hit_p50"] > 0
        assert 0 < result["loading"] < result["waited_for_loads"] < result["trace"]
    assert ways["all"]["loads"] == ways["all cached"]["loads"] == 4
    assert min(ways["capped"]["loads"], ways["lru"]["loads"]) > 4  # some had to go
    assert ways["lru"]["peak_workers"] == 0 < ways["capped"]["peak_workers"] < ways["all"]["peak_workers"]
    assert "load cache warm" in table


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler to make the stand-in with")
def test_calls_that_are_bound_to_a_stand_in_for_a_gpu(tmp_path: Path) -> None:
    _table, found = _run(tmp_path, "bound")
    works = {row["work"] for row in found["rows"]}
    assert works == {bound.ON_DEVICE, bound.ON_HOST}
    assert all(row["value"] is not None for row in found["rows"])
