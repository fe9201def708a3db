"""``run_async``: results go to a callback, in a thread that is neither the caller's nor one for each call.

The thread waits for all replies that are to come, and is there only while some are.
"""

from __future__ import annotations

import os
import selectors
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any, NamedTuple

from onnx_dl.client import ANSWERS, Lease, RemoteModel
from onnx_dl.transport import messages as m
from onnx_dl.transport.lane import ClientLane
from onnx_dl.transport.sockets import Waker
from onnx_dl.watch import EVERY


class Callbacks:
    """Calls that were begun, and one thread that waits for their replies."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._coming: list[_Call] = []
        self._waker: Waker | None = None

    def await_reply(self, model: RemoteModel, lane: ClientLane, callback: Callback) -> None:
        """``callback`` is told of the reply of this lane, in another thread."""
        call = _Call(model, lane, callback)
        if lane.reply_fd is None:
            threading.Thread(target=call.wait, name="onnx-dl-callback", daemon=True).start()
            return
        with self._lock:
            self._coming.append(call)
            if self._waker is None:
                self._waker = Waker()
                threading.Thread(
                    target=self._serve, args=(self._waker,), name="onnx-dl-callbacks", daemon=True
                ).start()
            self._waker.wake()

    def _serve(self, waker: Waker) -> None:
        selector = selectors.DefaultSelector()
        selector.register(waker.fileno(), selectors.EVENT_READ)
        with selector:
            while self._take_in(selector):
                calls = [key.data for key in selector.get_map().values() if key.data is not None]
                watched = any(call.callback.is_watched for call in calls)
                for key, _ in selector.select(EVERY if watched else None):
                    if key.data is None:
                        waker.clear()
                        continue
                    selector.unregister(key.fd)
                    calls.remove(key.data)
                    key.data.tell(key.data.lane.receive())
                for call in calls:
                    call.callback.look(call.model, call.lane)

    def _take_in(self, selector: selectors.BaseSelector) -> bool:
        """Watches what has come; false if there is nothing left to watch, so that the thread may end."""
        with self._lock:
            for call in self._coming:
                selector.register(call.lane.reply_fd or 0, selectors.EVENT_READ, call)
            self._coming.clear()
            if len(selector.get_map()) > 1:
                return True
            self._waker = None
            return False


class _Call(NamedTuple):
    model: RemoteModel
    lane: ClientLane
    callback: Callback

    def tell(self, reply: Any) -> None:
        self.callback.tell(self.model, self.lane, reply)

    def wait(self) -> None:
        """Over ZeroMQ, where there is no descriptor to wait for."""
        while True:
            try:
                reply = self.lane.receive(EVERY)
            except TimeoutError:
                self.callback.look(self.model, self.lane)
                continue
            self.tell(reply)
            return


_callbacks = Callbacks()


class Callback:
    """Who is told of results.  ``run_options``: whose ``terminate`` another thread may set meanwhile."""

    def __init__(self, callback: Callable[[Any, Any, str], object], user_data: Any, run_options: Any) -> None:
        self._callback = callback
        self._user_data = user_data
        self._run_options = run_options
        self._ended = False

    @property
    def is_watched(self) -> bool:
        """Whether somebody may still end the call."""
        return self._run_options is not None and not self._ended

    def look(self, model: RemoteModel, lane: ClientLane) -> None:
        """Has the call end if its options say so now."""
        if self.is_watched and getattr(self._run_options, "terminate", False):
            self._ended = True
            model.terminate(lane)

    def tell(self, model: RemoteModel, lane: ClientLane, reply: Any) -> None:
        """Calls the callback; what it raises goes where Python reports what nobody can catch."""
        results, error = _outcome(model, lane, reply)
        try:
            self._callback(results, self._user_data, error)
        except Exception as failed:
            _report(failed)


def _outcome(model: RemoteModel, lane: ClientLane, reply: Any) -> tuple[Any, str]:
    try:
        if isinstance(reply, ANSWERS):
            return model.finish(lane, reply), ""
        model.settle(lane, reply)
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

    Raises: what is known to be wrong before the run begins.
    """
    while True:
        lane, message = model.ask_with(lease, make)
        try:
            reply = lane.exchange(message)
        except BaseException:
            lane.close()
            raise
        if isinstance(reply, m.Started):
            _callbacks.await_reply(model, lane, callback)
            return
        model.settle(lane, reply)


def _after_fork() -> None:
    global _callbacks
    _callbacks = Callbacks()


os.register_at_fork(after_in_child=_after_fork)
