"""``run_async``: results go to a callback, in a thread that is neither the caller's nor one for each call.

The thread waits for all replies that are to come, and is there only while some are.
"""

from __future__ import annotations

import os
import selectors
import sys
import threading
from collections.abc import Callable
from typing import Any

from onnx_dl.client import ANSWERS, Lease, RemoteModel
from onnx_dl.transport import messages as m
from onnx_dl.transport.lane import ClientLane
from onnx_dl.transport.sockets import Waker


class Callbacks:
    """Calls that were begun, and one thread that waits for their replies and tells their callbacks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._coming: list[tuple[ClientLane, Callable[[Any], None]]] = []
        self._waker: Waker | None = None

    def await_reply(self, lane: ClientLane, tell: Callable[[Any], None]) -> None:
        """``tell`` is called with the reply of this lane, in another thread."""
        if lane.reply_fd is None:
            threading.Thread(
                target=lambda: tell(lane.receive()), name="onnx-dl-callback", daemon=True
            ).start()
            return
        with self._lock:
            self._coming.append((lane, tell))
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
                for key, _ in selector.select():
                    if key.data is None:
                        waker.clear()
                        continue
                    lane, tell = key.data
                    selector.unregister(key.fd)
                    tell(lane.receive())

    def _take_in(self, selector: selectors.BaseSelector) -> bool:
        """Watches what has come; false if there is nothing left to watch, so that the thread may end."""
        with self._lock:
            for lane, tell in self._coming:
                selector.register(lane.reply_fd or 0, selectors.EVENT_READ, (lane, tell))
            self._coming.clear()
            if len(selector.get_map()) > 1:
                return True
            self._waker = None
            return False


_callbacks = Callbacks()


def call_back(
    model: RemoteModel,
    lease: Lease,
    make: Callable[[ClientLane], Any],
    callback: Callable[[Any, Any, str], object],
    user_data: Any,
) -> None:
    """Begins a call and returns; its results go to ``callback(results, user_data, error)`` in another thread.

    Raises: what is known to be wrong before the run begins.
    """

    def tell(reply: Any) -> None:
        results: list[Any] = []
        error = ""
        try:
            if isinstance(reply, ANSWERS):
                results = model.finish(lane, reply)
            else:
                model.settle(lane, reply)
                error = "The worker was unloaded before it began."
        except Exception as failed:
            error = str(failed)
        try:
            callback(results, user_data, error)
        except Exception as failed:
            print(f"{type(failed).__name__}: {failed}", file=sys.stderr)

    while True:
        lane, message = model.ask_with(lease, make)
        try:
            reply = lane.exchange(message)
        except BaseException:
            lane.close()
            raise
        if isinstance(reply, m.Started):
            _callbacks.await_reply(lane, tell)
            return
        model.settle(lane, reply)


def _after_fork() -> None:
    global _callbacks
    _callbacks = Callbacks()


os.register_at_fork(after_in_child=_after_fork)
