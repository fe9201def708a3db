"""Calls that are awaited by coroutines, without a thread for each.

The event loop watches the lane's descriptor itself.  Steps that may block (a load, a new lane, a large copy)
run in a thread whose deadline passes when the coroutine ends: a loop that closes would wait for it.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Final, NamedTuple, TypeVar

from onnx_dl.client.acquisition import Lease
from onnx_dl.client.cancellation import CancelWatch, run_timeout
from onnx_dl.client.pending_call import RETRY, PendingCall
from onnx_dl.client.remote_model import RemoteModel
from onnx_dl.client.served_model import FindModel, PlacedArguments, RunArguments, ServedModel
from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.concurrency.event_loops import EventLoops, present
from onnx_dl.errors import ProcessesExhausted
from onnx_dl.system.thread_attributes import on_behalf
from onnx_dl.tensors.call_codec import Request
from onnx_dl.tensors.call_plans import EngineValue
from onnx_dl.transport.client_lane import ClientLane, Reply

_AT_ONCE: Final = 32
"""Calls of one model that one event loop has under way; each takes a lane and a thread of the worker."""
_LARGE: Final = 1 << 20
"""Bytes of inputs from which on a thread copies them, not the event loop."""

_T = TypeVar("_T")
_Semaphore = AbstractAsyncContextManager[object]

_semaphores: weakref.WeakKeyDictionary[object, weakref.WeakKeyDictionary[ServedModel, _Semaphore]] = (
    weakref.WeakKeyDictionary()
)
"""One of each event loop for each model."""


@contextlib.contextmanager
def deadline_of(timeout: float | None) -> Iterator[Deadline]:
    """A deadline for the work of threads for this coroutine.  It passes when the block ends."""
    deadline = Deadline(timeout, movable=True)
    try:
        yield deadline
    finally:
        deadline.end()


async def in_thread(work: Callable[[Deadline], _T], timeout: float | None) -> _T:
    """Runs ``work`` in a thread, with a deadline that passes when this coroutine is cancelled."""
    with deadline_of(timeout) as deadline:
        return await _in_thread(present(), functools.partial(work, deadline))


async def _in_thread(loop: EventLoops, work: Callable[[], _T]) -> _T:
    return await loop.in_thread(on_behalf(work))


async def call(
    find: FindModel | ServedModel,
    lease: Lease,
    arguments: RunArguments | PlacedArguments,
    timeout: float | None,
    run_options: object,
) -> EngineValue:
    """One call, awaited.  Cancelling it ends the run.

    ``find``: the model, or a function that finds it where the host must be started first; ``run_options``: an
    ``onnxruntime.RunOptions`` whose ``terminate`` another thread may set.

    Raises:
        RunTimeout: it took longer than ``timeout`` seconds, and was told to end.
        ConfigError: no known library runs this coroutine.
        Exception: like :meth:`RemoteModel.run`.
    """
    loop = present()
    with deadline_of(timeout) as deadline:
        try:
            async with loop.timeout(timeout):
                model = await _in_thread(loop, functools.partial(find, deadline)) if callable(find) else find
                async with _semaphore(loop, model):
                    if isinstance(model, RemoteModel):
                        awaited = _AwaitedCall(loop, model, lease, arguments, run_options, deadline)
                        return await awaited.result()
                    watch = CancelWatch(run_options, deadline)
                    assert isinstance(arguments, RunArguments)  # the others are for workers only
                    return await _in_thread(loop, lambda: model.run(lease, *arguments, watch))
        except TimeoutError as error:
            # Others are the end of a load's time, or the supervisor's, and not the caller's.
            if timeout is None or type(error) not in (TimeoutError, DeadlinePassed):
                raise
            raise run_timeout(deadline, "was told to end") from None


def _semaphore(loop: EventLoops, model: ServedModel) -> _Semaphore:
    key = loop.key()
    if (of_loop := _semaphores.get(key)) is None:
        of_loop = _semaphores.setdefault(key, weakref.WeakKeyDictionary())
    if (semaphore := of_loop.get(model)) is None:
        semaphore = of_loop.setdefault(model, loop.semaphore(_AT_ONCE))
    return semaphore


class _AwaitedCall(NamedTuple):
    """One call of a coroutine."""

    loop: EventLoops
    model: RemoteModel
    lease: Lease
    arguments: RunArguments | PlacedArguments
    run_options: object
    deadline: Deadline

    def encode(self, lane: ClientLane) -> Request:
        return self.arguments.encode(lane.codec)

    async def result(self) -> EngineValue:
        nbytes = self.arguments.nbytes
        while True:
            call = await self._prepare(nbytes)
            if call.lane.reply_fd is None or self.run_options is not None:
                result = await self._perform(call)
            else:
                reply = await self._reply(call)
                conclude = functools.partial(call.conclude, reply, self.deadline)
                result = await _in_thread(self.loop, conclude) if call.needs_host(reply) else conclude()
            if result is not RETRY:
                return result

    async def _prepare(self, nbytes: int) -> PendingCall:
        if nbytes < _LARGE:
            with contextlib.suppress(BlockingIOError):
                return self.model.prepare(self.lease, self.encode, wait=False)
        # The call is in here until the coroutine takes it out, or the thread that finds it given up, in one
        # step.
        found: collections.deque[PendingCall] = collections.deque()
        given_up = False

        def prepare() -> None:
            found.append(self.model.prepare(self.lease, self.encode, self.deadline))
            if given_up:
                _release(found)

        try:
            await _in_thread(self.loop, prepare)
        except self.loop.cancelled:
            given_up = True
            _release(found)
            raise
        return found.pop()

    async def _perform(self, call: PendingCall) -> EngineValue:
        """:meth:`PendingCall.perform` in a thread.  The lane is free again if no thread has taken the call
        when the coroutine is cancelled."""
        free, watch = collections.deque([call]), CancelWatch(self.run_options, self.deadline)
        try:
            return await _in_thread(self.loop, lambda: free.pop().perform(watch))
        except self.loop.cancelled:
            _release(free)  # if a thread has it, its deadline ends the call
            raise

    async def _reply(self, call: PendingCall) -> Reply:
        lane = call.lane
        try:
            lane.send(call.request)
            assert lane.reply_fd is not None
            await self.loop.readable(lane.reply_fd)
            return lane.receive()
        except self.loop.cancelled:
            try:  # nobody waits for the call any more
                self.loop.aside(call.abort)
            except (RuntimeError, ProcessesExhausted):  # closing the lane ends the call, too
                lane.close()
            raise
        except BaseException:
            lane.close()
            raise


def _release(found: collections.deque[PendingCall]) -> None:
    """Frees the lane of a call that nobody has taken."""
    with contextlib.suppress(IndexError):
        found.pop().release()
