"""When a worker's memory is looked at, and what follows."""

from __future__ import annotations

import pytest

from onnx_dl.workers import limits
from onnx_dl.workers.limits import Watchdog
from tests.support.waiting import eventually

LIMIT = 100


class Worker:
    """What a watchdog sees of one; ``ended`` has the bytes that it was ended for."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.calls = 0
        self.looks = 0
        self.ended: list[int] = []
        self.watchdog = Watchdog(LIMIT, self.own, lambda: self.calls, self.ended.append)

    def own(self) -> int:
        self.looks += 1
        return self.nbytes


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.mark.parametrize(("nbytes", "ended"), [(0, []), (LIMIT, []), (LIMIT + 1, [LIMIT + 1])])
def test_more_than_the_limit_is_too_much(worker: Worker, nbytes: int, ended: list[int]) -> None:
    worker.calls, worker.nbytes = 1, nbytes
    assert worker.watchdog.look()
    assert worker.ended == ended


def test_between_calls_nothing_is_measured(worker: Worker) -> None:
    """What a worker has then is seen after its next call."""
    worker.nbytes = LIMIT + 1
    worker.watchdog.look()
    assert (worker.looks, worker.ended) == (0, [])


def test_it_lingers_between_calls_that_follow_each_other(worker: Worker) -> None:
    for _ in range(3):
        worker.calls = 1
        assert worker.watchdog.look()
        worker.calls = 0
        looks = [worker.watchdog.look() for _ in range(limits.LINGER)]
        assert looks == [True] * (limits.LINGER - 1) + [False]


def test_a_call_wakes_its_thread(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Again and again, and in between it sleeps: nothing is looked at."""
    monkeypatch.setattr(limits, "EVERY", 0.0001)
    worker.watchdog.start()
    for turn in range(1, 4):
        eventually(lambda: worker.watchdog.sleeps, "it sleeps")
        worker.nbytes = LIMIT + turn
        worker.calls = 1
        worker.watchdog.call_begins()
        eventually(lambda turn=turn: LIMIT + turn in worker.ended, "it was seen")
        worker.calls = 0
