"""When an engine returns its unused memory."""

from __future__ import annotations

from typing import Any

from onnx_dl.workers.engine_trims import EVERY, EngineTrims


class Model:
    def __init__(self) -> None:
        self.trims = 0

    def trim(self) -> None:
        self.trims += 1


class Worker:
    def __init__(self) -> None:
        self.in_flight = self.wakes = 0
        self.trims = EngineTrims(lambda: self.in_flight, self.wake)
        self.model: Any = Model()

    def wake(self) -> None:
        self.wakes += 1


def test_the_first_one_is_at_once() -> None:
    worker = Worker()
    worker.trims.ask(worker.model, 7.0)
    assert worker.model.trims == 1 and worker.trims.next_at is None and not worker.wakes


def test_a_rhythm_pays_once_a_minute() -> None:
    worker = Worker()
    for now in range(0, 600, 6):
        worker.trims.ask(worker.model, float(now))
        worker.trims.run_due(float(now))
    assert worker.model.trims == 600 / EVERY


def test_one_that_came_too_early_is_made_later_without_another_request() -> None:
    worker = Worker()
    worker.trims.ask(worker.model, 0.0)
    worker.trims.ask(worker.model, 10.0)
    assert worker.model.trims == 1 and worker.trims.next_at == EVERY and worker.wakes == 1
    worker.trims.run_due(EVERY - 0.1)
    assert worker.model.trims == 1
    worker.trims.run_due(EVERY)
    assert worker.model.trims == 2 and worker.trims.next_at is None
    worker.trims.run_due(10 * EVERY)
    assert worker.model.trims == 2


def test_it_waits_for_calls_of_others() -> None:
    worker = Worker()
    worker.in_flight = 1
    worker.trims.ask(worker.model, 100.0)
    assert worker.model.trims == 0 and worker.trims.next_at == 105.0 and worker.wakes == 1
    worker.trims.run_due(105.0)
    assert worker.model.trims == 0 and worker.trims.next_at == 110.0
    worker.in_flight = 0
    worker.trims.run_due(110.0)
    assert worker.model.trims == 1 and worker.trims.next_at is None


def test_each_model_of_a_group_is_trimmed() -> None:
    worker, other = Worker(), Model()
    worker.in_flight = 1
    for model in (worker.model, other, worker.model):
        worker.trims.ask(model, 0.0)  # type: ignore[arg-type]
    worker.in_flight = 0
    worker.trims.run_due(5.0)
    assert (worker.model.trims, other.trims) == (1, 1)
