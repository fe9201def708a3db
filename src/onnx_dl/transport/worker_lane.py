"""The worker's end of a lane; the caller's end is in :mod:`onnx_dl.transport.client_lane`."""

from __future__ import annotations

import fcntl
import os
import stat
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_dl.errors import ProtocolError
from onnx_dl.protocol import codec, lane
from onnx_dl.system import procfs
from onnx_dl.tensors import mapped_blocks, packing
from onnx_dl.tensors.block import Block
from onnx_dl.tensors.result_forms import Form
from onnx_dl.tensors.values import VIEW_FROM, Packer, Unpacker
from onnx_dl.transport import sockets
from onnx_dl.transport.addresses import same_secret
from onnx_dl.transport.call_channel import REPLAY, WorkerBellChannel, WorkerChannel, ZmqChannel
from onnx_dl.transport.doorbell import WorkerBell
from onnx_dl.transport.lane import Lane
from onnx_dl.transport.lane_socket import Handover
from onnx_dl.transport.sockets import Channel, Context
from onnx_dl.transport.spin import Patience


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
    return procfs.is_eventfd(eventfd) and is_pipe and bool(fcntl.fcntl(pipe, fcntl.F_GETFL) & os.O_WRONLY)


def _packed(packer: Packer, value: object) -> lane.Value:
    if type(value) is list:  # results, each as it would be alone
        return lane.Items("list", packer.pack(value, from_engine=True))
    (packed,) = packer.pack([value])
    return packed


class WorkerLane(Lane[WorkerChannel]):
    """The worker's end."""

    def __init__(self, ctx: Context, channel: Channel, secret: str, timeout: float) -> None:
        """Answers a caller that has connected.

        Raises:
            ProtocolError: the caller does not know the secret or speaks another version.
            TimeoutError: the caller sent nothing for ``timeout`` seconds.
        """
        handover = Handover(channel, lane.lane_request, keep_descriptors=False, most=mapped_blocks.MOST)
        greeting, fds = handover.greeting(timeout)
        try:
            hello = _checked(greeting, secret, fds)
            page = handover.mappings.page
            if page is None:
                raise ProtocolError("A caller sent no page.")
        except BaseException:
            sockets.close_all(fds)
            raise
        calls: WorkerChannel
        if hello.reply_to is None:
            self._bell = WorkerBell(fds, Patience() if hello.poll else None)
            calls = WorkerBellChannel(handover, self._bell)
        else:
            calls = ZmqChannel(handover, sockets.pair(ctx, hello.reply_to), is_caller=False)
        super().__init__(handover, calls, polls=hello.poll)
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
        self._unpacker = Unpacker(self._handover.block, copy=False)

    def hang_up(self) -> None:
        """End the wait of the lane's thread, called by the thread that sees that the caller is gone."""
        if not self.over_zmq:
            self._bell.hang_up()

    def receive(self) -> Any:
        """Wait for the next request: a message, or the number of the call that it repeats.  None: the caller
        is gone.

        Raises:
            ProtocolError: a message is not a request.
            SharedMemoryError: a block of the request cannot be mapped.
            OSError: this process may have no more descriptors.
        """
        if self._handover.is_broken:  # the caller sees a worker that ended before it began the call
            return None
        self.request += 1
        self.is_answered = False
        request = self._calls.next()
        if request is not None:
            self._page.begin()
        return request - REPLAY if type(request) is int else request

    def unpack(self, value: lane.Value) -> Any:
        """Decode a value of a request.  Its arrays are views, valid until the reply is sent."""
        return self._unpacker.unpack(value)

    def text_reader(self, text: lane.Text) -> Callable[[], NDArray[np.object_]]:
        """Return a function that reads the present text at this place, for a call that repeats."""
        return packing.text_reader(self._handover.block(text.block), text.offset, text.shape)

    def reply(self, value: object, *, keep: bool = False) -> lane.Value:
        """Send a result of the engine and return its encoded form.

        The caller holds the blocks of large arrays, unless ``keep``.

        Raises:
            Exception: the value cannot be encoded; nothing was sent.
        """
        packer = Packer(self._arena, take_from=None if keep else VIEW_FROM)
        packed = _packed(packer, value)
        try:
            self._send(lane.Result(value=packed))
        except BaseException:
            packer.abandon()
            raise
        return packed

    def put(self, form: Form, results: Sequence[object]) -> bool:
        """Write results to the places of earlier ones of the same form; false if they do not fit there."""
        return form.put(results, self._arena)

    def say(self, message: lane.CallFailed | lane.Draining | lane.Forgotten | lane.Started | bytes) -> None:
        """Send a complete reply; encoded, if it is bytes."""
        if type(message) is lane.Started:
            self._calls.send(message)
        else:
            self._send(message)

    def say_same(self) -> None:
        """Reply that the results lie in the same places as the last ones."""
        self._calls.send_same()
        self.is_answered = True

    def _send(self, reply: codec.Message | bytes) -> None:
        self._calls.send(reply)
        self.is_answered = True

    def give_up(self) -> None:
        """Mark the lane as broken: the states of its two ends may differ."""
        self._handover.is_broken = True

    def trim(self) -> None:
        """Return the memory that no result lies in to the system."""
        self._arena.trim()

    def scratch(self, nbytes: int) -> Block:
        """Return the block for small results of the next reply."""
        return self._arena.scratch(nbytes)

    @property
    def current_scratch(self) -> Block | None:
        """The block with the small results of the last reply."""
        return self._arena.current_scratch

    def take(self, nbytes: int) -> Block | None:
        """Return a block for one large result of the next reply; None: it can have no block of its own."""
        return self._arena.take(nbytes)

    @property
    def drops(self) -> int:
        """Number of blocks that the caller has dropped so far."""
        return self._handover.mappings.drops

    def has(self, block: int) -> bool:
        """True if the caller's block is still mapped."""
        return self._handover.mappings.get(block) is not None

    def last_touch(self) -> float:
        """Return the time of the caller's last use, in monotonic seconds; 0.0 if there was none.  A caller
        may write any number there, so a time in the future counts as now."""
        return min(self._handover.mappings.clock() / 1e9, time.monotonic())
