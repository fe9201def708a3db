"""The worker that serves a model now, the lanes to it that nobody uses, and those that hold it.

No lock: whatever more than one may want, a lane above all, lies in a deque, out of which one takes it in a
single step of Python's.  So a thread may interrupt itself anywhere, and another fork.  What is marked as gone
stays so.  When a worker is asked for, and what is done with lanes, is :mod:`onnx_dl.client.remote_model`'s.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from onnx_dl.concurrency import waits
from onnx_dl.core.parsing import LATENCIES
from onnx_dl.protocol import control as m
from onnx_dl.transport.client_lane import ClientLane

if TYPE_CHECKING:
    from onnx_dl.client.connection import Connection


class Serving:
    """One worker, from the answer that granted it until it is known to take no more calls of ours."""

    def __init__(self, granted: m.Granted, connection: Connection) -> None:
        """``connection``: to the host whose worker it is; the model's present one may be another by now."""
        self.granted = granted
        self.connection = connection
        self.is_opened = False
        """Whether a lane was ever opened to it."""
        self.is_gone = False
        self._idle: dict[str, collections.deque[ClientLane]] = {
            latency: collections.deque() for latency in LATENCIES
        }

    def take(self, latency: str) -> ClientLane | None:
        """The lane of this kind that was used last, if one is idle."""
        try:
            return self._idle[latency].pop()
        except IndexError:
            return None

    def put(self, lane: ClientLane) -> None:
        """A lane is idle again.  It is closed if the worker is gone, or goes meanwhile."""
        self._idle[lane.latency].append(lane)
        if self.is_gone:
            self.drain()

    def touch(self) -> None:
        """Leaves the time of a use in a lane.  If none is idle, the model is in use anyway."""
        for lanes in self._idle.values():
            with contextlib.suppress(IndexError):
                lanes[-1].touch()
                return

    def leave(self) -> None:
        """It takes no more calls of ours."""
        self.is_gone = True
        self.drain()

    def drain(self) -> bool:
        """Closes the idle lanes; whether there were any."""
        taken = [lane for lanes in self._idle.values() for lane in _all_of(lanes)]
        close_all(taken)
        return bool(taken)

    @property
    def is_untidy(self) -> bool:
        """Whether more lanes are idle than one."""
        return sum(map(len, self._idle.values())) > 1

    def untidy(self) -> tuple[list[ClientLane], list[ClientLane]]:
        """The idle lanes beyond the one of each kind that was used last; and those of the last ones that keep
        much memory."""
        kinds = [list(lanes) for lanes in self._idle.values()]
        surplus = [lane for lanes in kinds for lane in lanes[:-1]]
        return surplus, [lanes[-1] for lanes in kinds if lanes and lanes[-1].is_large]

    def take_this(self, lane: ClientLane) -> bool:
        """Whether the lane was idle; then it is the caller's."""
        try:
            self._idle[lane.latency].remove(lane)
        except ValueError:  # somebody uses it
            return False
        return True

    def __del__(self) -> None:
        self.drain()


class Holds:
    """The ``session()`` blocks that a model is in, by their threads or greenlets, and the lane that holds it.

    There is more than one lane for moments only, while threads begin and end blocks at once.
    """

    def __init__(self) -> None:
        self._blocks: collections.deque[int] = collections.deque()
        self._lanes: collections.deque[ClientLane] = collections.deque()

    def __bool__(self) -> bool:
        return bool(self._blocks)

    @property
    def are_mine(self) -> bool:
        """Whether this thread, or greenlet, is in a block."""
        return waits.caller() in self._blocks

    def begin(self) -> None:
        """One block more.  To be said before :meth:`has` is asked: who ends another one looks again."""
        self._blocks.append(waits.caller())

    def end(self) -> list[ClientLane]:
        """One block ended.  What held the worker, if it was the last one."""
        try:
            self._blocks.remove(waits.caller())
        except ValueError:  # it began in another thread
            self._blocks.pop()
        return self._take_if_ended()

    def _take_if_ended(self) -> list[ClientLane]:
        if self._blocks:
            return []
        lanes = self.take()
        if self._blocks:  # one began meanwhile, and may have seen them
            self._lanes.extend(lanes)
            return []
        return lanes

    def has(self, granted: m.Granted) -> bool:
        """Whether a lane holds this worker."""
        return any(lane.granted is granted and not lane.is_dead() for lane in list(self._lanes))

    def put(self, lane: ClientLane) -> None:
        """This lane holds the worker from now on."""
        close_all(self.take())
        self._lanes.append(lane)
        close_all(self._take_if_ended())  # the last block may have ended meanwhile

    def take(self) -> list[ClientLane]:
        """What holds the worker, which is the caller's now."""
        return _all_of(self._lanes)

    def __del__(self) -> None:
        close_all(self.take())


def close_all(lanes: Iterable[ClientLane]) -> None:
    """Lanes that are of no more use."""
    for lane in lanes:
        lane.close()


def _all_of(lanes: collections.deque[ClientLane]) -> list[ClientLane]:
    """Takes out what is there; of several who do so at once, each lane has one."""
    taken = []
    with contextlib.suppress(IndexError):
        while True:
            taken.append(lanes.pop())
    return taken
