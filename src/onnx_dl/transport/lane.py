"""The common part of both ends of a lane.

A lane connects one caller to one worker.  Both ends hand each other blocks of shared memory over a Unix
socket, which also shows each of them the death of the other.  A lane carries one call at a time; concurrent
callers have a lane each.  The ends are :mod:`onnx_dl.transport.client_lane` and
:mod:`onnx_dl.transport.worker_lane`.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from onnx_dl.transport.call_channel import CallChannel, ClosedChannel, ZmqChannel
from onnx_dl.transport.lane_socket import Handover

_Channel = TypeVar("_Channel", bound=CallChannel)


class Lane(Generic[_Channel]):
    """One end, used by one thread at a time.  Calls go over the Unix socket with a bell that wakes the peer,
    or over a ZeroMQ socket beside it."""

    def __init__(self, handover: Handover, calls: _Channel, *, polls: bool) -> None:
        self._handover = handover
        self._arena = handover.arena
        self._calls: _Channel | ClosedChannel = calls
        self.polls = polls
        self.over_zmq = isinstance(calls, ZmqChannel)

    def close_calls(self) -> None:
        """Ends the calls.  The owner of the Unix socket closes that."""
        self._calls.close()

    def close(self) -> None:
        """Ends the lane.  Arrays that lie in its blocks stay valid.  May be called twice."""
        calls, self._calls = self._calls, ClosedChannel()
        calls.close()
        self._handover.channel.close()
