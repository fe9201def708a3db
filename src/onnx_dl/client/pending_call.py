"""One request to a worker, from its encoding to its result.

A thread waits for the result, or an event loop (:mod:`onnx_dl.client.awaited_calls`), or the callback thread
(:mod:`onnx_dl.client.callback_calls`).  All that follows a reply is the same for them, and is here.
"""

from __future__ import annotations

import contextlib
import errno
from typing import Final, NamedTuple

from onnx_dl.client.cancellation import GRACE, CancelWatch
from onnx_dl.client.lane_pool import LanePool
from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.errors import DescriptorsExhausted, ProtocolError, WorkerDied
from onnx_dl.protocol import failures
from onnx_dl.protocol import lane as m
from onnx_dl.system import descriptor_limits
from onnx_dl.tensors.call_codec import Answer, Request
from onnx_dl.tensors.call_plans import EngineValue
from onnx_dl.transport.client_lane import ClientLane, Reply

RETRY: Final = object()
"""Stands for a result: the call was not executed.  Make it again, on another lane."""

_ANSWERS: Final = (int, m.SameResult, m.Result, m.PlacedResult)
_WITHOUT_RESULT: Final = (m.CallFailed, m.Draining, m.Forgotten)
NO_DESCRIPTOR: Final = (errno.EMFILE, errno.ENFILE)


class RetainedOutputs(NamedTuple):
    """Results that stay in a worker's memory until :meth:`release`.  ``values``: references to arrays."""

    pool: LanePool
    lane: ClientLane
    values: list[EngineValue]

    def release(self) -> None:
        """Gives the results' memory back."""
        self.pool.put(self.lane)


def abandon(pool: LanePool, lane: ClientLane, error: BaseException) -> None:
    """Closes the lane of a call that failed with its reply still to come, and raises a better error if no
    descriptor is left."""
    lane.close()
    if isinstance(error, OSError) and error.errno in NO_DESCRIPTOR:
        raise descriptor_limits.exhausted(f"A call of {pool.name}") from error


class PendingCall:
    """A request for a lane that nobody else uses.  The lane is free again when there is a result."""

    __slots__ = ("_pool", "lane", "request")

    def __init__(self, pool: LanePool, lane: ClientLane, request: Request) -> None:
        self._pool = pool
        self.lane = lane
        self.request = request

    def perform(self, watch: CancelWatch | None = None, *, retain: bool = False) -> EngineValue:
        """Sends the request and waits in this thread.  Returns the result (with ``retain``, as
        :class:`RetainedOutputs`) or :data:`RETRY`.

        Raises:
            RunTimeout: the deadline of ``watch`` passed.
            DescriptorsExhausted: this process may open no more files.
            Exception: what the worker raised, or how it ended.
        """
        try:
            if watch is None:
                reply = self.lane.exchange(self.request)
            else:
                reply = watch.exchange(self.lane, self.request, self.cancel)
            if isinstance(reply, _ANSWERS):
                return self._result(reply, retain, watch, None)
        except BaseException as error:  # KeyboardInterrupt included: the reply is still to come
            abandon(self._pool, self.lane, error)
            raise
        return self._settle(reply, None if watch is None else watch.deadline)

    def needs_host(self, reply: Reply) -> bool:
        """True if :meth:`conclude` asks the host how the worker ended, which may take a while."""
        return not isinstance(reply, _ANSWERS + _WITHOUT_RESULT)

    def conclude(self, reply: Reply, deadline: Deadline | None = None) -> EngineValue:
        """Returns the result in a reply, or :data:`RETRY`; raises like :meth:`perform`."""
        if not isinstance(reply, _ANSWERS):
            return self._settle(reply, deadline)
        try:
            return self._result(reply, False, None, deadline)
        except BaseException as error:
            abandon(self._pool, self.lane, error)
            raise

    def _result(
        self, reply: Answer, retain: bool, watch: CancelWatch | None, deadline: Deadline | None
    ) -> EngineValue:
        """The result; the lane is free again.  If this fails, the ends of the lane know different things."""
        lane = self.lane
        if retain:
            return RetainedOutputs(self._pool, lane, lane.codec.references(self.request, reply))
        result = lane.codec.decode(self.request, reply)
        if lane.codec.loans.received:
            result = self._with_values(result, watch, deadline)
        self._pool.put(lane)
        return result

    def _with_values(
        self, results: EngineValue, watch: CancelWatch | None, deadline: Deadline | None
    ) -> EngineValue:
        """Ends the loan of results.  Those that this process cannot open come by value: the model does not
        run again for them.

        Raises:
            WorkerDied: the worker ended before it sent them.
            ProtocolError: the worker lent something to a call that takes nothing.  Such calls are also those
                of event loops, which must not wait here.
        """
        taken = self.lane.codec.taken()
        if type(self.request) is not m.Invoke:
            raise ProtocolError("A worker lent memory on a GPU to a call that takes none.")
        if watch is not None:
            reply = watch.exchange(self.lane, taken, self.cancel)
        else:
            reply = self.lane.exchange(taken, None if deadline is None else deadline.left())
        if isinstance(reply, m.CallFailed):
            raise failures.rebuild(reply.failure)
        if not isinstance(reply, m.Result):
            self._pool.retire()
            if taken.by_value:
                self._pool.check_end(deadline if watch is None else watch.deadline)
                raise WorkerDied(
                    f"The worker of {self._pool.name} ended before its results on a GPU were read.",
                    pid=self._pool.granted.pid,
                )
            return results
        return self.lane.codec.with_values(results, taken, reply)

    def _settle(self, reply: Reply, deadline: Deadline | None) -> object:
        """Returns :data:`RETRY` if the request was not executed; the lane is free again, or closed."""
        match reply:
            case m.CallFailed(failure=failure):
                error = failures.rebuild(failure)
                if isinstance(error, DescriptorsExhausted):  # for a foreign memory, or it does no harm
                    self.lane.arena.memories.announce_again()
                self._pool.put(self.lane)
                raise error
            case m.Forgotten():
                self.lane.codec.plans.clear()
                self._pool.put(self.lane)
                return RETRY
        self._pool.retire()
        self.lane.close()
        if not isinstance(reply, m.Draining):
            self._pool.check_end(deadline)
        return RETRY

    def release(self) -> None:
        """Frees the lane of a request that was not sent."""
        self._pool.put(self.lane)

    def cancel(self, deadline: Deadline) -> bool:
        """Has the worker end the call as soon as the model lets it.  Returns whether the worker received that
        in time, or is gone and the call with it."""
        try:
            other = self._pool.connect("normal", deadline)
        except (DeadlinePassed, OSError):  # stopped, or no descriptor is left; closing the lane ends it, too
            return False
        if other is None:
            return True
        try:
            other.exchange(self.lane.end_of_this(), deadline.left())
        except TimeoutError:
            return False
        finally:
            other.close()
        return True

    def abort(self) -> None:
        """Ends a call whose result nobody waits for, and frees its lane if the call does end."""
        grace = Deadline(GRACE)
        try:
            if not self.cancel(grace):
                raise TimeoutError
            reply = self.lane.receive(grace.left())
        except Exception:  # nobody is there to be told
            self.lane.close()
            return
        with contextlib.suppress(Exception):  # likewise; the lane is free or closed by then
            self.conclude(reply, grace)
