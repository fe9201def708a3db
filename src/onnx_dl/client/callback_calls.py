"""``run_async``: results go to a callback, in a thread that is neither the caller's nor one for each call.

The thread waits for all replies that are to come, and is there only while some are.
"""

from __future__ import annotations

import collections
import contextlib
import os
import select
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from onnx_dl.client.cancellation import EVERY, GRACE, run_timeout
from onnx_dl.client.remote_model import ANSWERS, Lease, RemoteModel
from onnx_dl.concurrency import primitives, spawning
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.concurrency.threads import Thread
from onnx_dl.protocol import lane as m
from onnx_dl.transport import sockets
from onnx_dl.transport.client_lane import ClientLane
from onnx_dl.transport.sockets import Waker

_NAME: Final = "onnx-dl-callback"


class Callbacks:
    """Calls that were begun, and a thread that waits for their replies."""

    def __init__(self) -> None:
        self._waiter: _Waiter | None = None

    def await_reply(self, model: RemoteModel, lane: ClientLane, callback: Callback) -> None:
        """``callback`` is told of the reply of this lane, in another thread."""
        call = _Call(model, lane, callback)
        if lane.reply_fd is None:
            spawning.start(Thread(call.wait, _NAME), "run_async()")
        else:
            self._hand_over(call)

    def _forget(self, waiter: _Waiter) -> None:
        if self._waiter is waiter:  # if another has taken its place by now, that serves all that it has
            self._waiter = None

    def _hand_over(self, call: _Call) -> None:
        waiter = self._waiter
        if waiter is None or waiter.ended or waiter.is_this_thread or not waiter.waker.is_ours():
            # Two threads may come here at once: then there are two of these, each with calls of its own.  A
            # callback that waits for the result of a call that it has made must not wait for its own thread.
            waiter = _Waiter(self._forget)
            waiter.coming.append(call)
            waiter.start()
            self._waiter = waiter  # not before it runs: a signal handler would wait for its own thread
            if waiter.ended:  # before it could be forgotten
                self._forget(waiter)
            return
        waiter.coming.append(call)
        waiter.waker.wake()
        # It may have ended meanwhile: what it did not take then, another does.
        while waiter.ended and waiter.coming:
            with contextlib.suppress(IndexError):
                self._hand_over(waiter.coming.popleft())


class _Waiter:
    """Ends when there is nothing to wait for.  No lock: a call is where whoever takes it out finds it."""

    def __init__(self, at_end: Callable[[_Waiter], None]) -> None:
        self._at_end = at_end
        self.coming: collections.deque[_Call] = collections.deque()
        self.waker = Waker()
        self.ended = False
        self._poll = primitives.poll()  # has no descriptor of its own, which a program might close
        self._calls: dict[int, _Call] = {}
        """Those whose replies are waited for, by their descriptors."""
        self._thread = Thread(self._serve, "onnx-dl-callbacks")

    @property
    def is_this_thread(self) -> bool:
        return self._thread.is_this

    def start(self) -> None:
        """Raises ProcessesExhausted: there is no thread for it."""
        spawning.start(self._thread, "run_async()")

    def _serve(self) -> None:
        waker = self.waker
        self._poll.register(waker.fileno(), select.POLLIN)
        while self._take_in():
            for fd in sockets.sleep(self._poll, _until_next_look(list(self._calls.values()))):
                if fd == waker.fileno():
                    waker.clear()
                else:
                    self._taken(fd).hear()
            for fd, call in list(self._calls.items()):
                if call.look():
                    self._taken(fd).give_up()

    def _taken(self, fd: int) -> _Call:
        self._poll.unregister(fd)
        return self._calls.pop(fd)

    def _take_in(self) -> bool:
        """Watches what has come; false if there is nothing left to watch, so that the thread may end."""
        self._watch()
        if not self._calls:
            self.ended = True
            self._watch()  # what came before that was to be seen
        self.ended = not self._calls
        if self.ended:
            self._at_end(self)
        return not self.ended

    def _watch(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                call = self.coming.popleft()
                fd = call.lane.reply_fd or 0
                if fd in self._calls or fd == self.waker.fileno():  # the program closed what had this number
                    _apart(call.wait)
                else:
                    self._poll.register(fd, select.POLLIN)
                    self._calls[fd] = call


def _apart(work: Callable[..., object], *args: Any) -> None:
    """Does it in a thread of its own, so that other callbacks need not wait; here, where there is none."""
    try:
        Thread(work, _NAME, args).start()
    except RuntimeError:
        work(*args)


class _Call(NamedTuple):
    model: RemoteModel
    lane: ClientLane
    callback: Callback

    def hear(self) -> None:
        """A reply is there."""
        try:
            reply = self.lane.receive(0)
        except Exception as error:  # other calls are still to hear of theirs
            self.lane.close()
            self.callback.tell([], str(error))
        else:
            self.tell(reply)

    def tell(self, reply: Any) -> None:
        """The callback hears of the reply.  How a worker ended may take a while to learn, and is asked in
        another thread, so that other callbacks need not wait."""
        if reply is None:
            _apart(self._tell, None)
        else:
            self._tell(reply)

    def _tell(self, reply: Any) -> None:
        self.callback.tell(*_outcome(self.model, self.lane, reply, self.callback.deadline))

    def look(self) -> bool:
        """Has the run end if its options say so now; whether its time is up."""
        if self.callback.wants_end():
            _apart(self.model.terminate, self.lane, Deadline(GRACE))
        return self.callback.deadline is not None and self.callback.deadline.passed

    def give_up(self) -> None:
        """The time is up: closing the lane ends the run as soon as the model lets it."""
        self.lane.close()
        self.callback.tell([], str(run_timeout(self.callback.deadline, "was told to end")))

    def wait(self) -> None:
        """In a thread of its own, where there is no descriptor to wait for beside others."""
        while True:
            try:
                reply = self.lane.receive(_until_next_look([self]))
            except TimeoutError:
                if self.look():
                    self.give_up()
                    return
                continue
            self._tell(reply)
            return


def _until_next_look(calls: list[_Call]) -> float | None:
    """Seconds until one of them must be looked at, if no reply comes; None: not before."""
    looks = [EVERY for call in calls if call.callback.is_watched]
    lefts = [call.callback.deadline.left() for call in calls if call.callback.deadline is not None]
    return min([*looks, *(left for left in lefts if left is not None)], default=None)


_callbacks = Callbacks()


class Callback:
    """Who is told of results.  ``run_options``: whose ``terminate`` another thread may set meanwhile."""

    def __init__(
        self,
        callback: Callable[[Any, Any, str], object],
        user_data: Any,
        run_options: Any,
        deadline: Deadline | None = None,
        inputs: Any = None,
    ) -> None:
        """``inputs``: are kept until the callback has ended, because the worker may read them where they lie
        and the caller need not keep them, as with onnxruntime."""
        self._inputs = inputs
        self._callback = callback
        self._user_data = user_data
        self._run_options = run_options
        self._ended = False
        self.deadline = deadline

    @property
    def is_watched(self) -> bool:
        """Whether somebody may still end the call."""
        return self._run_options is not None and not self._ended

    def wants_end(self) -> bool:
        """Whether the run's options say, since the last look, that it is to end."""
        if not (self.is_watched and getattr(self._run_options, "terminate", False)):
            return False
        self._ended = True
        return True

    def tell(self, results: Any, error: str) -> None:
        """Calls the callback; what it raises goes where Python reports what nobody can catch."""
        try:
            self._callback(results, self._user_data, error)
        except Exception as failed:
            _report(failed)
        finally:
            self._inputs = None


def _outcome(model: RemoteModel, lane: ClientLane, reply: Any, deadline: Deadline | None) -> tuple[Any, str]:
    try:
        if isinstance(reply, ANSWERS):
            return model.finish(lane, reply), ""
        model.settle(lane, reply, deadline)
    except Exception as error:
        return [], str(error)
    return [], "The worker was unloaded meanwhile."


def _report(error: Exception) -> None:
    where = "onnxruntime.InferenceSession.run_async callback"
    if sys.unraisablehook is sys.__unraisablehook__:  # which takes none but Python's own objects
        print(f"Exception ignored in: {where!r}", file=sys.stderr)
        traceback.print_exception(error)
        return
    hook: Any = sys.unraisablehook
    hook(
        types.SimpleNamespace(
            exc_type=type(error),
            exc_value=error,
            exc_traceback=error.__traceback__,
            err_msg=None,
            object=where,
        )
    )


def call_back(
    model: RemoteModel, lease: Lease, make: Callable[[ClientLane], Any], callback: Callback
) -> None:
    """Begins a call and returns; ``callback`` is told of its results in another thread.

    Raises:
        ReentrantUse: this thread is the connection's own, which the callback may have to wait for.
        RunTimeout: the callback's deadline passed before the run began.
        Exception: what is known to be wrong before that.
    """
    deadline = callback.deadline
    model.connection.check_thread()
    while True:
        lane, message = model.ask_with(lease, make, deadline)
        try:
            reply = lane.exchange(message, None if deadline is None else deadline.left())
            if isinstance(reply, m.Started):
                _callbacks.await_reply(model, lane, callback)
                return
        except TimeoutError:
            lane.close()
            raise run_timeout(deadline, "was told to end") from None
        except BaseException:
            lane.close()
            raise
        model.settle(lane, reply, deadline)


def _after_fork() -> None:
    global _callbacks
    _callbacks = Callbacks()


os.register_at_fork(after_in_child=_after_fork)
