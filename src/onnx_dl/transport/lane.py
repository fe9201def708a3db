"""One caller's way to one worker.

Both sides hand each other blocks of shared memory over a Unix socket, on which they also see each other die.
Calls go over the same socket, which wakes the peer in one step, or over a ZeroMQ PAIR socket beside it.  One
call is on a lane at a time; concurrent callers have a lane each.  What is called, and what to do when a lane
breaks, is not known here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Final

import numpy as np
import zmq

from onnx_dl.config import fresh_address
from onnx_dl.errors import ProtocolError
from onnx_dl.transport import messages as m
from onnx_dl.transport import sockets
from onnx_dl.transport.arena import Arena, Block, Mappings, Reference, home_of
from onnx_dl.transport.patience import Patience
from onnx_dl.transport.plans import Plan, Plans, can_repeat, in_place, key_of, targets_of
from onnx_dl.transport.sockets import LONGEST, Channel, Context, Socket
from onnx_dl.transport.tensors import VIEW_FROM, Packer, Unpacker

_HANDOVER: Final = 10.0
"""Seconds within which a block must arrive that a message names; its sender sent it before the message."""

LARGE: Final = 1 << 20
"""Bytes of shared memory that an idle lane may keep."""

_TRIM_TIMEOUT: Final = 0.2

_current_cpu: Final[Callable[[], int]] = getattr(ctypes.CDLL(None), "sched_getcpu", lambda: -1)


Request = m.Call | m.Again | m.Invoke | m.Touch | m.Hold | m.Unhold | bytes
"""What a caller sends; bytes are a message that is encoded already."""


class _Handover:
    """The Unix socket of a lane, and the peer's blocks that came over it.

    It knows neither lane nor arena, so that these are freed with their memory as soon as nobody uses them,
    and not when the garbage collector finds a cycle.
    """

    def __init__(self, channel: Channel, read: m.Reader, *, keep_descriptors: bool) -> None:
        self.channel = channel
        self.mappings = Mappings(keep_descriptors=keep_descriptors)
        self._read = read

    def shared(self, block: int, size: int, fd: int) -> None:
        self.channel.send(m.encode(m.BlockShared(block=block, size=size)), (fd,))

    def dropped(self, block: int) -> None:
        self.channel.send(m.encode(m.BlockDropped(block=block)))

    def send(self, message: m.Message | bytes) -> bool:
        """Sends a message of any length; false if the peer is gone, and has not got all of it."""
        data = message if isinstance(message, bytes) else m.encode(message)
        if len(data) <= LONGEST:
            return self.channel.send(data)
        parts = [data[start : start + LONGEST] for start in range(0, len(data), LONGEST)]
        return all(map(self.channel.send, [m.encode(m.Large(nbytes=len(data))), *parts]))

    def next(self, timeout: float | None, poll: float = 0.0) -> Any:
        """The next message, once blocks were taken in that came before it; None if the peer is gone.

        Raises:
            TimeoutError: nothing came within ``timeout`` seconds.
        """
        while (received := self.channel.receive(timeout, poll)) is not None:
            data, fds = received
            message = self._read(data)
            if not self._take_in(message, fds):
                return self._large(message) if isinstance(message, m.Large) else message
        return None

    def _take_in(self, message: object, fds: list[int]) -> bool:
        """Whether it was about blocks."""
        if isinstance(message, m.BlockShared) and fds:
            self.mappings.add(message.block, message.size, fds[0])
        elif isinstance(message, m.BlockDropped):
            self.mappings.drop(message.block)
        else:
            if fds:
                sockets.close_all(fds)
            return False
        return True

    def _large(self, announced: m.Large) -> Any:
        data = bytearray()
        while len(data) < announced.nbytes:
            received = self.channel.receive(_HANDOVER)
            if received is None:
                return None
            data += received[0]
        return self._read(memoryview(data))

    def block(self, number: int) -> Block:
        """A block of the peer, which it announced before it named it."""
        while (block := self.mappings.get(number)) is None:
            try:
                received = self.channel.receive(_HANDOVER)
            except TimeoutError:
                received = None
            if received is None or not self._take_in(self._read(received[0]), received[1]):
                raise ProtocolError(f"A message names block {number}, which its sender never handed over.")
        return block

    def is_dead(self) -> bool:
        """Whether the peer is gone, once all that it said about blocks is taken in; does not wait."""
        while self.channel.readable():
            received = self.channel.receive(0)
            if received is None or not self._take_in(self._read(received[0]), received[1]):
                return True  # gone, or it said what nobody asked for: of no use either way
        return False


class _Lane:
    """What both ends have in common.  Used by one thread at a time.

    ``socket`` is the ZeroMQ socket that the calls go over; None: they go over the Unix socket.  ``poll``:
    look for messages for a moment before sleeping, where another core can send them meanwhile.
    """

    def __init__(self, handover: _Handover, socket: Socket | None, read: m.Reader, *, poll: bool) -> None:
        channel = handover.channel
        self._handover = handover
        self._arena = Arena(handover)
        self._socket = socket
        self._read = read
        self.polls = poll and len(os.sched_getaffinity(0)) > 1
        self._patience = Patience() if self.polls else None
        if socket is not None:
            self._poller = zmq.Poller()
            self._poller.register(socket, zmq.POLLIN)
            self._poller.register(channel.fileno(), zmq.POLLIN)

    @property
    def over_zmq(self) -> bool:
        """Whether calls go over ZeroMQ."""
        return self._socket is not None

    def close(self) -> None:
        """Ends the lane.  Arrays that lie in its blocks stay valid."""
        if self._socket is not None:
            self._socket.close()
        self._handover.channel.close()

    def _send(self, message: m.Message | bytes) -> bool:
        """Sends; false if the peer is known to be gone, else that shows when the next message is awaited."""
        if self._socket is None:
            return self._handover.send(message)
        # Again: a PAIR socket without a peer would wait for ever.  Terminated: this process leaves.
        with contextlib.suppress(zmq.Again, zmq.ContextTerminated):
            self._socket.send(message if isinstance(message, bytes) else m.encode(message), zmq.NOBLOCK)
            return True
        return False

    def _next(self, timeout: float | None = None) -> Any:
        """The next message of a call; None if the peer is gone or the time is up."""
        if self._socket is None:
            try:
                return self._await(timeout)
            except TimeoutError:
                return None
        try:
            data = self._next_on_zmq(self._socket, timeout)
        except zmq.ContextTerminated:  # the supervisor died, and the worker with it
            return None
        return None if data is None else self._read(data)

    def _await(self, timeout: float | None) -> Any:
        patience = self._patience
        if patience is None:
            return self._handover.next(timeout)
        started = time.perf_counter()
        message = self._handover.next(timeout, patience.budget)
        patience.note(time.perf_counter() - started)
        return message

    def _next_on_zmq(self, socket: Socket, timeout: float | None) -> bytes | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            ready = sockets.wait(self._poller, None if deadline is None else deadline - time.monotonic())
            if socket in ready:
                return socket.recv()
            if not ready or self._handover.is_dead():
                return _last_words(socket)


def _last_words(socket: Socket) -> bytes | None:
    """What the peer sent before it went: EOF on one socket can overtake a message on the other."""
    try:
        return socket.recv(zmq.NOBLOCK)
    except zmq.Again:
        return None


class ClientLane(_Lane):
    """The caller's end."""

    def __init__(
        self, ctx: Context, granted: m.Granted, timeout: float, *, over_zmq: bool, latency: str
    ) -> None:
        """Opens a lane to the worker that was granted.  ``latency``: "low" polls, see
        :mod:`onnx_dl.transport.patience`.

        Raises:
            OSError: the worker is gone, or did not answer within ``timeout`` seconds.
        """
        self.granted = granted
        channel = Channel.connect(granted.address, timeout)
        reply_to = fresh_address("lane") if over_zmq else None
        try:
            socket = None if reply_to is None else sockets.pair_listener(ctx, reply_to)
        except zmq.ZMQError as error:  # the connection to the supervisor ended meanwhile
            channel.close()
            raise ConnectionError(str(error)) from error
        handover = _Handover(channel, m.lane_reply, keep_descriptors=True)
        super().__init__(handover, socket, m.lane_reply, poll=latency == "low")
        self.latency = latency
        try:
            self._page = self._open(granted.secret, reply_to, timeout)
        except BaseException:
            self.close()
            raise
        self._unpacker = Unpacker(self._handover.block, copy=True)
        self._plans = Plans()
        self._key: Hashable | None = None
        self._plan: Plan | None = None
        """Of the request that was made last; ``_asked``: of the one that was sent last."""
        self._asked: Plan | None = None
        self._took = 0
        self.last_used = time.perf_counter_ns()

    def _open(self, secret: str, reply_to: str | None, timeout: float) -> Block:
        self._handover.send(
            m.LaneHello(version=m.PROTOCOL_VERSION, secret=secret, reply_to=reply_to, poll=self.polls)
        )
        page = self._arena.page()
        opened = self._next(timeout)
        if opened is None:
            raise ConnectionError("the worker did not open the lane")
        if not (isinstance(opened, m.LaneOpen) and secrets.compare_digest(opened.secret, secret)):
            raise ProtocolError("Another process than the worker answered on a lane.")
        return page

    def pack(self, values: Iterable[Any]) -> list[m.Value]:
        """Copies the arrays in ``values`` to where the worker sees them; see :class:`Packer`."""
        return Packer(self._arena).pack(values)

    def call(
        self,
        outputs: Any,
        feed: Mapping[Any, Any],
        options: dict[str, Any] | None,
        *,
        keep: bool = False,
    ) -> Request:
        """The request for one inference; the arrays in ``feed`` are copied, unless they lie in shared memory.

        ``keep``: for :meth:`references` instead of :meth:`result`.

        Raises: like :meth:`Packer.pack`.
        """
        moved = self._moved(feed)
        self._key = None if options is not None else self._key_of(outputs, feed, moved, keep)
        plan = self._plan = None if self._key is None else self._plans.find(self._key)
        if plan is None or (plan.nbytes and self._arena.scratch(plan.nbytes) is not plan.block):
            return self._first_call(outputs, feed, options, moved, keep)
        plan.fill(feed)
        if moved is None:
            return plan.message
        return m.Again(plan=plan.number, moved=[(index, moved[name]) for index, name in plan.moved])

    def _moved(self, feed: Mapping[Any, Any]) -> dict[Any, m.Tensor] | None:
        """Where the worker finds the large arrays that lie in shared memory already."""
        found = None
        for name, value in feed.items():
            if type(value) is Reference:
                block, offset = value.block, value.offset
            elif type(value) is np.ndarray and value.nbytes >= VIEW_FROM and (home := home_of(value)):
                block, offset = home, home.offset_of(value)
            else:
                continue
            found = found or {}
            found[name] = m.Tensor(value.dtype.str, value.shape, self._arena.adopt(block), offset)
        return found

    def _key_of(
        self, outputs: Any, feed: Mapping[Any, Any], moved: dict[Any, m.Tensor] | None, keep: bool
    ) -> Any:
        try:
            key = key_of(outputs, feed, keep)
            hash(key)
        except TypeError:  # not what onnxruntime takes; it shall say so
            return None
        return key if moved is None or key is None else (*key, *moved)

    def _first_call(
        self,
        outputs: Any,
        feed: Mapping[Any, Any],
        options: Any,
        moved: dict[Any, m.Tensor] | None,
        keep: bool,
    ) -> m.Call:
        moved = moved or {}
        packer = Packer(self._arena, moved={id(feed[name]): tensor for name, tensor in moved.items()})
        packed_outputs, *values = packer.pack([outputs, *feed.values()])
        number = None
        self._plan = None
        if self._key is not None and can_repeat(feed):
            number = self._plans.next_number(packer.scratch)
            targets = targets_of(values, packer.scratch)
            places = [(index, name) for index, name in enumerate(feed) if name in moved]
            self._plan = Plan(number, packer.scratch, packer.nbytes, targets, places)
        return m.Call(
            outputs=packed_outputs,
            feed=list(zip(feed, values, strict=True)),
            options=options,
            plan=number,
            moved=[index for index, name in enumerate(feed) if name in moved],
            keep=keep,
        )

    def exchange(self, request: Request) -> Any:
        """Sends a request and waits for its reply; None if the worker went without one.

        A worker that was gone before is as one that drains: it has not begun anything.  An exception,
        KeyboardInterrupt included, leaves the lane unusable: close it.
        """
        self._asked, self._plan = self._plan, None
        self._page.note_call(_current_cpu(), self._took)
        started = time.perf_counter_ns()
        if not self._send(request):
            return m.Draining()
        reply = self._next()
        self.last_used = time.perf_counter_ns()
        self._took = self.last_used - started
        return reply

    @property
    def is_large(self) -> bool:
        """Whether both ends keep so much memory that it is worth giving back."""
        return self._arena.nbytes + self._handover.mappings.nbytes > LARGE

    def trim(self) -> bool:
        """Gives back the memory of both ends; false if the worker did not answer: close the lane."""
        self._plans = Plans()
        self._arena.trim()
        self._send(m.Trim())
        done = isinstance(self._next(_TRIM_TIMEOUT), m.Result)
        return done and not self._handover.is_dead()

    def result(self, reply: m.Result | m.Same) -> Any:
        """What a request returned: small arrays are copies, large ones views that keep their memory alive."""
        if isinstance(reply, m.Same):
            return [block.array(t.dtype, t.shape, t.offset).copy() for block, t in self._results_in_place()]
        self._learn(reply.value)
        return self._unpacker.unpack(reply.value)

    def references(self, reply: m.Result | m.Same) -> list[Any]:
        """What a call with ``keep`` returned: where arrays lie, for as long as nothing else is said on this
        lane.  What cannot be passed on like that is a value."""
        if isinstance(reply, m.Result):
            self._learn(reply.value)
            if self._asked is None or self._asked.results is None:
                values: list[Any] = self._unpacker.unpack(reply.value)
                return values
        return [
            Reference(block, np.dtype(t.dtype), t.shape, t.offset) for block, t in self._results_in_place()
        ]

    def _results_in_place(self) -> list[tuple[Block, m.Tensor]]:
        plan = self._asked
        if plan is None or plan.results is None:
            raise ProtocolError("A worker answered that its results lie where none ever lay.")
        return plan.results

    def _learn(self, value: m.Value) -> None:
        if (plan := self._asked) is None:
            return
        tensors = in_place(value) or []
        in_scratch = tensors and not any(t.leased for t in tensors)
        plan.results = [(self._handover.block(t.block), t) for t in tensors] if in_scratch else None
        self._plans.remember(self._key, plan)

    def is_dead(self) -> bool:
        """Whether the worker is gone; does not wait."""
        return self._handover.is_dead()

    def touch(self) -> None:
        """Leaves the time of a use where the worker looks before its TTL ends it.  Costs no message."""
        self._page.clock = time.monotonic_ns()


class WorkerLane(_Lane):
    """The worker's end."""

    def __init__(self, ctx: Context, channel: Channel, secret: str, timeout: float) -> None:
        """Answers a caller who connected.

        Raises:
            ProtocolError: the caller does not know the secret or speaks another version.
            TimeoutError: the caller said nothing for ``timeout`` seconds.
        """
        received = channel.receive(timeout)
        hello = m.lane_request(received[0]) if received else None
        if not (isinstance(hello, m.LaneHello) and secrets.compare_digest(hello.secret, secret)):
            raise ProtocolError("Somebody without the secret tried to open a lane.")
        if hello.version != m.PROTOCOL_VERSION:
            raise ProtocolError(f"A caller speaks protocol version {hello.version}.")
        socket = None if hello.reply_to is None else sockets.pair(ctx, hello.reply_to)
        handover = _Handover(channel, m.lane_request, keep_descriptors=False)
        super().__init__(handover, socket, m.lane_request, poll=hello.poll)
        self._send(m.LaneOpen(secret=secret))
        self._unpacker = Unpacker(self._handover.block, copy=False)

    def receive(self) -> Any:
        """The next request; None when the caller is gone.

        Raises:
            ProtocolError: it is no request.
        """
        return self._next()

    def unpack(self, value: m.Value) -> Any:
        """A value of a request; its arrays are views, valid until the reply is sent."""
        return self._unpacker.unpack(value)

    def reply(self, value: Any, *, keep: bool = False) -> m.Value:
        """Sends a result; large arrays in it are leased to the caller, unless ``keep``.

        Returns what was sent.

        Raises:
            Exception: the value cannot be sent; nothing was.
        """
        packer = Packer(self._arena, lease_from=None if keep else VIEW_FROM)
        (packed,) = packer.pack([value])
        try:
            self._send(m.Result(value=packed))
        except BaseException:
            packer.abandon()
            raise
        return packed

    def say(self, message: m.CallFailed | m.Draining | bytes) -> None:
        """Sends a reply that is ready to be sent."""
        self._send(message)

    def trim(self) -> None:
        """Gives back the memory that no result lies in."""
        self._arena.trim()

    def scratch(self, nbytes: int) -> Block:
        """Where small results of the next reply may be written."""
        return self._arena.scratch(nbytes)

    def lease(self, nbytes: int) -> Block:
        """Where a large result of the next reply may be written."""
        return self._arena.lease(nbytes)

    @property
    def drops(self) -> int:
        """Counts the blocks that the caller dropped."""
        return self._handover.mappings.drops

    def has(self, block: int) -> bool:
        """Whether the caller's block is still mapped."""
        return self._handover.mappings.get(block) is not None

    def last_call(self) -> tuple[int, int]:
        """The core that the caller runs on, and the nanoseconds that its last call took."""
        page = self._handover.mappings.page
        return page.last_call() if page is not None else (-1, 0)

    def last_touch(self) -> float:
        """When the caller last left the time of a use, in monotonic seconds; 0.0 if never."""
        return self._handover.mappings.clock() / 1e9
