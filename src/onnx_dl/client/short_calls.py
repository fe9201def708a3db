"""Calls that are like the last one on an idle lane, for programs that watch over each call of theirs.

Takes as few steps as :meth:`RemoteModel.repeat`, and the call may end early: by a deadline that another
thread moves, or with the coroutine that awaits it.  A coroutine waits without its event loop for as long as
such calls usually take, if that is short: to have the loop wait takes longer than the call.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Final, NamedTuple

from onnx_dl.client.acquisition import Lease
from onnx_dl.client.cancellation import CancelWatch, run_timeout
from onnx_dl.client.lane_pool import LanePool
from onnx_dl.client.pending_call import RETRY, PendingCall, abandon
from onnx_dl.client.remote_model import RemoteModel
from onnx_dl.client.served_model import ServedModel
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.concurrency.errands import ABORTS
from onnx_dl.errors import ProcessesExhausted
from onnx_dl.protocol import lane as m
from onnx_dl.tensors.call_plans import CallPlan, EngineValue, Feed
from onnx_dl.transport.call_channel import SAME
from onnx_dl.transport.client_lane import ClientLane, Reply

_LONGEST: Final = 1
"""Milliseconds that an event loop is kept waiting at most; the least that ``poll()`` can wait."""
_WORTH: Final = 150e-6
"""Usual duration of a call up to which that is done."""
_AGAIN: Final = 256
"""Calls after which it is tried again with a model that was too slow for it."""
_WEIGHT: Final = 1 / 8
_EARLY: Final = 20
"""Milliseconds for which a call is waited for before its deadline is looked at."""


class Patience:
    """Time for which a coroutine waits for the replies of one model without its loop.  Pure."""

    __slots__ = ("_left_out", "_usual")

    def __init__(self) -> None:
        self._usual = _WORTH / 2
        self._left_out = 0

    @property
    def milliseconds(self) -> int:
        """Milliseconds to wait for the next call; 0: not at all."""
        if self._usual < _WORTH:
            return _LONGEST
        self._left_out += 1
        return 0 if self._left_out % _AGAIN else _LONGEST

    def note(self, took: float | None) -> None:
        """Record the duration of a call that was waited for; None: it took longer than that."""
        if took is None:
            self._usual += (4 * _WORTH - self._usual) * _WEIGHT
        elif self._usual < _WORTH:
            self._usual += (took - self._usual) * _WEIGHT
        else:
            self._usual = min(took, _WORTH)


class ShortCall(NamedTuple):
    """One call, sent.  Its reply is still to come."""

    pool: LanePool
    lane: ClientLane
    plan: CallPlan

    @property
    def pending(self) -> PendingCall:
        return PendingCall(self.pool, self.lane, self.plan)

    def conclude(self, reply: Reply, deadline: Deadline) -> list[EngineValue] | None:
        """Return the results; None: the call was not executed.  The lane is free again, or closed.  Raises
        like :meth:`PendingCall.conclude`, with which it waits for the host until the deadline."""
        pool, lane = self.pool, self.lane
        if reply != SAME:
            result = self.pending.conclude(reply, deadline)
            return None if result is RETRY else result
        try:
            assert self.plan.repeated is not None  # nobody else uses the lane
            results = self.plan.repeated.results()
        except BaseException as error:
            abandon(pool, lane, error)
            raise
        pool.put(lane)
        return results


def begin(model: ServedModel | None, lease: Lease, outputs: EngineValue, feed: Feed) -> ShortCall | None:
    """Send a call if it is like the last one on an idle lane.  None: it is not, or the model is not loaded;
    nothing was sent.

    Raises:
        DescriptorsExhausted: this process may open no more files.
    """
    if not isinstance(model, RemoteModel):
        return None
    pool = model.worker.usable_by(lease)
    if pool is None or pool.over_zmq or not model.serves(lease) or lease.closed:
        return None
    if (lane := pool.take(lease.terms.latency)) is None:
        return None
    try:
        plan = lane.codec.repeated(outputs, feed)
        if plan is None:
            pool.put(lane)
            return None
        lane.send(plan)
    except BaseException as error:  # KeyboardInterrupt included: the reply may be still to come
        abandon(pool, lane, error)
        raise
    return ShortCall(pool, lane, plan)


def finish(call: ShortCall, deadline: Deadline) -> list[EngineValue] | None:
    """Wait in this thread.  Return the results; None: the call was not executed.

    Raises:
        RunTimeout: the deadline passed, or was ended.
        Exception: what the worker raised, or how it ended.
    """
    lane = call.lane
    try:
        try:
            left = None if deadline.timeout is None else deadline.left()
            reply = lane.receive_early(_EARLY if left is None else min(_EARLY, math.ceil(left * 1000)))
        except TimeoutError:
            reply = CancelWatch(deadline=deadline).wait(
                lane.receive,
                lambda grace: call.pending.cancel(grace),
                lambda found: isinstance(found, m.CallFailed),
            )
    except BaseException as error:
        abandon(call.pool, lane, error)
        raise
    return call.conclude(reply, deadline)


async def afinish(call: ShortCall, deadline: Deadline, patience: Patience) -> list[EngineValue] | None:
    """:func:`finish`, awaited on asyncio.  Cancelling it ends the run."""
    try:
        reply = await _reply(call.lane, deadline, patience)
    except (asyncio.CancelledError, TimeoutError) as error:
        _abort(call)
        if isinstance(error, TimeoutError):
            raise run_timeout(deadline, "was told to end") from None
        raise
    except BaseException as error:
        abandon(call.pool, call.lane, error)
        raise
    if reply != SAME and call.pending.needs_host(reply):
        return await asyncio.to_thread(call.conclude, reply, deadline)
    return call.conclude(reply, deadline)


async def _reply(lane: ClientLane, deadline: Deadline, patience: Patience) -> Reply:
    if milliseconds := patience.milliseconds:
        began = time.perf_counter()
        try:
            reply = lane.receive_early(milliseconds)
        except TimeoutError:
            patience.note(None)
        else:
            patience.note(time.perf_counter() - began)
            return reply
    async with asyncio.timeout(deadline.left()):
        return await _readable(lane)


async def _readable(lane: ClientLane) -> Reply:
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    assert lane.reply_fd is not None
    loop.add_reader(lane.reply_fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(lane.reply_fd)
    return lane.receive()


def _abort(call: ShortCall) -> None:
    """End a call that nobody waits for any more."""
    try:
        ABORTS.add(call.pending.abort)
    except (RuntimeError, ProcessesExhausted):  # there is no thread: closing the lane ends the call, too
        call.lane.close()
