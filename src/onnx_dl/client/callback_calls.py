"""``run_async``: passes results to a callback, in one thread for all calls.

The thread waits for all outstanding replies, and exists only while there are some.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import select
import sys
import traceback
import types
from collections.abc import Callable
from typing import Final, NamedTuple

from onnx_dl.client.cancellation import EVERY, GRACE, run_timeout
from onnx_dl.client.lease import Lease
from onnx_dl.client.pending_call import RETRY, PendingCall
from onnx_dl.client.remote_model import Encode, RemoteModel
from onnx_dl.concurrency import primitives, spawning
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.concurrency.spawning import Thread
from onnx_dl.errors import ProtocolError
from onnx_dl.protocol import lane as m
from onnx_dl.tensors.call_plans import EngineValue
from onnx_dl.transport import sockets
from onnx_dl.transport.client_lane import Reply
from onnx_dl.transport.sockets import Waker

_NAME: Final = "onnx-dl-callback"


class Callbacks:
    """Calls that were begun, and the thread that waits for their replies."""

    def __init__(self) -> None:
        self._waiter: _Waiter | None = None

    def await_reply(self, pending: PendingCall, callback: Callback) -> None:
        """Passes the result to ``callback``, in another thread."""
        call = _Call(pending, callback)
        if pending.lane.reply_fd is None:
            spawning.start(Thread(call.wait, _NAME), "run_async()")
        else:
            self._hand_over(call)

    def _forget(self, waiter: _Waiter) -> None:
        if self._waiter is waiter:  # another one that has taken its place by now stays
            self._waiter = None

    def _hand_over(self, call: _Call) -> None:
        waiter = self._waiter
        if waiter is None or waiter.ended or waiter.thread.is_this or not waiter.waker.is_ours():
            # Two threads may come here at once: then there are two waiters, each with calls of its own.  A
            # callback that waits for the result of a call of its own must not wait for its own thread.
            waiter = _Waiter(self._forget)
            waiter.coming.append(call)
            spawning.start(waiter.thread, "run_async()")
            self._waiter = waiter  # not before it runs: a signal handler would wait for its own thread
            if waiter.ended:  # before it could be forgotten
                self._forget(waiter)
            return
        waiter.coming.append(call)
        waiter.waker.wake()
        # It may have ended meanwhile: another one takes the calls that it did not take.
        while waiter.ended and waiter.coming:
            with contextlib.suppress(IndexError):
                self._hand_over(waiter.coming.popleft())


class _Waiter:
    """The thread.  It ends when there is nothing to wait for.  No lock: the calls lie in a deque, from which
    a thread takes one in a single step."""

    def __init__(self, at_end: Callable[[_Waiter], None]) -> None:
        self._at_end = at_end
        self.coming: collections.deque[_Call] = collections.deque()
        self.waker = Waker()
        self.ended = False
        self._poll = primitives.poll()  # has no descriptor of its own, which a program might close
        self._calls: dict[int, _Call] = {}
        """Those whose replies are waited for, by their descriptors."""
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

    def _taken(self, fd: int) -> _Call:
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
            self._at_end(self)
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


class _Call(NamedTuple):
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
            result = self.pending.conclude(reply, self.callback.deadline)
        except Exception as error:
            self.callback.send([], str(error))
            return
        if result is RETRY:
            self.callback.send([], "The worker was unloaded meanwhile.")
        else:
            self.callback.send(result, "")

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
                    self.give_up()
                    return
                continue
            self._conclude(reply)
            return


def _until_next_look(calls: list[_Call]) -> float | None:
    """Seconds until one of the calls must be looked at; None: not before a reply comes."""
    looks = [EVERY for call in calls if call.callback.is_watched]
    lefts = [call.callback.deadline.left() for call in calls if call.callback.deadline is not None]
    return min([*looks, *(left for left in lefts if left is not None)], default=None)


_callbacks = Callbacks()


class Callback:
    """A callback, and the terms of its call."""

    def __init__(
        self,
        callback: Callable[[EngineValue, EngineValue, str], object],
        user_data: object,
        run_options: object,
        deadline: Deadline | None = None,
        inputs: object = None,
    ) -> None:
        """``run_options``: an ``onnxruntime.RunOptions`` whose ``terminate`` another thread may set;
        ``inputs``: are kept until the callback has ended, because the worker may read them where they lie,
        and as with onnxruntime the caller need not keep them."""
        self._inputs = inputs
        self._callback = callback
        self._user_data = user_data
        self._run_options = run_options
        self._ended = False
        self.deadline = deadline

    @property
    def is_watched(self) -> bool:
        """Whether the run's options may still end the call."""
        return self._run_options is not None and not self._ended

    def wants_end(self) -> bool:
        """Whether the run's options ask for its end, for the first time."""
        if not (self.is_watched and getattr(self._run_options, "terminate", False)):
            return False
        self._ended = True
        return True

    def send(self, results: EngineValue, error: str) -> None:
        """Calls the callback.  Its exceptions go to ``sys.unraisablehook``."""
        try:
            self._callback(results, self._user_data, error)
        except Exception as failed:
            _report(failed)
        finally:
            self._inputs = None


def _report(error: Exception) -> None:
    where = "onnxruntime.InferenceSession.run_async callback"
    if sys.unraisablehook is sys.__unraisablehook__:  # which takes none but Python's own objects
        print(f"Exception ignored in: {where!r}", file=sys.stderr)
        traceback.print_exception(error)
        return
    hook: Callable[[object], object] = sys.unraisablehook  # type: ignore[assignment]
    hook(
        types.SimpleNamespace(
            exc_type=type(error),
            exc_value=error,
            exc_traceback=error.__traceback__,
            err_msg=None,
            object=where,
        )
    )


def call_back(model: RemoteModel, lease: Lease, encode: Encode, callback: Callback) -> None:
    """Begins a call and returns; its results go to ``callback`` in another thread.

    Raises:
        ReentrantUse: this thread is the connection's own, for which the callback may have to wait.
        RunTimeout: the callback's deadline passed before the run began.
        Exception: an error that shows before that.
    """
    deadline = callback.deadline
    model.connection.check_thread()
    while True:
        call = model.prepare(lease, encode, deadline)
        try:
            reply = call.lane.exchange(call.request, None if deadline is None else deadline.left())
            if isinstance(reply, m.Started):
                _callbacks.await_reply(call, callback)
                return
        except TimeoutError:
            call.lane.close()
            raise run_timeout(deadline, "was told to end") from None
        except BaseException:
            call.lane.close()
            raise
        if call.conclude(reply, deadline) is not RETRY:
            raise ProtocolError("A worker gave the result of a call in the background before it began it.")


def _after_fork() -> None:
    global _callbacks
    _callbacks = Callbacks()


os.register_at_fork(after_in_child=_after_fork)
