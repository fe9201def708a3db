"""Choice of the cores on which the worker's thread of a lane may run: on any, on its caller's, or on others.

A caller that sleeps while its worker runs can share a core with it.  A wake-up within a core costs 4 µs, one
across cores 20 to 40 µs (docs/performance.md).  But a thread that is bound to one core waits while another
thread is busy there.  So both ways are tried, and the faster one for the caller is kept.  Only the worker's
thread is moved, never the application's.  Pure: :mod:`onnx_dl.transport.client_lane` moves the thread.
"""

from __future__ import annotations

import statistics
from typing import Final, NamedTuple, Protocol

from onnx_dl.transport.doorbell import LONGEST_SPIN

BLOCK: Final = 16
"""Calls after which the present way is judged."""
RETRY: Final = 128
"""Blocks after which the other way is tried again for one block: less than one call in a hundred."""

_LONGEST: Final = 2e6
"""Nanoseconds of a call beside which a wake-up does not matter."""
_WEIGHT: Final = 1 / 8
"""Weight of a block in the mean."""
_GAIN: Final = 0.9
"""Factor by which the other way must be faster."""


class CallMode(NamedTuple):
    """A way to make calls: the cores of the worker's thread, and whether both ends poll for each other."""

    cores: frozenset[int]
    polls: bool


class CallModes:
    """The ways to make calls to a thread that may run on ``allowed``, more than one core.  Equal ways are the
    same object."""

    def __init__(self, allowed: frozenset[int]) -> None:
        self.anywhere = CallMode(allowed, False)
        """The worker's thread runs where the scheduler likes, and both ends sleep."""
        self._near = {cpu: CallMode(frozenset((cpu,)), False) for cpu in allowed}
        self._apart = {cpu: CallMode(allowed - {cpu}, True) for cpu in allowed}
        self.polling_anywhere = CallMode(allowed, True)

    def near(self, cpu: int) -> CallMode:
        """The worker's thread runs on the caller's core, if it may, and both ends sleep."""
        return self._near.get(cpu, self.anywhere)

    def apart(self, cpu: int) -> CallMode:
        """Both ends poll.  The worker's thread keeps off the caller's core, which is busy meanwhile."""
        return self._apart.get(cpu, self.polling_anywhere)


class ModeChoice(Protocol):
    """Chooses the way to make each call of a lane."""

    def next(self, cpu: int, took: int, gap: int, now: int, follows: bool) -> CallMode:
        """Return the way to make a call.  Times are in nanoseconds.

        Args:
            cpu: the core that the caller is on; -1: not known.
            took: duration of the lane's last call, from its sending to its reply; 0: there was none.
            gap: time since that reply.
            now: the present time.
            follows: this application has called on no other lane since that reply.
        """


class SeparateAffinity:
    """Both ends always poll (``latency="low"``).  Calls that take longer than a caller polls are left to the
    scheduler."""

    def __init__(self, ways: CallModes) -> None:
        self._ways = ways

    def next(self, cpu: int, took: int, gap: int, now: int, follows: bool) -> CallMode:
        return self._ways.polling_anywhere if took > LONGEST_SPIN * 1e9 else self._ways.apart(cpu)


class MeasuredAffinity:
    """Both ends sleep (``latency="normal"``).  Tries the caller's core and all cores; keeps the faster."""

    def __init__(self, ways: CallModes) -> None:
        self._ways = ways
        self._near = False
        self._seen: dict[bool, float] = {}
        """Median duration of the last calls on the caller's core (True) and on all cores."""
        self.mean = 0.0
        """Mean duration of the last calls, in nanoseconds: also of those that were held up."""
        self._times: list[int] = []
        self._blocks = 0

    @property
    def usual(self) -> float | None:
        """Median duration, in nanoseconds, of the last calls in the faster way; None: not known."""
        return min(self._seen.values()) if len(self._seen) == 2 else None

    def next(self, cpu: int, took: int, gap: int, now: int, follows: bool) -> CallMode:
        self._times.append(took)
        if len(self._times) == BLOCK:
            self._judge(statistics.median(self._times))
            mean = statistics.fmean(self._times)
            self.mean += (mean - self.mean) * (_WEIGHT if self.mean else 1.0)
            self._times.clear()
        return self._ways.near(cpu) if self._near else self._ways.anywhere

    def _judge(self, usual: float) -> None:
        self._seen[self._near] = usual
        self._blocks += 1
        other = self._seen.get(not self._near)
        if usual > _LONGEST:
            self._near = False
        elif other is None or self._blocks >= RETRY:
            self._near, self._blocks = not self._near, 0
        elif other < _GAIN * usual:
            self._near = not self._near
