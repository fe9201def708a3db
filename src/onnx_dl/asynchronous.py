"""Calls that are awaited: coroutines, without a thread for each.

The event loop watches the lane's descriptor itself.  What may block (a load, a new lane, copying much) is
done in a thread of its executor.  onnxruntime's own callbacks are :mod:`onnx_dl.callbacks`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Callable
from typing import Any, Final

from onnx_dl.client import ANSWERS, Lease, RemoteModel
from onnx_dl.errors import RunTimeout
from onnx_dl.transport import messages as m
from onnx_dl.transport.lane import ClientLane
from onnx_dl.watch import GRACE, Watch

_AT_ONCE: Final = 32
"""Calls of one model that one event loop has under way; each takes a lane and a thread of the worker."""
_LARGE: Final = 1 << 20
"""Bytes of inputs from which copying them is not the event loop's work."""

Make = Callable[[ClientLane], Any]

_turns: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[RemoteModel, asyncio.Semaphore]] = (
    weakref.WeakKeyDictionary()
)


async def call(
    model: RemoteModel, lease: Lease, make: Make, nbytes: int, timeout: float | None, run_options: Any
) -> Any:
    """One call, awaited.  Cancelling it ends the run.

    ``nbytes``: of the inputs; ``run_options``: whose ``terminate`` another thread may set.

    Raises:
        RunTimeout: it took longer than ``timeout`` seconds, and was told to end.
        Exception: like :meth:`RemoteModel.run`.
    """
    loop = asyncio.get_running_loop()
    turn = _turns.setdefault(loop, weakref.WeakKeyDictionary()).setdefault(model, asyncio.Semaphore(_AT_ONCE))
    try:
        async with asyncio.timeout(timeout), turn:
            while True:
                lane, message = await _ask_with(loop, model, lease, make, nbytes)
                if lane.reply_fd is None or run_options is not None:
                    done, result = await _in_thread(model, lane, message, run_options)
                    if done:
                        return result
                    continue
                reply = await _reply(loop, model, lane, message)
                if isinstance(reply, ANSWERS):
                    return model.finish(lane, reply)
                if isinstance(reply, m.CallFailed | m.Draining):
                    model.settle(lane, reply)
                else:  # it asks how the worker ended, and that may take a while
                    await loop.run_in_executor(None, model.settle, lane, reply)
    except TimeoutError as error:
        if isinstance(error, RunTimeout) or timeout is None:
            raise
        raise RunTimeout(f"The run took longer than {timeout:g} seconds and was told to end.") from None


async def _ask_with(
    loop: asyncio.AbstractEventLoop, model: RemoteModel, lease: Lease, make: Make, nbytes: int
) -> tuple[ClientLane, Any]:
    if nbytes < _LARGE:
        with contextlib.suppress(BlockingIOError):
            return model.ask_with(lease, make, wait=False)
    asked = loop.run_in_executor(None, model.ask_with, lease, make)
    try:
        return await asyncio.shield(asked)
    except asyncio.CancelledError:  # a lane that nobody takes is free again
        asked.add_done_callback(lambda done: None if done.exception() else model.put_lane(done.result()[0]))
        raise


async def _reply(loop: asyncio.AbstractEventLoop, model: RemoteModel, lane: ClientLane, message: Any) -> Any:
    ready = asyncio.Event()
    fd = lane.reply_fd
    assert fd is not None
    try:
        lane.send(message)
        loop.add_reader(fd, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(fd)
    except asyncio.CancelledError:
        loop.run_in_executor(None, _abort, model, lane)
        raise
    return lane.receive()


def _abort(model: RemoteModel, lane: ClientLane) -> None:
    """Ends a call that nobody waits for, and frees its lane if it does end."""
    try:
        model.terminate(lane)
        reply = lane.receive(GRACE)
        if isinstance(reply, ANSWERS):
            model.finish(lane, reply)
        else:
            model.settle(lane, reply)
    except Exception:  # nobody is there to hear of it
        lane.close()


async def _in_thread(model: RemoteModel, lane: ClientLane, message: Any, run_options: Any) -> Any:
    """Where there is no descriptor to watch (ZeroMQ), or RunOptions are to be looked at meanwhile."""
    watch = Watch(run_options)
    waiting = asyncio.ensure_future(asyncio.to_thread(model.complete, lane, message, watch))
    try:
        return await asyncio.shield(waiting)
    except asyncio.CancelledError:
        watch.ended = True
        waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
        raise
