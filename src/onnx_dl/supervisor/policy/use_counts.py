"""Counts how often each model is used, for the order of eviction.

What matters is how often a model would have to be loaded again, not how often it is called.  So the uses
between two loads count as one, however many calls they are.  Each load of any model takes a tenth from all
counts, so they cover the last 10 to 20 loads, however long these take.

This is "least frequently used with aging": M. Arlitt et al., "Evaluating content management techniques for
Web proxy caches", 2000.  docs/performance.md has figures.
"""

from __future__ import annotations

import dataclasses
from typing import Final

_AGING: Final = 0.9
"""Factor for all counts at each load."""
_REMEMBERED: Final = 1024
"""Models that have a count.  Beyond that, those that were used least recently lose it."""


@dataclasses.dataclass
class _Count:
    uses: float
    at_load: int
    """Number of the last load before the latest use."""
    used_at: float


class UseCounts:
    """The counts of all models of a host by key, also of models that are not loaded."""

    def __init__(self) -> None:
        self._counts: dict[str, _Count] = {}
        self._loads = 0

    def note_load(self, key: str, now: float) -> None:
        """A load of this model begins: somebody is about to use it."""
        self._loads += 1
        self._add(key, now)

    def note_use(self, key: str, used_at: float) -> None:
        """A model was used last at this time, which may have been noted before."""
        count = self._counts.get(key)
        if count is None or used_at > count.used_at:
            self._add(key, used_at)

    def of(self, key: str) -> float:
        """Uses of a model; 1 if none was noted."""
        count = self._counts.get(key)
        return 1.0 if count is None else self._aged(count)

    def _aged(self, count: _Count) -> float:
        return count.uses * _AGING ** (self._loads - count.at_load)

    def _add(self, key: str, used_at: float) -> None:
        count = self._counts.pop(key, None)  # the last in the dictionary is the latest
        if count is None:
            count = _Count(1.0, self._loads, used_at)
        elif count.at_load != self._loads:
            count = _Count(self._aged(count) + 1.0, self._loads, used_at)
        count.used_at = used_at
        self._counts[key] = count
        if len(self._counts) > _REMEMBERED:
            del self._counts[next(iter(self._counts))]
