"""Ends a call before its result is there: because its RunOptions say so, or its deadline has passed.

Covers waiting for the reply meanwhile.  onnxruntime sends no signal when another thread sets
``RunOptions.terminate``, so it is read every few milliseconds; onnxruntime itself reads it between two nodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.errors import RunTimeout
from onnx_dl.protocol import lane as m
from onnx_dl.tensors.call_codec import Request
from onnx_dl.transport.client_lane import ClientLane, Reply

_R = TypeVar("_R")

EVERY: Final = 0.003
"""Seconds between two looks."""
GRACE: Final = 0.3
"""Seconds in all that a run has to end after its deadline.  Then its caller goes on without the run and
closes its lane, which has the worker end the run as soon as the model lets it."""
_AGAIN: Final = 1.0
"""Seconds until a worker that did not take the request to end a run is sent it once more."""

Terminate = Callable[[Deadline], bool]
"""Has the worker end the call; whether the worker received that in time, or is gone."""


class CancelWatch:
    """Watch over one call, which its RunOptions or its deadline may end."""

    def __init__(self, run_options: object = None, deadline: Deadline | None = None) -> None:
        """``run_options``: an ``onnxruntime.RunOptions`` that another thread may write to."""
        self._options = run_options
        self.deadline = deadline
        self._was_ended = False
        self._end_at = 0.0

    def exchange(self, lane: ClientLane, request: Request, terminate: Terminate) -> Reply:
        """Sends a request and waits for its reply.  Raises RunTimeout after the deadline; close the lane
        then, which may be in use for as long as the model computes."""
        lane.send(request)
        return self.wait(lane.receive, terminate, lambda reply: isinstance(reply, m.CallFailed))

    def wait(
        self, receive: Callable[[float | None], _R], terminate: Terminate, failed: Callable[[_R], bool]
    ) -> _R:
        """Waits for a reply.  Raises RunTimeout after the deadline.

        ``receive``: returns the reply, or raises TimeoutError after so many seconds; ``failed``: tells
        whether a reply is an error.
        """
        while True:
            try:
                return receive(self._step())
            except TimeoutError:
                if self.deadline is not None and self.deadline.passed:
                    return self._end(receive, terminate, failed)
                self._look(terminate)

    def _step(self) -> float | None:
        """Seconds until the next look."""
        if self.deadline is None:
            return EVERY
        return self.deadline.step(None if self._options is None else EVERY)

    def _look(self, terminate: Terminate) -> None:
        asked = getattr(self._options, "terminate", False)
        if asked and not self._was_ended and time.monotonic() >= self._end_at:
            self._was_ended = terminate(Deadline(GRACE, outer=self.deadline))
            self._end_at = time.monotonic() + _AGAIN

    def _end(
        self, receive: Callable[[float | None], _R], terminate: Terminate, failed: Callable[[_R], bool]
    ) -> _R:
        """Ends the run.  Returns its reply if that comes in time all the same."""
        grace = Deadline(GRACE)  # both waits below share it
        ended = self._was_ended or terminate(grace)
        try:
            reply = receive(grace.left() if ended else 0.0)
        except TimeoutError:
            raise run_timeout(
                self.deadline,
                "was cancelled, but has not ended yet: it ends when the model allows that. "
                "In a worker process, unload(force=True) ends it at once",
            ) from None
        if failed(reply):
            raise run_timeout(self.deadline, "was ended")
        return reply


def run_timeout(deadline: Deadline | None, what: str) -> RunTimeout:
    """Error for a run that took too long; ``what``: what became of it."""
    timeout = None if deadline is None else deadline.timeout
    took = "was given up" if timeout is None else f"took longer than {timeout:g} s"
    return RunTimeout(f"The run {took} and {what}.")


def not_begun(deadline: Deadline | None, passed: DeadlinePassed) -> RunTimeout:
    """Error for a run whose deadline passed before it began."""
    return run_timeout(deadline, f"had not begun: it waited for {passed.what}, which continues")
