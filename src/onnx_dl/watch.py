"""A call that may have to end before its result is there: its RunOptions say so, or its time is up.

Covers waiting for the reply meanwhile.  onnxruntime tells nobody that ``RunOptions.terminate`` was set from
another thread, so it is looked at every few milliseconds; onnxruntime itself looks between two nodes.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from onnx_dl.errors import RunTimeout
from onnx_dl.transport import messages as m

if TYPE_CHECKING:
    from onnx_dl.client import RemoteModel
    from onnx_dl.transport.lane import ClientLane

EVERY: Final = 0.003
"""Seconds between two looks."""
GRACE: Final = 0.5
"""Seconds that a call has to end after it was told to; then its caller goes on without it."""


class Watch:
    """Of one call."""

    def __init__(self, run_options: Any = None, timeout: float | None = None) -> None:
        """``run_options``: an ``onnxruntime.RunOptions`` that another thread may write to."""
        self._options = run_options
        self._timeout = timeout
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._told_at: float | None = None
        self.ended = False
        """Set by another thread to end the call."""

    def exchange(self, model: RemoteModel, lane: ClientLane, request: Any) -> Any:
        """Sends a request and waits for its reply.

        Raises:
            RunTimeout: the time was up, and the worker did not answer within the grace.  The lane is in use
                for as long as the model computes: close it.
        """
        lane.send(request)
        while True:
            try:
                reply = lane.receive(EVERY)
            except TimeoutError:
                self._look(model, lane)
                continue
            if self._late() and self._told_at is not None and isinstance(reply, m.CallFailed):
                raise self._timed_out("was ended")
            return reply

    def _look(self, model: RemoteModel, lane: ClientLane) -> None:
        now = time.monotonic()
        if self._told_at is None:
            if self._late() or self.ended or getattr(self._options, "terminate", False):
                self._told_at = now
                model.terminate(lane)
        elif (self.ended or self._late()) and now > self._told_at + GRACE:
            raise self._timed_out(
                "was told to end, which it does when the model lets it; unload(force=True) ends it"
            )

    def _late(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _timed_out(self, what: str) -> RunTimeout:
        took = "was given up" if self._timeout is None else f"took longer than {self._timeout:g} seconds"
        return RunTimeout(f"The run {took} and {what}.")
