"""Deadlines: how much is left of several at once, and waits that another thread ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from onnx_dl.concurrency import deadline as module
from onnx_dl.concurrency.background import Background
from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from tests.support.waiting import eventually


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    yield clock


def test_what_is_left(clock: Clock) -> None:
    deadline = Deadline(3.0)
    assert (deadline.left(), deadline.left(1.0), deadline.left(9.0), deadline.passed) == (
        3.0,
        1.0,
        3.0,
        False,
    )
    clock.now += 5.0
    assert (deadline.left(), deadline.left(1.0), deadline.passed) == (0.0, 0.0, True)
    with pytest.raises(DeadlinePassed, match="waited for the bus"):
        deadline.check("the bus")


def test_the_sooner_of_two_counts(clock: Clock) -> None:
    outer = Deadline(3.0)
    assert Deadline(1.0, outer=outer).left() == 1.0
    assert Deadline(9.0, outer=outer).left() == 3.0
    assert Deadline(None, outer=outer).left() == 3.0
    assert Deadline(None).left() is None
    assert Deadline.of(None) is None


def test_only_a_movable_one_is_looked_at_meanwhile(clock: Clock) -> None:
    assert Deadline(3.0).step() == 3.0
    assert Deadline(None, movable=True).step() == 0.05
    assert Deadline(3.0, outer=Deadline(None, movable=True)).step() == 0.05
    clock.now += 2.99
    assert Deadline(0.01, movable=True).step() == pytest.approx(0.01)


def test_ending_it_ends_what_is_within() -> None:
    outer = Deadline(None, movable=True)
    inner = Deadline(60.0, outer=outer)
    outer.end()
    assert inner.passed and outer.passed


def test_a_wait_ends_when_another_thread_says_so() -> None:
    go, deadline = threading.Event(), Deadline(60.0, movable=True)
    threading.Timer(0.05, deadline.end).start()
    with pytest.raises(DeadlinePassed):
        Background(lambda _: go.wait(60.0), "work").wait(deadline, "nothing")
    go.set()


def test_an_error_of_the_result_is_not_taken_for_a_late_one() -> None:
    def work(_: Deadline) -> None:
        raise TimeoutError("its own")

    background = Background(work, "work")
    background.begin()
    eventually(lambda: background.done, "its work has ended")
    with pytest.raises(TimeoutError, match="its own"):
        background.wait(Deadline(0.0), "nothing")


def test_work_goes_on_for_the_next_who_waits() -> None:
    go = threading.Event()

    def work(deadline: Deadline) -> int:
        go.wait()
        return 7

    background = Background(work, "work")
    with pytest.raises(DeadlinePassed):
        background.wait(Deadline(0.0), "it")
    go.set()
    assert background.wait(None, "it") == 7 and background.done


def test_work_that_nobody_wants_hears_of_it() -> None:
    def work(deadline: Deadline) -> None:
        while not deadline.passed:
            threading.Event().wait(0.001)
        raise ValueError("given up")

    background = Background(work, "work")
    background.end(5.0)
    with pytest.raises(ValueError, match="given up"):
        background.wait(Deadline(0.0), "it")
