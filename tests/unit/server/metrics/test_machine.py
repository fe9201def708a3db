"""Figures of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnx_dl.server.metrics.machine import Machine, MachineFigures, processor_times

MEMORY = "MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:   400 kB\nHugePages_Total: 0\n"


def write(proc: Path, user: int, idle: int, iowait: int = 0) -> None:
    (proc / "stat").write_text(f"cpu  {user} 0 0 {idle} {iowait} 0 0 0 {user} 0\ncpu0 1 1 1 1\n")
    (proc / "meminfo").write_text(MEMORY)


def test_utilization_is_since_the_last_reading(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    write(tmp_path, 100, 300)
    assert machine.read().utilization == pytest.approx(0.25)
    write(tmp_path, 190, 305, 5)
    figures = machine.read()
    assert figures.utilization == pytest.approx(0.9)
    assert machine.read().utilization == 0.0
    assert (figures.memory_total, figures.memory_used) == (1000 * 1024, 600 * 1024)


def test_without_proc_there_are_no_figures(tmp_path: Path) -> None:
    assert Machine(tmp_path / "gone").read()[:3] == MachineFigures()[:3]


@pytest.mark.parametrize("stat", ["", "cpu 1 2\n", "cpu0 1 2 3 4 5\n"])
def test_a_stat_that_says_nothing(stat: str) -> None:
    assert processor_times(stat) is None
