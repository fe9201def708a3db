"""Counts of the threads that want a core."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnx_dl.system import free_cores


def test_this_thread_runs():
    assert (free_cores.running_threads() or 0) >= 1


@pytest.mark.parametrize("text", ["", "0.1 0.2", "0.1 0.2 0.3 x/7 9", "0.00 0.00 0.00 0/0 0"])
def test_what_cannot_be_counted_is_no_free_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str):
    (tmp_path / "loadavg").write_text(text)
    assert free_cores.running_threads(tmp_path / "loadavg") is None
    assert free_cores.running_threads(tmp_path / "missing") is None
    monkeypatch.setattr(free_cores, "running_threads", lambda: None)
    assert not free_cores.have_one()


@pytest.mark.parametrize("running, free", [(2, True), (3, False)])
def test_as_many_threads_may_run_as_there_are_cores(
    monkeypatch: pytest.MonkeyPatch, running: int, free: bool
):
    monkeypatch.setattr(free_cores, "usable_processors", lambda: 8)
    monkeypatch.setattr(free_cores, "_most_processors", lambda: 2)
    monkeypatch.setattr(free_cores, "running_threads", lambda: running)
    assert free_cores.have_one() is free
