"""Bells: numbers rung, waits that end, ends that close."""

from __future__ import annotations

import os
import threading

import pytest

from onnx_dl.transport.doorbell import CallerBell, WorkerBell
from tests.support.early_forks import forked_at
from tests.support.waiting import DEADLINE, allowed


@pytest.fixture(params=[False, True], ids=["sleeps", "polls"])
def bells(request: pytest.FixtureRequest):
    caller = CallerBell()
    caller.polls = request.param
    worker = WorkerBell([os.dup(fd) for fd in caller.descriptors()])
    caller.handed_over()
    yield caller, worker
    caller.close()
    worker.close()


def test_numbers_arrive(bells):
    caller, worker = bells
    for number in (1, 2, 65):
        caller.ring(number)
        assert worker.wait() == number
    for number in (0, 1, 255):
        worker.ring(number)
        assert caller.wait() == number


def test_the_worker_polls_as_its_caller_does_unless_other_lanes_are_busy(bells):
    caller, worker = bells
    polls: list[bool] = []
    for wanted, disturbed in ((True, False), (False, False), (True, True), (True, False)):
        caller.polls = wanted
        caller.ring(2)
        assert worker.wait() == 2
        if disturbed:
            worker.rest()
        polls.append(worker.polls)
    assert polls == [True, False, False, False], "it rests for some numbers"
    for _ in range(16):
        caller.ring(2)
        worker.wait()
    assert worker.polls


def test_a_sleeper_is_woken(bells):
    caller, worker = bells
    heard: list[int | None] = []
    thread = threading.Thread(target=lambda: heard.append(worker.wait()))
    thread.start()
    caller.ring(3)
    thread.join(allowed(DEADLINE))
    assert heard == [3]


def test_waits_have_a_deadline(bells):
    caller, worker = bells
    for end in (caller, worker):
        with pytest.raises(TimeoutError):
            end.wait(0.01)
    worker.ring(1)
    assert caller.wait(allowed(DEADLINE)) == 1


def test_somebody_makes_the_descriptors_non_blocking(bells):
    """As uvloop does with the one that it watches."""
    caller, worker = bells
    for end, fd in ((caller, caller.fileno()), (worker, worker._eventfd)):
        os.set_blocking(fd, False)
        with pytest.raises(TimeoutError):
            end.wait(0.01)
    heard: list[int | None] = []
    threads = [threading.Thread(target=lambda end=end: heard.append(end.wait())) for end in bells]
    for thread in threads:
        thread.start()
    caller.ring(3)
    worker.ring(3)
    for thread in threads:
        thread.join(allowed(DEADLINE))
    assert heard == [3, 3]


def test_a_caller_that_was_hung_up_on(bells):
    caller, worker = bells
    caller.ring(2)
    worker.hang_up()  # also while a number waits to be heard
    assert worker.wait() is None


def test_a_worker_that_is_gone():
    caller = CallerBell()
    worker = WorkerBell([os.dup(fd) for fd in caller.descriptors()])
    caller.handed_over()
    worker.ring(1)
    worker.close()
    caller.ring(1)  # nobody hears it, and that is no error
    assert (caller.wait(), caller.wait()) == (1, None), "its last word first"
    caller.close()
    caller.close()


def test_a_caller_that_is_gone_is_no_error_for_the_worker():
    caller = CallerBell()
    worker = WorkerBell([os.dup(fd) for fd in caller.descriptors()])
    caller.handed_over()
    caller.close()
    worker.ring(1)
    worker.close()


def test_a_child_that_is_forked_meanwhile_does_not_hide_the_death_of_the_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with forked_at(monkeypatch, os, "pipe"):
        bell = CallerBell()
        bell.handed_over()  # now the worker's end is nobody's, as if it had died
        try:
            assert bell.wait(allowed(DEADLINE)) is None
        finally:
            bell.close()
