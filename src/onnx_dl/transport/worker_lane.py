"""The worker's end of a lane; the caller's end is in :mod:`onnx_dl.transport.client_lane`."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from onnx_dl.errors import ProtocolError
from onnx_dl.linux_only import fcntl
from onnx_dl.protocol import codec, lane
from onnx_dl.system import resources
from onnx_dl.tensors import packing
from onnx_dl.tensors.arena import MOST_MAPPED
from onnx_dl.tensors.foreign_tables import MOST_KEPT, PeerMemories
from onnx_dl.tensors.values import VIEW_FROM, Packer, Unpacker
from onnx_dl.transport import sockets, zeromq
from onnx_dl.transport.adaptive_polling import LastUse
from onnx_dl.transport.call_channel import REPLAY, Lane, WorkerBellChannel, WorkerChannel
from onnx_dl.transport.doorbell import WorkerBell
from onnx_dl.transport.lane_socket import LaneSocket
from onnx_dl.transport.sockets import Channel, same_secret
from onnx_dl.transport.zeromq import Context
from onnx_dl.transport.zmq_channel import ZmqChannel

_last_use: Final = LastUse()


def _checked(hello: object, secret: str, fds: list[int]) -> lane.LaneHello:
    """Return the greeting of a caller that may open a lane.  Raises ProtocolError for any other."""
    if not (isinstance(hello, lane.LaneHello) and same_secret(hello.secret, secret)):
        raise ProtocolError("A caller without the secret tried to open a lane.")
    if hello.version != codec.PROTOCOL_VERSION:
        raise ProtocolError(f"A caller speaks protocol version {hello.version}.")
    if len(fds) != (2 if hello.reply_to is None else 0):
        raise ProtocolError(f"A caller sent {len(fds)} descriptors.")
    if fds and not _are_bell(*fds):
        raise ProtocolError("A caller sent descriptors that are not those of a bell.")
    return hello


def _are_bell(eventfd: int, pipe: int) -> bool:
    """Check what the descriptors are.  Others could be readable always or never, so that a thread waits in
    vain or without a pause.  One that cannot be written to would end the worker's main thread."""
    is_pipe = stat.S_ISFIFO(os.fstat(pipe).st_mode)
    return resources.is_eventfd(eventfd) and is_pipe and bool(fcntl.fcntl(pipe, fcntl.F_GETFL) & os.O_WRONLY)


class WorkerLane(Lane[WorkerChannel]):
    """The worker's end."""

    def __init__(self, ctx: Context, channel: Channel, secret: str, timeout: float) -> None:
        """Answers a caller that has connected.

        Raises:
            ProtocolError: the caller does not know the secret or speaks another version.
            TimeoutError: the caller sent nothing for ``timeout`` seconds.
        """
        lane_socket = LaneSocket(
            channel, lane.lane_request, keep_descriptors=False, most=MOST_MAPPED, most_foreign=MOST_KEPT
        )
        greeting, fds = lane_socket.greeting(timeout)
        try:
            hello = _checked(greeting, secret, fds)
            page = lane_socket.mappings.page
            if page is None:
                raise ProtocolError("A caller sent no page.")
        except BaseException:
            sockets.close_all(fds)
            raise
        calls: WorkerChannel
        if hello.reply_to is None:
            self._bell = WorkerBell(fds)
            calls = WorkerBellChannel(lane_socket, self._bell)
        else:
            calls = ZmqChannel(lane_socket, zeromq.pair(ctx, hello.reply_to), is_caller=False)
        super().__init__(lane_socket, calls)
        self.channel = channel
        """The Unix socket to the caller."""
        self._page = page
        self.request = 0
        """The caller's number of the last request.  Counted here, too: the caller may write anything in the
        page."""
        self.is_answered = False
        """True if the last request has its reply, or may have it.  A second reply would be taken for that of
        the next request."""
        self.model = hello.model
        """Key of the model that the caller uses, if the worker has several."""
        self.thread = threading.get_native_id()
        """Native id of the thread that serves the lane."""
        try:
            self._calls.send(lane.LaneOpen(secret=secret, thread=self.thread))
        except BaseException:  # no memory for one; nobody else closes the caller's descriptors
            self._calls.close()
            raise
        self._unpacker = Unpacker(lane_socket.mappings.block, copy=False)

    def hang_up(self) -> None:
        """End the wait of the lane's thread, called by the thread that sees that the caller is gone."""
        if not self.over_zmq:
            self._bell.hang_up()

    def receive(self) -> Any:
        """Wait for the next request: a message, or the number of the call that it repeats.  None: the caller
        is gone.  Raises like :meth:`LaneSocket.next`."""
        if self._lane_socket.is_broken:  # the caller sees a worker that ended before it began the call
            return None
        self.request += 1
        self.is_answered = False
        request = self._calls.next()
        if request is not None:
            self._page.begin()
            if not (_last_use.is_again(self.thread) or self.over_zmq):
                self._bell.rest()
        return request - REPLAY if type(request) is int else request

    def take_devices(self, open_handle: Callable[[list[Any]], object]) -> None:
        """Have handles of memory on a device decoded by this function."""
        self._unpacker.device = open_handle

    def unpack(self, value: lane.Value) -> Any:
        """Decode a value of a request.  Its arrays are views, valid until the reply is sent."""
        return self._unpacker.unpack(value)

    def text_reader(self, text: lane.Text) -> Callable[[], NDArray[np.object_]]:
        """Return a function that reads the present text at this place, for a call that repeats."""
        return packing.text_reader(self.mappings.block(text.block), text.offset, text.shape)

    def reply(self, value: object, *, keep: bool = False) -> lane.Value:
        """Send a result of the engine and return its encoded form.  The caller holds the blocks of large
        arrays, unless ``keep``.  Raises like :meth:`Packer.pack`, with nothing sent."""
        packer = Packer(self.arena, take_from=None if keep else VIEW_FROM)
        packed: lane.Value
        if type(value) is list:  # results, each as it would be alone
            packed = lane.Items("list", packer.pack(value, from_engine=True))
        else:
            (packed,) = packer.pack([value])
        try:
            self.send(lane.Result(value=packed))
        except BaseException:
            packer.abandon()
            raise
        return packed

    @property
    def memories(self) -> PeerMemories:
        """The foreign memories that the caller has announced."""
        return self._lane_socket.memories

    def reply_placed(self, values: list[object], written: list[lane.WrittenResult]) -> None:
        """Send the results of a call with places: those that were not written, and where the others are.
        Raises like :meth:`reply`."""
        packer = Packer(self.arena, take_from=VIEW_FROM)
        packed = lane.Items("list", packer.pack(values, from_engine=True))
        try:
            self.send(lane.PlacedResult(value=packed, written=written))
        except BaseException:
            packer.abandon()
            raise

    def send(self, reply: lane.LaneReply | bytes) -> None:
        """Send a complete reply; encoded, if it is bytes."""
        self._calls.send(reply)
        self.is_answered = type(reply) is not lane.Started

    def send_same(self) -> None:
        """Reply that the results lie in the same places as the last ones."""
        self._calls.send_same()
        self.is_answered = True

    def give_up(self) -> None:
        """Mark the lane as broken: the states of its two ends may differ."""
        self._lane_socket.is_broken = True

    def last_touch(self) -> float:
        """Return the time of the caller's last use, in monotonic seconds; 0.0 if there was none.  A caller
        may write any number there, so a time in the future counts as now."""
        return min(self.mappings.clock() / 1e9, time.monotonic())
