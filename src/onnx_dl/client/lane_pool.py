"""One worker as this application uses it: the grant, and the idle lanes.

No lock: whatever several threads may want, such as a lane, lies in a deque, from which a thread takes it in
one step of Python's.  So a thread may interrupt itself anywhere, and another may fork.  A mark that a worker
is gone is never taken back.
"""

from __future__ import annotations

import collections
import contextlib
import time

from onnx_dl.client.cancellation import GRACE, run_timeout
from onnx_dl.client.connection import Connection
from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.core.parsing import LATENCIES
from onnx_dl.errors import ProtocolError, SupervisorDied, SupervisorTimeout, WorkerDied
from onnx_dl.protocol import control, failures
from onnx_dl.protocol.lane import Hold, Result, Unhold
from onnx_dl.transport.client_lane import ClientLane


class LanePool:
    """A worker, from its grant until it takes no more calls of ours, and the idle lanes to it."""

    def __init__(
        self, granted: control.Granted, connection: Connection, name: str, *, over_zmq: bool, copies: bool
    ) -> None:
        """
        Args:
            connection: to the host of the worker; the model may have moved to another host since.
            copies: give the worker copies of arrays that lie in shared memory already.  A sandboxed one could
                else write to results of other models, and read them later.
        """
        self.granted = granted
        self.connection = connection
        self.name = name
        """Name of the model, for messages."""
        self.over_zmq = over_zmq
        self._copies = copies
        self.is_opened = False
        """True if a lane was ever opened to it."""
        self.is_gone = False
        self.idle: dict[str, collections.deque[ClientLane]] = {
            latency: collections.deque() for latency in LATENCIES
        }
        """The idle lanes of each kind, the one that was used last at the end."""

    def take(self, latency: str) -> ClientLane | None:
        """The lane of this kind that was used last; None: none is idle."""
        try:
            lane = self.idle[latency].pop()
        except IndexError:
            return None
        # With a bell, the exchange itself finds out that a call was never begun.
        if lane.over_zmq and lane.is_dead():
            lane.close()
            self.retire()
            return None
        return lane

    def put(self, lane: ClientLane) -> None:
        """Adds an idle lane.  Closes it if the worker is gone, or goes meanwhile."""
        self.idle[lane.latency].append(lane)
        if self.is_gone:
            self.close_idle()
        elif lane.note_size() or len(self.idle[lane.latency]) > 1:
            self.connection.arm()

    def open(self, latency: str, deadline: Deadline | None) -> ClientLane | None:
        """Opens a lane.  None: the worker is gone, or did not answer and may still.  Raises DeadlinePassed,
        and OSError where no descriptor is left."""
        if self.is_gone:
            return None
        self.is_opened = True
        try:
            lane = self.connect(latency, deadline)
        except DeadlinePassed:
            if deadline is not None and deadline.passed:
                raise
            return None
        if lane is None:
            self.retire()
        return lane

    def connect(self, latency: str, deadline: Deadline | None) -> ClientLane | None:
        """Opens a lane also to a worker that is retired; raises like :meth:`open`.  None: it is gone."""
        opening = Deadline(self.connection.timeout, outer=deadline)
        try:
            context = self.connection.context if self.over_zmq else None
            lane = ClientLane(context, self.granted, opening, latency=latency)
        except (ConnectionError, FileNotFoundError, ProtocolError, SupervisorDied):
            return None  # other errors are ours, no descriptors left for one, and would only come again
        lane.arena.adoptions.allowed = not self._copies
        return lane

    def open_holding(self, deadline: Deadline | None) -> ClientLane | None:
        """Opens a lane that holds the worker; None if that drains or is gone."""
        while (lane := self.open("auto", deadline)) is None:
            if self.is_gone:
                return None
        try:
            reply = lane.exchange(Hold(), None if deadline is None else deadline.left())
        except BaseException as error:
            lane.close()
            if isinstance(error, TimeoutError):
                raise DeadlinePassed("the worker") from None
            raise
        if isinstance(reply, Result):
            return lane
        lane.close()
        self.retire()
        return None

    def end_hold(self, lane: ClientLane) -> None:
        """Has the lane hold the worker no longer.  Does not wait for a worker that does not answer."""
        try:
            answer = None if lane.is_dead() else lane.exchange(Unhold(), GRACE)
        except (TimeoutError, ProtocolError):
            answer = None
        except BaseException:
            lane.close()
            raise
        if answer is None:
            lane.close()  # which ends the hold, too
        else:
            self.put(lane)

    def touch(self) -> None:
        """Writes the time of a use to an idle lane.  If none is idle, the model is in use anyway."""
        for lanes in self.idle.values():
            with contextlib.suppress(IndexError):
                lanes[-1].touch()
                return

    def retire(self) -> None:
        """Marks the worker as gone: it takes no more calls of this application."""
        self.is_gone = True
        self.close_idle()

    def close_idle(self) -> bool:
        """Closes the idle lanes; whether there were any."""
        found = False
        for lanes in self.idle.values():
            with contextlib.suppress(IndexError):
                while True:  # of several threads that do this at once, each lane goes to one
                    lanes.pop().close()
                    found = True
        return found

    def tidy(self, idle_for: float) -> bool:
        """Closes lanes that were idle for ``idle_for`` seconds, but the last one of each kind, which gives
        its memory back.  Returns whether more is to do later."""
        since = time.perf_counter_ns() - int(idle_for * 1e9)
        kinds = [list(lanes) for lanes in self.idle.values()]
        surplus = [lane for lanes in kinds for lane in lanes[:-1]]
        large = [lanes[-1] for lanes in kinds if lanes and lanes[-1].is_large]
        idle = [lane for lane in (*surplus, *large) if lane.last_used < since]
        deaf = False  # a worker that does not answer on one lane is asked on no other
        for lane in filter(self._take_this, idle):
            if deaf or lane in surplus or (deaf := not lane.trim()):
                lane.close()
            else:
                self.put(lane)
        return len(surplus) + len(large) > len(idle)

    def _take_this(self, lane: ClientLane) -> bool:
        """Takes the lane if it is still idle."""
        try:
            self.idle[lane.latency].remove(lane)
        except ValueError:
            return False
        return True

    def check_end(self, deadline: Deadline | None) -> None:
        """Raises how a worker that went without an answer has ended, or RunTimeout if the host did not answer
        by the deadline.  Returns if the worker had drained, so that it never began the call."""
        limit = None
        if deadline is not None:  # a moment, also where the run's own time has just passed
            limit = Deadline(max(GRACE, deadline.left() or 0.0))
        granted = self.granted
        try:  # the host that granted it: another host's workers have the same numbers
            outcome = self.connection.ask(
                lambda ticket: control.AskOutcome(ticket=ticket, worker_id=granted.worker_id), deadline=limit
            )
        except DeadlinePassed:
            raise run_timeout(deadline, "lost its worker, whose end is not known yet") from None
        except SupervisorTimeout:
            raise WorkerDied(
                f"The worker of {self.name} (pid {granted.pid}) stopped answering.", pid=granted.pid
            ) from None
        if outcome.failure is not None:
            raise failures.rebuild(outcome.failure)

    def __del__(self) -> None:
        self.close_idle()
