"""Comparison of two sessions, with a clock that is turned by hand."""

from __future__ import annotations

from typing import Any

from onnx_dl.demo.compare import medians
from onnx_dl.demo.work import Array


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Timed:
    """A session whose calls take so long; the first after the other session takes ten times as long."""

    def __init__(self, clock: Clock, seconds: float, calls: list[Any]) -> None:
        self._clock, self._seconds, self._calls = clock, seconds, calls

    def run(self, output_names: None, input_feed: dict[str, Array]) -> list[Any]:
        is_first = self._calls[-1:] != [self]
        self._calls.append(self)
        self._clock.now += self._seconds * (10 if is_first else 1)
        return []


def test_both_take_turns_and_the_first_calls_do_not_count() -> None:
    clock, calls = Clock(), list[Any]()
    ours, theirs = Timed(clock, 0.002, calls), Timed(clock, 0.001, calls)
    found = medians(ours, theirs, {}, 3, clock, lambda seconds: None)
    assert [round(seconds, 6) for seconds in found] == [0.002, 0.001]
    assert calls.count(ours) == calls.count(theirs) == 8 * 4
    turns = [calls[at] for at in range(0, len(calls), 4)]
    assert turns[:6] == [theirs, ours, ours, theirs, theirs, ours]


def test_slow_models_end_early() -> None:
    clock, calls = Clock(), list[Any]()
    medians(Timed(clock, 5.0, calls), Timed(clock, 5.0, calls), {}, 1, clock, lambda seconds: None)
    assert len(calls) == 8
