"""Calls that overlap, without calls."""

from __future__ import annotations

import threading

import pytest

from onnx_dl.workers.overlaps import Overlaps
from tests.support.waiting import DEADLINE


class Worker:
    def __init__(self) -> None:
        self.now, self.in_flight = 100.0, 0
        self.overlaps = Overlaps(lambda: self.in_flight, lambda: self.now)

    def begin(self) -> None:
        self.in_flight += 1
        self.overlaps.begin()

    def end(self) -> None:
        self.overlaps.end()
        self.in_flight -= 1


def test_calls_one_after_the_other_are_alone() -> None:
    worker = Worker()
    for _ in range(5):
        worker.begin()
        assert worker.overlaps.is_alone()
        worker.end()


def test_a_call_is_not_alone_while_another_one_runs_and_for_a_while_after_it() -> None:
    worker = Worker()
    worker.begin()
    worker.begin()
    assert not worker.overlaps.is_alone()
    worker.end()
    assert not worker.overlaps.is_alone()
    worker.now += 1
    assert worker.overlaps.is_alone()


def test_an_overlap_counts_also_when_it_has_lasted_long() -> None:
    worker = Worker()
    worker.begin()
    worker.begin()
    worker.now += 10
    assert not worker.overlaps.is_alone()
    worker.end()
    assert worker.overlaps.is_alone()


def test_a_call_waits_for_one_that_took_itself_for_alone() -> None:
    worker, done = Worker(), []
    worker.begin()
    assert worker.overlaps.is_alone()

    def second() -> None:
        worker.begin()
        done.append(worker.overlaps.is_alone())

    thread = threading.Thread(target=second)
    thread.start()
    thread.join(DEADLINE)  # it does not wait for ever: the first one has its stream by then
    assert done == [False]
    worker.end()
    worker.now += 1
    assert worker.overlaps.is_alone()


def test_nobody_waits_for_a_call_that_has_its_stream_for_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker()
    worker.begin()
    assert worker.overlaps.is_alone()
    worker.now += 1
    monkeypatch.setattr(worker.overlaps._changed, "wait_for", None, raising=False)
    worker.begin()
    assert not worker.overlaps.is_alone()
