"""When a standby worker is made."""

from __future__ import annotations

from onnx_dl.supervisor.processes.standby import LATEST, PAUSE, StandbyTiming


def test_none_before_the_first_load() -> None:
    assert StandbyTiming().due() is None


def test_one_after_a_load_and_a_pause() -> None:
    timing = StandbyTiming()
    timing.load_begins(1, 10.0)
    timing.load_ended(1, 10.5)
    assert timing.due() == 10.5 + PAUSE
    timing.made()
    assert timing.due() is None
    timing.load_ended(1, 11.0)  # the worker is gone
    assert timing.due() is None


def test_loads_that_overlap_delay_it_for_a_limited_time() -> None:
    timing = StandbyTiming()
    timing.load_begins(1, 10.0)
    timing.load_begins(2, 11.0)
    timing.load_ended(1, 11.5)
    assert timing.due() == 10.0 + LATEST
    timing.load_ended(2, 11.9)
    assert timing.due() == 11.9 + PAUSE
    timing.load_begins(3, 11.91)
    timing.load_ended(3, 11.99)
    assert timing.due() == 10.0 + LATEST


def test_a_load_that_is_used_up_by_a_worker_that_dies() -> None:
    timing = StandbyTiming()
    timing.load_begins(1, 0.0)
    timing.load_ended(1, 1.0)
    timing.load_ended(1, 5.0)  # its end comes after its readiness
    assert timing.due() == 1.0 + PAUSE
