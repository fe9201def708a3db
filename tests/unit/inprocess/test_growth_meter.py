"""The growth of the process is shared among its loads."""

from __future__ import annotations

from onnx_dl.inprocess.memory import GrowthMeter, usage_of


def test_loads_one_after_another() -> None:
    meter = GrowthMeter()
    meter.begin(1, 100)
    assert meter.growth(1, 140) == 40
    assert meter.end(1, 150) == 50
    meter.begin(2, 150)
    assert meter.end(2, 170) == 20


def test_loads_at_the_same_time_add_up_to_the_growth() -> None:
    meter = GrowthMeter()
    meter.begin(1, 100)
    meter.begin(2, 130)
    assert (meter.end(1, 180), meter.end(2, 220)) == (80, 40)
    meter.begin(1, 100)
    meter.begin(2, 130)
    assert (meter.end(2, 180), meter.end(1, 220)) == (50, 70)


def test_a_process_that_shrinks_has_not_grown() -> None:
    meter = GrowthMeter()
    meter.begin(1, 100)
    assert meter.end(1, 90) == 0
    assert meter.end(2, 500) == 0  # it never began


def test_a_model_counts_at_least_its_files() -> None:
    assert usage_of(10, 30).pss == 30
    assert usage_of(50, 30).private == 50
