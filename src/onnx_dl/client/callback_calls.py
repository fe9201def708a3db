"""``run_async``: passes results to a callback, in one thread for all calls.

The thread waits for all outstanding replies, and exists only while there are some.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import select
import sys
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from onnx_dl.client.acquisition import Lease
from onnx_dl.client.cancellation import EVERY, GRACE, CancelWatch, run_timeout
from onnx_dl.client.pending_call import RETRY, PendingCall
from onnx_dl.client.remote_model import RemoteModel
from onnx_dl.client.served_model import BeginsRuns, RunArguments, ServedModel
from onnx_dl.concurrency import primitives, spawning
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.concurrency.spawning import Thread
from onnx_dl.errors import ProtocolError
from onnx_dl.linux_only import register_at_fork
from onnx_dl.protocol import lane as m
from onnx_dl.tensors.call_plans import EngineValue
from onnx_dl.transport import sockets
from onnx_dl.transport.client_lane import Reply
from onnx_dl.transport.sockets import Waker

_NAME: Final = "onnx-dl-callback"


_waiter: _CallbackThread | None = None
"""The one that gets new calls."""


def _hand_over(call: _BackgroundCall) -> None:
    """Has the result passed to the callback, in another thread."""
    global _waiter
    waiter = _waiter
    if waiter is None or waiter.ended or waiter.thread.is_this or not waiter.waker.is_ours():
        # Two threads may come here at once: then there are two waiters, each with calls of its own.  A
        # callback that waits for the result of a call of its own must not wait for its own thread.
        waiter = _CallbackThread()
        waiter.coming.append(call)
        spawning.start(waiter.thread, "run_async()")
        _waiter = waiter  # not before it runs: a signal handler would wait for its own thread
        if waiter.ended:  # before it could be forgotten
            _forget(waiter)
        return
    waiter.coming.append(call)
    waiter.waker.wake()
    # It may have ended meanwhile: another one takes the calls that it did not take.
    while waiter.ended and waiter.coming:
        with contextlib.suppress(IndexError):
            _hand_over(waiter.coming.popleft())


def _forget(waiter: _CallbackThread | None) -> None:
    global _waiter
    if _waiter is waiter:  # another one that has taken its place by now stays
        _waiter = None


class _CallbackThread:
    """The thread.  It ends when there is nothing to wait for.  No lock: the calls lie in a deque, from which
    a thread takes one in a single step."""

    def __init__(self) -> None:
        self.coming: collections.deque[_BackgroundCall] = collections.deque()
        self.waker = Waker()
        self.ended = False
        self._poll = primitives.poll()  # has no descriptor of its own, which a program might close
        self._calls: dict[int, _BackgroundCall] = {}
        """Calls whose replies are waited for, by their descriptors."""
        self.thread = Thread(self._serve, "onnx-dl-callbacks")

    def _serve(self) -> None:
        waker = self.waker
        self._poll.register(waker.fileno(), select.POLLIN)
        while self._take_in():
            for fd in sockets.sleep(self._poll, _until_next_look(list(self._calls.values()))):
                if fd == waker.fileno():
                    waker.clear()
                else:
                    self._taken(fd).receive()
            for fd, call in list(self._calls.items()):
                if call.look():
                    self._taken(fd).give_up()

    def _taken(self, fd: int) -> _BackgroundCall:
        self._poll.unregister(fd)
        return self._calls.pop(fd)

    def _take_in(self) -> bool:
        """Watches the calls that have come; false if none is left, so that the thread may end."""
        self._watch()
        if not self._calls:
            self.ended = True
            self._watch()  # calls that came before the mark could be seen
        self.ended = not self._calls
        if self.ended:
            _forget(self)
        return not self.ended

    def _watch(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                call = self.coming.popleft()
                fd = call.pending.lane.reply_fd or 0
                if fd in self._calls or fd == self.waker.fileno():  # the program closed what had this number
                    _apart(call.wait)
                else:
                    self._poll.register(fd, select.POLLIN)
                    self._calls[fd] = call


def _apart(work: Callable[[], object]) -> None:
    """Runs ``work`` beside other callbacks, in a thread of its own; here if there is none."""
    try:
        Thread(work, _NAME).start()
    except RuntimeError:
        work()


class _BackgroundCall(NamedTuple):
    pending: PendingCall
    callback: Callback

    def receive(self) -> None:
        """Takes the reply that is there."""
        try:
            reply = self.pending.lane.receive(0)
        except Exception as error:  # other calls still wait for their replies
            self.pending.lane.close()
            self.callback.send([], str(error))
            return
        if self.pending.needs_host(reply):  # it takes a while, for which other callbacks need not wait
            _apart(functools.partial(self._conclude, reply))
        else:
            self._conclude(reply)

    def _conclude(self, reply: Reply) -> None:
        try:
            result, error = self.pending.conclude(reply, self.callback.deadline), ""
            if result is RETRY:
                result, error = [], "The worker was unloaded meanwhile."
        except Exception as failed:
            result, error = [], str(failed)
        self.callback.send(result, error)

    def look(self) -> bool:
        """Ends the run if its options ask for that now; whether the deadline has passed."""
        if self.callback.wants_end():
            _apart(lambda: self.pending.cancel(Deadline(GRACE)))
        return self.callback.deadline is not None and self.callback.deadline.passed

    def give_up(self) -> None:
        """Ends the run after its deadline: closing the lane does that as soon as the model lets it."""
        self.pending.lane.close()
        self.callback.send([], str(run_timeout(self.callback.deadline, "was told to end")))

    def wait(self) -> None:
        """Waits in a thread of its own, because ZeroMQ has no descriptor to wait for beside others."""
        while True:
            try:
                reply = self.pending.lane.receive(_until_next_look([self]))
            except TimeoutError:
                if self.look():
                    return self.give_up()
            else:
                return self._conclude(reply)


def _until_next_look(calls: list[_BackgroundCall]) -> float | None:
    """Seconds until one of the calls must be looked at; None: not before a reply comes."""
    looks = [EVERY for call in calls if call.callback.is_watched]
    lefts = [call.callback.deadline.left() for call in calls if call.callback.deadline is not None]
    return min([*looks, *(left for left in lefts if left is not None)], default=None)


@dataclass(slots=True)
class Callback:
    """A callback, and the terms of its call."""

    function: Callable[[EngineValue, EngineValue, str], object]
    user_data: object
    run_options: object
    """An ``onnxruntime.RunOptions`` whose ``terminate`` another thread may set."""
    deadline: Deadline | None
    inputs: object
    """Kept until the callback has ended, because the worker may read them where they lie, and as with
    onnxruntime the caller need not keep them."""
    _ended: bool = False

    @property
    def is_watched(self) -> bool:
        """True if the run's options may still end the call."""
        return self.run_options is not None and not self._ended

    def wants_end(self) -> bool:
        """True if the run's options ask for its end, for the first time."""
        if not (self.is_watched and getattr(self.run_options, "terminate", False)):
            return False
        self._ended = True
        return True

    def send(self, results: EngineValue, error: str) -> None:
        """Calls the callback.  Its exceptions go to ``sys.unraisablehook``."""
        try:
            self.function(results, self.user_data, error)
        except Exception as failed:
            _report(failed)
        finally:
            self.inputs = None


def _report(error: Exception) -> None:
    where = "onnxruntime.InferenceSession.run_async callback"
    if sys.unraisablehook is sys.__unraisablehook__:  # which takes none but Python's own objects
        print(f"Exception ignored in: {where!r}", file=sys.stderr)
        traceback.print_exception(error)
        return
    told = types.SimpleNamespace(
        exc_type=type(error), exc_value=error, exc_traceback=error.__traceback__, err_msg=None, object=where
    )
    sys.unraisablehook(told)


def call_back(model: ServedModel, lease: Lease, arguments: RunArguments, callback: Callback) -> None:
    """Begins a call and returns; its results go to ``callback`` in another thread.

    Raises:
        ReentrantUse: this thread is the connection's own, for which the callback may have to wait.
        RunTimeout: the callback's deadline passed before the run began.
        Exception: the call was refused before that.
    """
    if isinstance(model, RemoteModel):
        _begin(model, lease, arguments, callback)
        return
    watch = CancelWatch(callback.run_options, callback.deadline)
    assert isinstance(model, BeginsRuns)
    model.begin(lease, arguments, watch, callback.send)


def _begin(model: RemoteModel, lease: Lease, arguments: RunArguments, callback: Callback) -> None:
    deadline = callback.deadline
    model.connection.check_thread()
    while True:
        call = model.prepare(
            lease, lambda lane: lane.codec.encode_call(*arguments, background=True), deadline
        )
        try:
            reply = call.lane.exchange(call.request, None if deadline is None else deadline.left())
            if isinstance(reply, m.Started):
                begun = _BackgroundCall(call, callback)
                if call.lane.reply_fd is None:
                    spawning.start(Thread(begun.wait, _NAME), "run_async()")
                else:
                    _hand_over(begun)
                return
        except TimeoutError:
            call.lane.close()
            raise run_timeout(deadline, "was told to end") from None
        except BaseException:
            call.lane.close()
            raise
        if call.conclude(reply, deadline) is not RETRY:
            raise ProtocolError("A worker gave the result of a call in the background before it began it.")


register_at_fork(after_in_child=lambda: _forget(_waiter))
