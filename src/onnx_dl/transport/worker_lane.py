"""A worker's end of one caller's way to it; the caller's is :mod:`onnx_dl.transport.client_lane`."""

from __future__ import annotations

import fcntl
import os
import stat
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from onnx_dl.errors import ProtocolError
from onnx_dl.protocol import codec, lane
from onnx_dl.system import procfs
from onnx_dl.tensors import mapped_blocks, packing
from onnx_dl.tensors.arena import Block
from onnx_dl.tensors.result_forms import Form
from onnx_dl.tensors.values import VIEW_FROM, Packer, Unpacker
from onnx_dl.transport import sockets
from onnx_dl.transport.addresses import same_secret
from onnx_dl.transport.call_channel import AGAIN, Calls, WorkerBellCalls, ZmqCalls
from onnx_dl.transport.client_lane import Lane
from onnx_dl.transport.doorbell import WorkerBell
from onnx_dl.transport.lane_socket import Handover
from onnx_dl.transport.sockets import Channel, Context
from onnx_dl.transport.spin import Patience


def _checked(hello: Any, secret: str, fds: list[int]) -> lane.LaneHello:
    """The greeting of a caller who may open a lane."""
    if not (isinstance(hello, lane.LaneHello) and same_secret(hello.secret, secret)):
        raise ProtocolError("Somebody without the secret tried to open a lane.")
    if hello.version != codec.PROTOCOL_VERSION:
        raise ProtocolError(f"A caller speaks protocol version {hello.version}.")
    if len(fds) != (2 if hello.reply_to is None else 0):
        raise ProtocolError(f"A caller came with {len(fds)} descriptors.")
    if fds and not _are_bell(*fds):
        raise ProtocolError("A caller came with descriptors of other kinds than a bell's.")
    return hello


def _are_bell(eventfd: int, pipe: int) -> bool:
    """Others could always be readable, or never, so that a thread waits in vain or without a pause; and what
    cannot be written to would end the worker's main thread."""
    is_pipe = stat.S_ISFIFO(os.fstat(pipe).st_mode)
    return procfs.is_eventfd(eventfd) and is_pipe and bool(fcntl.fcntl(pipe, fcntl.F_GETFL) & os.O_WRONLY)


def _packed(packer: Packer, value: Any) -> lane.Value:
    if type(value) is list:  # results, each as it would be alone
        return lane.Items("list", packer.pack(value, from_engine=True))
    (packed,) = packer.pack([value])
    return packed


class WorkerLane(Lane):
    """The worker's end."""

    def __init__(self, ctx: Context, channel: Channel, secret: str, timeout: float) -> None:
        """Answers a caller who connected.

        Raises:
            ProtocolError: the caller does not know the secret or speaks another version.
            TimeoutError: the caller said nothing for ``timeout`` seconds.
        """
        handover = Handover(channel, lane.lane_request, keep_descriptors=False, most=mapped_blocks.MOST)
        greeting, fds = handover.greeting(timeout)
        try:
            hello = _checked(greeting, secret, fds)
            page = handover.mappings.page
            if page is None:
                raise ProtocolError("A caller came without its page.")
        except BaseException:
            sockets.close_all(fds)
            raise
        calls: Calls
        if hello.reply_to is None:
            self._bell = WorkerBell(fds, Patience() if hello.poll else None)
            calls = WorkerBellCalls(handover, self._bell)
        else:
            calls = ZmqCalls(handover, sockets.pair(ctx, hello.reply_to), calls=False)
        super().__init__(handover, calls, polls=hello.poll)
        self._page = page
        self._requests = 0
        self._answered = False
        """Whether the request that was received last has its reply, or may have it."""
        self.model = hello.model
        """The key of the model that the caller wants, where there are several."""
        self.thread = threading.get_native_id()
        """Of the thread that serves the lane."""
        try:
            self._calls.send(lane.LaneOpen(secret=secret, thread=self.thread))
        except BaseException:  # no memory for one: nobody else closes what came from the caller
            self._calls.close()
            raise
        self._unpacker = Unpacker(self._handover.block, copy=False)

    @property
    def channel(self) -> Channel:
        """The Unix socket to the caller."""
        return self._handover.channel

    def hang_up(self) -> None:
        """For the thread that sees that the caller is gone: ends the wait of the lane's own thread."""
        if not self.over_zmq:
            self._bell.hang_up()

    def receive(self) -> Any:
        """The next request: a message or, if it repeats another, that one's number; None when the caller is
        gone.

        Raises:
            ProtocolError: it is no request.
            SharedMemoryError: a block that it needs cannot be mapped.
            OSError: this process may have no more descriptors.
        """
        if self._handover.is_broken:  # to the caller, a worker that went before it began anything
            return None
        self._requests += 1
        self._answered = False
        request = self._calls.next()
        if request is not None:
            self._page.begin()
        return request - AGAIN if type(request) is int else request

    @property
    def request(self) -> int:
        """The number by which the caller knows the request that was received last.

        Counted here, too: what stands in the page is whatever the caller wrote there last.
        """
        return self._requests

    def unpack(self, value: lane.Value) -> Any:
        """A value of a request; its arrays are views, valid until the reply is sent."""
        return self._unpacker.unpack(value)

    def text_reader(self, text: lane.Text) -> Callable[[], Any]:
        """Gives, at each call, the text of this place in a request that repeats."""
        return packing.text_reader(self._handover.block(text.block), text.offset, text.shape)

    def reply(self, value: Any, *, keep: bool = False) -> lane.Value:
        """Sends a result of the engine; large arrays in it are leased to the caller, unless ``keep``.

        Returns what was sent.

        Raises:
            Exception: the value cannot be sent; nothing was.
        """
        packer = Packer(self._arena, lease_from=None if keep else VIEW_FROM)
        packed = _packed(packer, value)
        try:
            self._send(lane.Result(value=packed))
        except BaseException:
            packer.abandon()
            raise
        return packed

    def put(self, form: Form, results: Sequence[Any]) -> bool:
        """Puts results where others lay that were of the same form; false if they do not fit there."""
        return form.put(results, self._arena)

    def say(self, message: lane.CallFailed | lane.Draining | lane.Forgotten | lane.Started | bytes) -> None:
        """Sends a reply that is ready to be sent."""
        if type(message) is lane.Started:
            self._calls.send(message)
        else:
            self._send(message)

    def say_same(self) -> None:
        """The results lie where the last ones lay."""
        self._calls.same()
        self._answered = True

    def _send(self, reply: codec.Message | bytes) -> None:
        self._calls.send(reply)
        self._answered = True

    @property
    def is_answered(self) -> bool:
        """Whether the request that was received last has its reply.  A second one would be taken for that of
        the next request."""
        return self._answered

    def give_up(self) -> None:
        """The lane ends: what both ends know of each other may differ."""
        self._handover.is_broken = True

    def trim(self) -> None:
        """Gives back the memory that no result lies in."""
        self._arena.trim()

    def scratch(self, nbytes: int) -> Block:
        """Where small results of the next reply may be written."""
        return self._arena.scratch(nbytes)

    @property
    def current_scratch(self) -> Block | None:
        """Where the small results of the last reply lie."""
        return self._arena.current_scratch

    def lease(self, nbytes: int) -> Block | None:
        """Where a large result of the next reply may be written; None: in no block of its own."""
        return self._arena.lease(nbytes)

    @property
    def drops(self) -> int:
        """Counts the blocks that the caller dropped."""
        return self._handover.mappings.drops

    def has(self, block: int) -> bool:
        """Whether the caller's block is still mapped."""
        return self._handover.mappings.get(block) is not None

    def last_touch(self) -> float:
        """When the caller last left the time of a use, in monotonic seconds; 0.0 if never.

        A caller may have written anything there; a time that is still to come is now.
        """
        return min(self._handover.mappings.clock() / 1e9, time.monotonic())
