"""Decision when the two ends of a lane poll for each other (``latency="auto"``).

Polling saves two wake-ups and keeps the caches of two cores warm.  It costs the time of a second core, and
whoever polls takes that core from threads that have work: other programs, onnxruntime's own threads, or the
other end itself.  So both ends poll only under these rules:

1. **Begin** after :data:`~onnx_dl.transport.affinity.BLOCK` calls in quick succession: each follows the last
   one within :data:`QUICK`, takes no longer than anyone polls, and no other lane of the application was used
   in between.  Several busy threads, or models that take turns, thus never poll.
2. **End at once** when a call does not follow quickly: silence, a long call, or another lane.
3. **Not without a free core**: never if this process may use one core only, and not while more threads want
   to run than there are cores, whoever they belong to.  They are counted before polling begins, during its
   first calls, once per block, and after a call that was held up.  A count may hit a moment, so it takes
   four in a row to give up before it begins, and two to end it, or one after a call that was
   held up.
4. **Not without a gain**: the median and the mean of each :data:`WINDOW` calls must be lower than they were
   with sleeping.  The mean counts the calls that were held up, too.  The first block, in which caches are
   cold, must not take twice as long.  Sleeping is tried again for one block in a while, because the calls may
   have changed.
5. **Back off**: where 3 or 4 ended polling, it may begin again after :data:`FIRST_PAUSE`, after each further
   failure twice as long, up to :data:`LONGEST_PAUSE`.  So callers that crowd each other seldom
   try, and as many of them poll as there are cores for.

Pure but for the count of threads, which is injected.  The time that each end polls for one message is
:class:`~onnx_dl.transport.doorbell.SpinBudget`'s.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Final

from onnx_dl.transport.affinity import BLOCK, RETRY, CallMode, CallModes, MeasuredAffinity
from onnx_dl.transport.doorbell import LONGEST_SPIN

QUICK: Final = 200_000
"""Nanoseconds from a reply to the next call, at most, for which the worker may poll."""
WINDOW: Final = 4 * BLOCK
"""Calls with polling whose mean is compared with sleeping."""
FIRST_PAUSE: Final = 50_000_000
"""Nanoseconds without polling after a first failure."""
LONGEST_PAUSE: Final = 3_200_000_000

_LONGEST: Final = LONGEST_SPIN * 1e9
_GAIN: Final = 0.9
"""Factor by which calls must be faster with polling, which takes a second core."""
_EARLY: Final = frozenset({2, 4, 8})
"""Calls of a new phase of polling at which threads are counted, besides the end of each block."""
_REFUSALS: Final = 4
_AGAIN: Final = 4
"""Calls after which threads are counted again."""
_STRIKES: Final = 2
"""Counts of too many threads in a row that end polling."""
_SETTLED: Final = 8 * WINDOW
"""Calls with polling after which earlier failures are forgotten."""


class LastUse:
    """Note of the lane of this process that was used last."""

    def __init__(self) -> None:
        self._lane = 0

    def is_again(self, lane: int) -> bool:
        """Record a use; true if the use before it was of the same lane.  ``lane``: any number for it."""
        again, self._lane = self._lane == lane, lane
        return again


class AdaptivePolling:
    """Chooses between sleeping, in the ways of :class:`~onnx_dl.transport.affinity.MeasuredAffinity`, and
    polling.  The rules are above."""

    def __init__(self, ways: CallModes, has_free_core: Callable[[], bool]) -> None:
        """``has_free_core``: whether no more threads want to run than there are cores for, the calling one
        included.  Both ends of a lane that polls are among them."""
        self._ways = ways
        self._has_free_core = has_free_core
        self._sleeping = MeasuredAffinity(ways)
        self._polls = False
        self._streak = 0
        """Calls in quick succession, up to the present one."""
        self._times: list[int] = []
        """Durations of the calls of the present window of polling."""
        self._calls = self._strikes = self._refusals = 0
        """Counted since polling began."""
        self._pause = FIRST_PAUSE
        self._not_before = 0
        """Time from which on polling may begin again."""

    def next(self, cpu: int, took: int, gap: int, now: int, follows: bool) -> CallMode:
        """Return the way to make a call; see :class:`~onnx_dl.transport.affinity.ModeChoice`."""
        if gap > QUICK or not follows:
            self._streak = 0
            self._polls = False
        elif self._polls:
            self._note(took, now)
        elif took <= _LONGEST:
            self._streak += 1
            if self._streak >= BLOCK and now >= self._not_before:
                self._try_polling(now)
        else:
            self._streak = 0
        if self._polls:
            return self._ways.apart(cpu)
        return self._sleeping.next(cpu, took, gap, now, follows)

    def _try_polling(self, now: int) -> None:
        self._streak = 0
        if self._sleeping.usual is None:  # nothing to compare with yet
            return
        if self._has_free_core():
            self._polls = True
            self._calls = self._strikes = self._refusals = 0
            self._times.clear()
            return
        self._refusals += 1
        if self._refusals < _REFUSALS:
            self._streak = BLOCK - _AGAIN
        else:
            self._refusals = 0
            self._back_off(now)

    def _note(self, took: int, now: int) -> None:
        """Record a call that was made with polling."""
        self._calls += 1
        self._times.append(took)
        if took > _LONGEST:
            self._count(2)
        elif self._calls % BLOCK == 0 or self._calls in _EARLY:
            self._count(1)
        if self._strikes >= _STRIKES or not self._pays():
            self._back_off(now)
        elif self._calls >= RETRY * BLOCK:
            self._polls = False  # the streak begins again: one block with sleeping

    def _count(self, weight: int) -> None:
        self._strikes = 0 if self._has_free_core() else self._strikes + weight

    def _pays(self) -> bool:
        """Return whether calls are faster than with sleeping, as far as this call shows."""
        times, usual = self._times, self._sleeping.usual or 0.0
        if self._calls == BLOCK:
            median = statistics.median(times)
            times.clear()
            return median < 2 * usual
        if len(times) < WINDOW:
            return True
        median, mean = statistics.median(times), statistics.fmean(times)
        times.clear()
        if self._calls >= _SETTLED:
            self._pause = FIRST_PAUSE
        return median < _GAIN * usual and mean < self._sleeping.mean

    def _back_off(self, now: int) -> None:
        self._polls = False
        self._not_before = now + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
