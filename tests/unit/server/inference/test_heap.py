"""The heap is trimmed once, some time after the first large message."""

from __future__ import annotations

import threading
import time

from onnx_dl.server.inference.heap import LARGE, HeapTrimmer
from tests.support.waiting import DEADLINE, allowed, eventually


def test_it_is_trimmed_once_for_all_messages_that_came_meanwhile() -> None:
    trims: list[float] = []
    trimmer = HeapTrimmer(lambda: trims.append(time.monotonic()), 0.2)
    try:
        first = time.monotonic()
        for _ in range(5):
            trimmer.note(LARGE)
        eventually(lambda: trims, "the trim")
        assert trims[0] - first >= 0.19
        trimmer.note(LARGE)
        eventually(lambda: len(trims) == 2, "another trim after another message")
    finally:
        trimmer.close()
    assert len(trims) == 2
    trimmer.note(LARGE)
    assert "onnx-dl-heap" not in [thread.name for thread in threading.enumerate()]


def test_it_is_trimmed_under_steady_load() -> None:
    trimmed = threading.Event()
    trimmer = HeapTrimmer(trimmed.set, 0.2)
    deadline = time.monotonic() + allowed(DEADLINE)
    try:
        while not trimmed.wait(0.001):
            trimmer.note(LARGE)
            assert time.monotonic() < deadline
    finally:
        trimmer.close()


def test_a_message_during_a_trim_is_followed_by_another() -> None:
    begun, go_on, trims = threading.Event(), threading.Event(), []

    def trim() -> None:
        trims.append(1)
        begun.set()
        assert go_on.wait(allowed(DEADLINE))

    trimmer = HeapTrimmer(trim, 0.01)
    try:
        trimmer.note(LARGE)
        assert begun.wait(allowed(DEADLINE))
        trimmer.note(LARGE)
        go_on.set()
        eventually(lambda: len(trims) == 2, "the second trim")
    finally:
        go_on.set()
        trimmer.close()


def test_without_large_messages_there_is_no_thread() -> None:
    trimmer = HeapTrimmer(lambda: None)
    trimmer.note(LARGE - 1)
    assert "onnx-dl-heap" not in [thread.name for thread in threading.enumerate()]
    trimmer.close()


def test_close_does_not_wait_for_the_trim() -> None:
    trimmer = HeapTrimmer(lambda: None, 1e6)
    trimmer.note(LARGE)
    trimmer.close()
