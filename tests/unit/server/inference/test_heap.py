"""The heap is trimmed once, when large requests are over."""

from __future__ import annotations

import threading
import time

from onnx_dl.server.inference.heap import HeapTrimmer
from tests.support.waiting import DEADLINE, eventually


def test_it_is_trimmed_once_after_the_last_large_request() -> None:
    trims: list[float] = []
    trimmer = HeapTrimmer(lambda: trims.append(time.monotonic()), 0.2)
    try:
        for _ in range(5):
            trimmer.note()
            last = time.monotonic()
        eventually(lambda: trims, "the trim")
        assert trims[0] - last >= 0.19
        trimmer.note()
        eventually(lambda: len(trims) == 2, "another trim after another request")
    finally:
        trimmer.close()
    assert len(trims) == 2
    trimmer.note()
    assert "onnx-dl-heap" not in [thread.name for thread in threading.enumerate()]


def test_a_request_during_a_trim_is_followed_by_another() -> None:
    begun, go_on, trims = threading.Event(), threading.Event(), []

    def trim() -> None:
        trims.append(1)
        begun.set()
        assert go_on.wait(DEADLINE)

    trimmer = HeapTrimmer(trim, 0.01)
    try:
        trimmer.note()
        assert begun.wait(DEADLINE)
        trimmer.note()
        go_on.set()
        eventually(lambda: len(trims) == 2, "the second trim")
    finally:
        go_on.set()
        trimmer.close()


def test_without_large_requests_there_is_no_thread() -> None:
    trimmer = HeapTrimmer(lambda: None)
    assert "onnx-dl-heap" not in [thread.name for thread in threading.enumerate()]
    trimmer.close()


def test_close_does_not_wait_for_a_quiet_time() -> None:
    trimmer = HeapTrimmer(lambda: None, 1e6)
    trimmer.note()
    trimmer.close()
