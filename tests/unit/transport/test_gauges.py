"""What a worker tells of itself: words that both processes see."""

from __future__ import annotations

import os

import pytest

from onnx_dl.transport.gauges import BUCKETS, Gauges, Page, Reading, bound, bucket


@pytest.mark.parametrize("nanoseconds", [0, 1, 4, 5, 7, 8, 999, 10**3, 123_456, 10**9, 10**12, 10**15])
def test_a_bucket_bounds_what_is_counted_in_it(nanoseconds: int) -> None:
    index = bucket(nanoseconds)
    assert 0 <= index < BUCKETS
    seconds = min(nanoseconds, (1 << 42) - 1) / 1e9
    assert seconds < bound(index)
    assert nanoseconds < 8 or bound(index) <= seconds * 1.25 + 1e-9


def test_bounds_ascend() -> None:
    bounds = [bound(index) for index in range(BUCKETS)]
    assert bounds == sorted(set(bounds))


def test_the_median_of_nothing() -> None:
    assert Reading().quantile(0.5) is None
    assert Gauges().read().quantile(0.5) is None


def test_what_is_written_is_read_through_the_other_mapping() -> None:
    ours = Page()
    theirs = Page(os.dup(ours.fd))
    for milliseconds in (1, 1, 2, 50):
        theirs.gauges.answered(1234.0, 3, milliseconds / 1000)
    theirs.gauges.used(1234.5, 2)
    theirs.gauges.exceeded(10**9)
    theirs.close()
    reading = ours.gauges.read()
    ours.close()
    assert (reading.runs, reading.busy, reading.last_used, reading.exceeded) == (4, 2, 1234.5, 10**9)
    assert reading.total == pytest.approx(0.054)
    assert 0.001 <= (reading.quantile(0.5) or 0) <= 0.00125
    assert 0.05 <= (reading.quantile(1.0) or 0) <= 0.0625


def test_a_worker_cannot_shorten_it() -> None:
    """The supervisor would get SIGBUS when it reads."""
    page = Page()
    with pytest.raises(PermissionError):
        os.ftruncate(page.fd, 0)
    assert page.gauges.read().latencies == (0,) * BUCKETS
    page.close()


def test_a_worker_that_writes_no_times() -> None:
    for wrong in (float("nan"), float("inf"), -1.0):
        page = Page()
        page.gauges.answered(wrong, 1, 0.001)
        page.gauges.answered(wrong, 0, 0.002)
        reading = page.gauges.read()
        page.close()
        assert (reading.runs, reading.last_used, reading.total) == (2, 0.0, pytest.approx(0.003))
