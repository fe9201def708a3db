"""The present worker of a model, and the ``session()`` blocks that hold it.  No lock, as in
:mod:`onnx_dl.client.lane_pool`."""

from __future__ import annotations

import collections
import contextlib

from onnx_dl.client.acquisition import Lease
from onnx_dl.client.connection import Connection
from onnx_dl.client.lane_pool import LanePool
from onnx_dl.concurrency import waits
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.core.events import EventType, ModelEvent
from onnx_dl.protocol import control as m
from onnx_dl.transport.client_lane import ClientLane

_Held = tuple[LanePool, ClientLane]


class Holds:
    """Blocks of all threads and greenlets.  Several lanes hold the worker for moments only."""

    def __init__(self) -> None:
        self._blocks: collections.deque[int] = collections.deque()
        """The thread or greenlet that began each block."""
        self._held: collections.deque[_Held] = collections.deque()

    def __bool__(self) -> bool:
        return bool(self._blocks)

    @property
    def are_mine(self) -> bool:
        """True if this thread, or greenlet, is in a block."""
        return waits.caller() in self._blocks

    def begin(self, pool: LanePool, deadline: Deadline | None) -> bool:
        """Begins a block, or raises DeadlinePassed.  False: the worker drains, and no block was begun."""
        # Before a holding lane is looked for: a thread that ends another block looks at the blocks again.
        self._blocks.append(waits.caller())
        held = False
        try:
            held = self.hold(pool, deadline)
        finally:
            if not held:
                _close_all(self._end())
        return held

    def hold(self, pool: LanePool, deadline: Deadline | None) -> bool:
        """Has a lane hold this worker, unless one does.  False: the worker drains."""
        if not any(lane.granted is pool.granted and not lane.is_dead() for _, lane in list(self._held)):
            if (lane := pool.open_holding(deadline)) is None:
                return False
            self.close()
            self._held.append((pool, lane))
            _close_all(self._take_if_ended())  # the last block may have ended meanwhile
        return True

    def end(self) -> None:
        """Ends one block.  With the last one the TTL starts."""
        for pool, lane in self._end():
            pool.end_hold(lane)

    def _end(self) -> list[_Held]:
        """Ends one block; returns what held the worker if it was the last one."""
        try:
            self._blocks.remove(waits.caller())
        except ValueError:  # it began in another thread
            self._blocks.pop()
        return self._take_if_ended()

    def _take_if_ended(self) -> list[_Held]:
        if self._blocks:
            return []
        held = self._take()
        if self._blocks:  # one began meanwhile, and may have seen them
            self._held.extend(held)
            return []
        return held

    def _take(self) -> list[_Held]:
        """Takes out all holding lanes; of several threads that do so at once, each lane goes to one."""
        taken = []
        with contextlib.suppress(IndexError):
            while True:
                taken.append(self._held.pop())
        return taken

    def close(self) -> None:
        """Closes the lanes that hold the worker."""
        _close_all(self._take())

    def __del__(self) -> None:
        self.close()


def _close_all(held: list[_Held]) -> None:
    for _, lane in held:
        lane.close()


class CurrentWorker:
    """The worker that serves a model now, and the ``session()`` blocks that hold it."""

    def __init__(self, name: str, *, over_zmq: bool, copies: bool) -> None:
        """``copies``: see :class:`LanePool`."""
        self._name = name
        self._over_zmq = over_zmq
        self._copies = copies
        self.last: LanePool | None = None
        """The worker that was granted last."""
        self.holds = Holds()

    @property
    def pool(self) -> LanePool | None:
        """The lanes to the present worker."""
        pool = self.last
        return None if pool is None or pool.is_gone else pool

    def usable_by(self, lease: Lease) -> LanePool | None:
        """The lanes, if the proxy of this lease may use them."""
        pool = self.last
        if pool is None or pool.is_gone:
            return None
        # Inside of a session() block one uses the worker that it holds, also while that waits for the block
        # to end before it unloads: to acquire would wait for the unload, for ever.
        return pool if lease.granted is pool.granted or self.holds else None

    def accept(self, answer: m.Granted, connection: Connection) -> LanePool:
        """Notes the worker that serves from now on.  One Granted stands for each worker, for all leases."""
        pool = self.pool
        if pool is None or pool.granted.address != answer.address:
            # Two threads may come here at once with one answer each: the first then asks once more.
            stale = self.last
            self.last = pool = LanePool(
                answer, connection, self._name, over_zmq=self._over_zmq, copies=self._copies
            )
            if stale is not None:
                stale.retire()
        return pool

    def leave_outdated(self, lease: Lease, granted: m.Granted, path: str) -> None:
        """Gives up a worker that has read other contents of this file than are there now."""
        if lease.granted is granted:
            lease.granted = None
        if self.last is not None:
            self.last.connection.send(m.Outdated(proxy=lease.id, worker_id=granted.worker_id, path=path))

    def on_event(self, event: ModelEvent) -> None:
        """Gives back the memory that was shared with a worker that is gone."""
        pool = self.last
        gone = event.type in (EventType.UNLOADED, EventType.FAILED)
        if gone and pool is not None and pool.granted.worker_id == event.worker_id:
            pool.retire()

    def retire(self) -> None:
        """Marks the present worker as gone."""
        if (pool := self.last) is not None:
            pool.retire()

    def leave(self) -> None:
        """Closes every lane, also those that hold the worker."""
        self.retire()
        self.holds.close()
