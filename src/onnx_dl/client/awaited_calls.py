"""Calls that are awaited: coroutines, without a thread for each.

The event loop watches the lane's descriptor itself.  What may block (a load, a new lane, copying much) is
done in another thread, with a deadline that passes when the coroutine ends, so that no thread is left for the
loop to wait for when it closes.  Whose event loop it is, is :mod:`onnx_dl.concurrency.event_loops`'s; onnxruntime's own
callbacks are :mod:`onnx_dl.client.callback_calls`'s.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

from onnx_dl.client.cancellation import GRACE, Watch, run_timeout
from onnx_dl.client.remote_model import ANSWERS, Lease, RemoteModel
from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.concurrency.event_loops import EventLoops, present
from onnx_dl.errors import RunTimeout
from onnx_dl.protocol import lane as m
from onnx_dl.system.thread_attributes import on_behalf
from onnx_dl.transport.client_lane import ClientLane

_AT_ONCE: Final = 32
"""Calls of one model that one event loop has under way; each takes a lane and a thread of the worker."""
_LARGE: Final = 1 << 20
"""Bytes of inputs from which copying them is not the event loop's work."""

Make = Callable[[ClientLane], Any]
_T = TypeVar("_T")

_turns: weakref.WeakKeyDictionary[Any, weakref.WeakKeyDictionary[RemoteModel, Any]] = (
    weakref.WeakKeyDictionary()
)
"""Semaphores, of each event loop for each model."""


@contextlib.contextmanager
def deadline_of(timeout: float | None) -> Iterator[Deadline]:
    """A deadline for what threads do for this coroutine.  It passes when the block ends."""
    deadline = Deadline(timeout, movable=True)
    try:
        yield deadline
    finally:
        deadline.end()


async def in_thread(work: Callable[[Deadline], _T], timeout: float | None) -> _T:
    """What ``work`` returns; it is given a deadline, and ends when this coroutine is cancelled."""
    with deadline_of(timeout) as deadline:
        return await _in_thread(present(), functools.partial(work, deadline))


async def _in_thread(loop: EventLoops, work: Callable[[], _T]) -> _T:
    return await loop.in_thread(on_behalf(work))


async def call(
    find: Callable[[Deadline], RemoteModel] | RemoteModel,
    lease: Lease,
    make: Make,
    nbytes: int,
    timeout: float | None,
    run_options: Any,
) -> Any:
    """One call, awaited.  Cancelling it ends the run.

    ``find``: the model, or what finds it where the host must be started first; ``nbytes``: of the inputs;
    ``run_options``: whose ``terminate`` another thread may set.

    Raises:
        RunTimeout: it took longer than ``timeout`` seconds, and was told to end.
        ConfigError: nothing that we know runs this coroutine.
        Exception: like :meth:`RemoteModel.run`.
    """
    loop = present()
    with deadline_of(timeout) as deadline:
        try:
            async with loop.timeout(timeout):
                model = find
                if not isinstance(model, RemoteModel):
                    model = await _in_thread(loop, functools.partial(model, deadline))
                async with _turn(loop, model):
                    return await _call(loop, model, lease, make, nbytes, run_options, deadline)
        except TimeoutError as error:
            if timeout is None or isinstance(error, RunTimeout) or not _is_ours(error):
                raise
            raise run_timeout(deadline, "was told to end") from None


def _turn(loop: EventLoops, model: RemoteModel) -> Any:
    key = loop.key()
    if (turns := _turns.get(key)) is None:
        turns = _turns.setdefault(key, weakref.WeakKeyDictionary())
    if (turn := turns.get(model)) is None:
        turn = turns.setdefault(model, loop.semaphore(_AT_ONCE))
    return turn


def _is_ours(error: TimeoutError) -> bool:
    """Whether the caller's time is up, rather than that of a load or of the supervisor."""
    return type(error) in (TimeoutError, DeadlinePassed)


async def _call(
    loop: EventLoops,
    model: RemoteModel,
    lease: Lease,
    make: Make,
    nbytes: int,
    run_options: Any,
    deadline: Deadline,
) -> Any:
    while True:
        lane, message = await _ask_with(loop, model, lease, make, nbytes, deadline)
        if lane.reply_fd is None or run_options is not None:
            done, result = await _complete(loop, model, lane, message, Watch(run_options, deadline))
            if done:
                return result
            continue
        reply = await _reply(loop, model, lane, message)
        if isinstance(reply, ANSWERS):
            return model.finish(lane, reply)
        if isinstance(reply, m.CallFailed | m.Draining | m.Forgotten):
            model.settle(lane, reply)
        else:  # it asks how the worker ended, and that may take a while
            await _in_thread(loop, functools.partial(model.settle, lane, reply, deadline))


async def _ask_with(
    loop: EventLoops,
    model: RemoteModel,
    lease: Lease,
    make: Make,
    nbytes: int,
    deadline: Deadline,
) -> tuple[ClientLane, Any]:
    if nbytes < _LARGE:
        with contextlib.suppress(BlockingIOError):
            return model.ask_with(lease, make, wait=False)
    # Each lane is in here until somebody takes it out, in one step: the coroutine, or who finds it given up.
    found: collections.deque[tuple[ClientLane, Any]] = collections.deque()
    given_up = False

    def ask() -> None:
        found.append(model.ask_with(lease, make, deadline))
        if given_up:
            _put_back(model, found)

    try:
        await _in_thread(loop, ask)
    except loop.cancelled:
        given_up = True
        _put_back(model, found)
        raise
    return found.pop()


def _put_back(model: RemoteModel, found: collections.deque[tuple[ClientLane, Any]]) -> None:
    """A lane that nobody has taken is free again."""
    with contextlib.suppress(IndexError):
        model.put_lane(found.pop()[0])


async def _complete(
    loop: EventLoops, model: RemoteModel, lane: ClientLane, message: Any, watch: Watch
) -> tuple[bool, Any]:
    """:meth:`RemoteModel.complete` in a thread.  A lane that no thread has taken when the coroutine is
    cancelled is free again."""
    free = [lane]
    try:
        return await _in_thread(loop, lambda: model.complete(free.pop(), message, watch))
    except loop.cancelled:
        with contextlib.suppress(IndexError):  # a thread has it: its deadline ends the call
            model.put_lane(free.pop())
        raise


async def _reply(loop: EventLoops, model: RemoteModel, lane: ClientLane, message: Any) -> Any:
    try:
        lane.send(message)
        assert lane.reply_fd is not None
        await loop.readable(lane.reply_fd)
        return lane.receive()
    except loop.cancelled:
        _abandon(loop, model, lane)
        raise
    except BaseException:
        lane.close()
        raise


def _abandon(loop: EventLoops, model: RemoteModel, lane: ClientLane) -> None:
    """Ends a call that nobody waits for, without waiting."""
    try:
        loop.aside(functools.partial(_abort, model, lane))
    except RuntimeError:  # the loop's threads have ended: closing the lane ends the call, too
        lane.close()


def _abort(model: RemoteModel, lane: ClientLane) -> None:
    """Ends a call that nobody waits for, and frees its lane if it does end."""
    grace = Deadline(GRACE)
    try:
        if not model.terminate(lane, grace):
            raise TimeoutError
        reply = lane.receive(grace.left())
    except Exception:  # nobody is there to hear of it
        lane.close()
        return
    with contextlib.suppress(Exception):  # likewise; the lane is put back, or closed, before
        if isinstance(reply, ANSWERS):
            model.finish(lane, reply)
        else:
            model.settle(lane, reply, grace)
