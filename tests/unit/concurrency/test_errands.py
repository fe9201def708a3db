"""Work that nobody waits for is done in few threads, which end."""

from __future__ import annotations

import os
import threading

import pytest

from onnx_dl.concurrency import spawning
from onnx_dl.concurrency.errands import Errands
from onnx_dl.errors import ProcessesExhausted
from tests.support.waiting import DEADLINE, allowed, eventually

NAME = "onnx-dl-errand"


def threads() -> int:
    return sum(thread.name == NAME for thread in threading.enumerate())


def test_all_work_is_done_in_few_threads_which_end() -> None:
    errands = Errands(NAME, 3)
    begun, may_end = threading.Semaphore(0), threading.Event()
    done: list[int] = []

    def work(number: int) -> None:
        begun.release()
        assert may_end.wait(allowed(DEADLINE))
        done.append(number)

    for number in range(20):
        errands.add(lambda number=number: work(number))  # type: ignore[misc]
    for _ in range(3):
        assert begun.acquire(timeout=allowed(DEADLINE))
    assert threads() == 3
    assert not begun.acquire(blocking=False)
    may_end.set()
    eventually(lambda: not threads(), "the end of the threads")
    assert sorted(done) == list(range(20))


def test_work_is_not_left_lying_while_threads_end() -> None:
    errands = Errands(NAME, 1)
    for _ in range(500):
        done = threading.Event()
        errands.add(done.set)
        assert done.wait(allowed(DEADLINE))
    eventually(lambda: not threads(), "the end of the thread")


def test_work_that_fails_does_not_end_the_others() -> None:
    errands, done = Errands(NAME, 1), threading.Event()
    errands.add(lambda: 1 / 0)
    errands.add(done.set)
    assert done.wait(allowed(DEADLINE))
    eventually(lambda: not threads(), "the end of the thread")


def test_without_a_thread_the_caller_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    errands, done = Errands(NAME, 2), threading.Event()

    def fail(*_: object) -> None:
        raise ProcessesExhausted("none left")

    with monkeypatch.context() as patch:
        patch.setattr(spawning, "start", fail)
        with pytest.raises(ProcessesExhausted):
            errands.add(pytest.fail)
    errands.add(done.set)
    assert done.wait(allowed(DEADLINE))
    eventually(lambda: not threads(), "the end of the thread")


def test_a_forked_child_does_its_own_work_only() -> None:
    errands, may_end, was_begun = Errands(NAME, 1), threading.Event(), threading.Event()

    def wait() -> None:
        was_begun.set()
        may_end.wait(allowed(DEADLINE))

    parents: list[int] = []
    errands.add(wait)
    errands.add(lambda: parents.append(1))
    assert was_begun.wait(allowed(DEADLINE))
    child = os.fork()
    if not child:
        done = threading.Event()
        errands.add(done.set)
        os._exit(0 if done.wait(allowed(DEADLINE)) and not parents else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    may_end.set()
    eventually(lambda: parents and not threads(), "the end of the parent's work")
