"""Counts of inferences."""

from __future__ import annotations

import sys
import threading
import time

from onnx_dl.server.inference.statistics import Durations, Statistics, merged
from onnx_dl.server.interfaces import DurationCount, VersionStatistics


def test_a_request_is_pending_until_it_ends() -> None:
    statistics = Statistics()
    counts = statistics.begin("m", "2")
    assert [(each.name, each.version, each.pending) for each in statistics.snapshot()] == [("m", "2", 1)]
    before = int(time.time() * 1000)
    statistics.succeed(counts, 8, 1000, Durations(1, 20, 300, 4000))
    (found,) = statistics.snapshot()
    assert found.last_inference_ms >= before
    found.last_inference_ms = 0
    assert found == VersionStatistics(
        name="m", version="2", inference_count=8, execution_count=1, success=DurationCount(1, 1000),
        queue=DurationCount(1, 1), compute_input=DurationCount(1, 20), compute_infer=DurationCount(1, 300),
        compute_output=DurationCount(1, 4000),
    )  # fmt: skip


def test_failures_count_by_reason_and_are_no_inferences() -> None:
    statistics = Statistics()
    for reason in ("OTHER", "REJECTED", "OTHER"):
        statistics.fail(statistics.begin("m", "1"), reason, 5)  # type: ignore[arg-type]
    (found,) = statistics.snapshot()
    assert (found.fail, found.failures) == (DurationCount(3, 15), {"OTHER": 2, "REJECTED": 1})
    assert (found.inference_count, found.execution_count, found.pending) == (0, 0, 0)
    assert found.success == DurationCount()


def test_a_snapshot_does_not_change_any_more() -> None:
    statistics = Statistics()
    counts = statistics.begin("m", "1")
    before = statistics.snapshot()
    statistics.fail(counts, "OTHER", 5)
    assert (before[0].fail.count, before[0].failures, before[0].pending) == (0, {}, 1)


def test_snapshots_of_processes_are_summed() -> None:
    one = VersionStatistics(
        name="m", version="1", last_inference_ms=5, inference_count=3, execution_count=2, pending=1,
        success=DurationCount(2, 20), fail=DurationCount(1, 1), queue=DurationCount(2, 2),
        failures={"OTHER": 1},
    )  # fmt: skip
    two = VersionStatistics(
        name="m", version="1", last_inference_ms=4, inference_count=10, execution_count=10, pending=2,
        success=DurationCount(10, 100), compute_infer=DurationCount(10, 7),
        failures={"OTHER": 2, "CANCELED": 1},
    )  # fmt: skip
    other = VersionStatistics(name="a", version="1", inference_count=1)
    assert merged([[one], [two, other], []]) == [
        other,
        VersionStatistics(
            name="m", version="1", last_inference_ms=5, inference_count=13, execution_count=12, pending=3,
            success=DurationCount(12, 120), fail=DurationCount(1, 1), queue=DurationCount(2, 2),
            compute_infer=DurationCount(10, 7), failures={"OTHER": 3, "CANCELED": 1},
        ),
    ]  # fmt: skip
    assert one.failures == {"OTHER": 1}
    assert merged([]) == []


def test_threads_lose_no_count() -> None:
    statistics = Statistics()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work() -> None:
        for _ in range(2000):
            statistics.succeed(statistics.begin("m", "1"), 1, 1, Durations(1, 1, 1, 1))

    threads = [threading.Thread(target=work) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    finally:
        sys.setswitchinterval(before)
    (found,) = statistics.snapshot()
    assert (found.inference_count, found.success, found.pending) == (8000, DurationCount(8000, 8000), 0)
