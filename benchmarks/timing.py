"""How everything here is timed: ways take turns in short blocks within each round.

A figure is the median over rounds, with the least and the most of them; what a way adds, or its ratio, is
taken within a round, between blocks that ran right after each other.  What is timed is not known here.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from benchmarks.report import Row

BASE: Final = "in-process"
UNTIMED: Final = 3
"""Calls at the start of a block that do not count: caches are cold, and threads of the way before, which
onnxruntime lets spin for a while, still take a core."""


def _nothing() -> None:
    pass


@dataclasses.dataclass
class Way:
    """One way to make the call.  ``begin`` and ``end`` surround each of its blocks; ``before`` comes before
    each call, and its time does not count."""

    name: str
    call: Callable[[], Any]
    begin: Callable[[], None] = _nothing
    end: Callable[[], None] = _nothing
    before: Callable[[], None] | None = None


def percentile(times: Sequence[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(share * len(times)))]


def block(way: Way, count: int) -> list[float]:
    """Microseconds of each of ``count`` calls."""
    call, before, clock = way.call, way.before, time.perf_counter_ns
    way.begin()
    try:
        for _ in range(min(UNTIMED, count)):
            call()
        times = []
        for _ in range(count):
            if before is not None:
                before()
            started = clock()
            call()
            times.append((clock() - started) / 1e3)
        return times
    finally:
        way.end()


class Times:
    """Microseconds of each call, by way and round."""

    def __init__(self, ways: Sequence[Way], count: int, rounds: int) -> None:
        """Measures; a round before the first warms up, and every other round goes backwards."""
        self._found: dict[str, list[list[float]]] = {way.name: [] for way in ways}
        for turn in range(rounds + 1):
            for way in ways if turn % 2 else reversed(ways):
                times = block(way, count)
                if turn:
                    self._found[way.name].append(times)

    @property
    def names(self) -> list[str]:
        return list(self._found)

    def by_round(self, way: str, share: float = 0.5) -> list[float]:
        return [percentile(times, share) for times in self._found[way]]

    def added(self, way: str) -> list[float]:
        """By round, how much its p50 is above the one in-process."""
        return [mine - base for mine, base in zip(self.by_round(way), self.by_round(BASE), strict=True)]

    def ratios(self, way: str, share: float = 0.5) -> list[float]:
        """By round, its percentile by the same percentile in-process."""
        pairs = zip(self.by_round(way, share), self.by_round(BASE, share), strict=True)
        return [mine / base for mine, base in pairs]

    def p99(self, way: str) -> float:
        """Over the calls of all rounds: one round of large calls has too few for it."""
        return percentile(list(itertools.chain(*self._found[way])), 0.99)


def figure(work: str, way: str, values: Sequence[float], unit: str, **more: Any) -> Row:
    """A row of the median of ``values``; ``more`` are fields of the row."""
    return Row(work, way, statistics.median(values), unit, least=min(values), most=max(values), **more)
