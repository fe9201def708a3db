"""A call that may have to end before its result is there: its RunOptions say so, or its time is up.

Covers waiting for the reply meanwhile.  onnxruntime tells nobody that ``RunOptions.terminate`` was set from
another thread, so it is looked at every few milliseconds; onnxruntime itself looks between two nodes.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.errors import RunTimeout
from onnx_dl.protocol import lane as m

if TYPE_CHECKING:
    from onnx_dl.client.remote_model import RemoteModel
    from onnx_dl.transport.client_lane import ClientLane

EVERY: Final = 0.003
"""Seconds between two looks."""
GRACE: Final = 0.3
"""Seconds in all that a run whose time is up has to end after it was told to; then its caller goes on without
it, and closes its lane, which has the worker end the run as soon as the model lets it."""
_AGAIN: Final = 1.0
"""Seconds after which a worker that took no word to end a run is told once more."""


class Watch:
    """Of one call."""

    def __init__(self, run_options: Any = None, deadline: Deadline | None = None) -> None:
        """``run_options``: an ``onnxruntime.RunOptions`` that another thread may write to."""
        self._options = run_options
        self.deadline = deadline
        self._told = False
        self._tell_at = 0.0

    def exchange(self, model: RemoteModel, lane: ClientLane, request: Any) -> Any:
        """Sends a request and waits for its reply.

        Raises:
            RunTimeout: the time was up.  Close the lane: it may be in use for as long as the model computes.
        """
        lane.send(request)
        while True:
            try:
                return lane.receive(self._step())
            except TimeoutError:
                if self.deadline is not None and self.deadline.passed:
                    return self._end(model, lane)
                self._look(model, lane)

    def _step(self) -> float | None:
        """Seconds until the next look."""
        if self.deadline is None:
            return EVERY
        return self.deadline.step(None if self._options is None else EVERY)

    def _look(self, model: RemoteModel, lane: ClientLane) -> None:
        if self._told or not getattr(self._options, "terminate", False) or time.monotonic() < self._tell_at:
            return
        self._told = model.terminate(lane, self._grace())
        self._tell_at = time.monotonic() + _AGAIN

    def _end(self, model: RemoteModel, lane: ClientLane) -> Any:
        """Tells the run to end.  Its reply, if it had one in time all the same."""
        grace = Deadline(GRACE)  # both waits below share it
        told = self._told or model.terminate(lane, grace)
        try:
            reply = lane.receive(grace.left() if told else 0.0)
        except TimeoutError:
            raise run_timeout(
                self.deadline,
                "was told to end, which it does when the model lets it; unload(force=True) ends it",
            ) from None
        if isinstance(reply, m.CallFailed):
            raise run_timeout(self.deadline, "was ended")
        return reply

    def _grace(self) -> Deadline:
        return Deadline(GRACE, outer=self.deadline)


def run_timeout(deadline: Deadline | None, what: str) -> RunTimeout:
    """The run took too long, and what became of it."""
    timeout = None if deadline is None else deadline.timeout
    took = "was given up" if timeout is None else f"took longer than {timeout:g} seconds"
    return RunTimeout(f"The run {took} and {what}.")


def not_begun(deadline: Deadline | None, passed: DeadlinePassed) -> RunTimeout:
    """The run's time was up before it began."""
    return run_timeout(deadline, f"had not begun: it waited for {passed.what}, which goes on")
