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
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Final, Protocol

import numpy as np
import zmq

from onnx_dl.config import fresh_address
from onnx_dl.errors import ProtocolError
from onnx_dl.transport import messages as m
from onnx_dl.transport import sockets
from onnx_dl.transport.arena import Arena, Block, Mappings, Reference, home_of
from onnx_dl.transport.bell import CallerBell, WorkerBell
from onnx_dl.transport.patience import Patience
from onnx_dl.transport.placement import Apart, Placement
from onnx_dl.transport.plans import Plan, Plans, can_repeat, in_place, key_of, targets_of
from onnx_dl.transport.sockets import LONGEST, Channel, Context, Socket
from onnx_dl.transport.tensors import VIEW_FROM, Packer, Unpacker

_HANDOVER: Final = 10.0
"""Seconds within which a block must arrive that a message names; its sender sent it before the message."""

Request = m.Call | m.Again | m.Invoke | m.Touch | m.Hold | m.Unhold
_REPLY, _SAME = 0, 1
"""What a worker rings: a reply lies on the socket; the answer is Same."""
_REQUEST, _AGAIN = 1, 2
"""What a caller rings: a request lies on the socket; from 2 on, Again with that number less 2."""

LARGE: Final = 1 << 20
"""Bytes of shared memory that an idle lane may keep."""

_TRIM_TIMEOUT: Final = 0.2

_current_cpu: Final[Callable[[], int]] = getattr(ctypes.CDLL(None), "sched_getcpu", lambda: -1)


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

    def send(self, message: m.Message | bytes, fds: tuple[int, ...] = ()) -> bool:
        """Sends a message of any length; false if the peer is gone, and has not got all of it."""
        data = message if isinstance(message, bytes) else m.encode(message)
        if fds:
            return self.channel.send(data, fds)
        if len(data) <= LONGEST:
            return self.channel.send(data)
        parts = [data[start : start + LONGEST] for start in range(0, len(data), LONGEST)]
        return all(map(self.channel.send, [m.encode(m.Large(nbytes=len(data))), *parts]))

    def next(self, timeout: float | None) -> Any:
        """The next message, once blocks were taken in that came before it; None if the peer is gone.

        Raises:
            TimeoutError: nothing came within ``timeout`` seconds.
        """
        while (received := self.channel.receive(timeout)) is not None:
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

    Calls go over the Unix socket with a bell to wake the peer, or over a ZeroMQ socket beside it.
    """

    def __init__(self, handover: _Handover, calls: _Calls, *, polls: bool) -> None:
        self._handover = handover
        self._arena = Arena(handover)
        self._calls = calls
        self.polls = polls
        self.over_zmq = isinstance(calls, _ZmqCalls)

    def close_calls(self) -> None:
        """Ends the calls; who polls the channel closes that."""
        self._calls.close()

    def close(self) -> None:
        """Ends the lane.  Arrays that lie in its blocks stay valid."""
        self._calls.close()
        self._handover.channel.close()


class _Calls(Protocol):
    """How requests and replies travel."""

    def send(self, message: m.Message | bytes) -> bool:
        """Sends; false if the peer is known to be gone, else that shows when the next message is awaited."""

    def next(self, timeout: float | None = None) -> Any:
        """The next message; None if the peer is gone or the time is up.  Some are told by a number only."""

    def again(self, number: int) -> bool:
        """Sends Again, with nothing moved."""

    def same(self) -> None:
        """Sends Same."""

    def close(self) -> None: ...


class _BellCalls:
    """Messages lie on the Unix socket; the bell says so, or spares them."""

    def __init__(self, handover: _Handover, bell: CallerBell | WorkerBell, *, rings: int, hears: int) -> None:
        """``rings``, ``hears``: the numbers by which this and the other end say that a message lies there."""
        self._handover = handover
        self.bell = bell
        self._rings = rings
        self._hears = hears

    def send(self, message: m.Message | bytes) -> bool:
        sent = self._handover.send(message)
        if sent:
            self.bell.ring(self._rings)
        return sent

    def next(self, timeout: float | None = None) -> Any:
        try:
            number = self.bell.wait(timeout)
            return self._handover.next(_HANDOVER) if number == self._hears else number
        except TimeoutError:
            return None

    def again(self, number: int) -> bool:
        self.bell.ring(_AGAIN + number)
        return True

    def same(self) -> None:
        self.bell.ring(_SAME)

    def close(self) -> None:
        self.bell.close()


class _ZmqCalls:
    """Messages go over a ZeroMQ PAIR socket."""

    def __init__(self, handover: _Handover, socket: Socket, read: m.Reader) -> None:
        self._handover = handover
        self._socket = socket
        self._read = read
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(handover.channel.fileno(), zmq.POLLIN)

    def send(self, message: m.Message | bytes) -> bool:
        # Again: a PAIR socket without a peer would wait for ever.  Terminated: this process leaves.
        with contextlib.suppress(zmq.Again, zmq.ContextTerminated):
            self._socket.send(message if isinstance(message, bytes) else m.encode(message), zmq.NOBLOCK)
            return True
        return False

    def next(self, timeout: float | None = None) -> Any:
        try:
            data = self._next(timeout)
        except zmq.ContextTerminated:  # the supervisor died, and the worker with it
            return None
        return None if data is None else self._read(data)

    def _next(self, timeout: float | None) -> bytes | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            ready = sockets.wait(self._poller, None if deadline is None else deadline - time.monotonic())
            if self._socket in ready:
                return self._socket.recv()
            if not ready or self._handover.is_dead():
                return _last_words(self._socket)

    def again(self, number: int) -> bool:
        return self.send(m.Again(plan=number))

    def same(self) -> None:
        self.send(m.Same())

    def close(self) -> None:
        self._socket.close()


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
        self.latency = latency
        handover = _Handover(Channel.connect(granted.address, timeout), m.lane_reply, keep_descriptors=True)
        polls = latency == "low" and not over_zmq and len(os.sched_getaffinity(0)) > 1
        reply_to = fresh_address("lane") if over_zmq else None
        try:
            calls = _caller_calls(handover, ctx, reply_to, polls)
        except BaseException:
            handover.channel.close()
            raise
        super().__init__(handover, calls, polls=polls)
        try:
            self._page = self._open(granted.secret, reply_to, timeout)
        except BaseException:
            self.close()
            raise
        self._placement = None if over_zmq else _placement_of(self._thread, Apart if polls else Placement)
        self._unpacker = Unpacker(self._handover.block, copy=True)
        self._plans = Plans()
        self._key: Hashable | None = None
        self._plan: Plan | None = None
        """Of the request that was made last; ``_asked``: of the one that was sent last."""
        self._asked: Plan | None = None
        self._requests = 0
        self._took = 0
        self.last_used = time.perf_counter_ns()

    def _open(self, secret: str, reply_to: str | None, timeout: float) -> Block:
        bell = self._calls.bell if isinstance(self._calls, _BellCalls) else None
        hello = m.LaneHello(version=m.PROTOCOL_VERSION, secret=secret, reply_to=reply_to, poll=self.polls)
        fds = bell.descriptors() if isinstance(bell, CallerBell) else ()
        self._handover.send(hello, fds)
        if isinstance(bell, CallerBell):
            bell.handed_over()
        page = self._arena.page()
        opened = self._calls.next(timeout)
        if opened is None:
            raise ConnectionError("the worker did not open the lane")
        if not (isinstance(opened, m.LaneOpen) and secrets.compare_digest(opened.secret, secret)):
            raise ProtocolError("Another process than the worker answered on a lane.")
        self._thread = opened.thread
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
        self._key = None
        plan = self._find_plan(outputs, feed, moved, keep) if options is None else None
        if plan is None or (plan.nbytes and self._arena.scratch(plan.nbytes) is not plan.block):
            return self._first_call(outputs, feed, options, moved, keep)
        self._plan = plan
        plan.fill(feed)
        return m.Again(
            plan=plan.number, moved=[(index, moved[name]) for index, name in plan.moved] if moved else []
        )

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

    def _find_plan(
        self, outputs: Any, feed: Mapping[Any, Any], moved: dict[Any, m.Tensor] | None, keep: bool
    ) -> Plan | None:
        """The plan of a call like this one, and its key for the plan that will be."""
        try:
            key = key_of(outputs, feed, keep)
            key = key if moved is None or key is None else (*key, *moved)
            plan = self._plans.find(key)
        except TypeError:  # names that cannot be hashed: not what onnxruntime takes; it shall say so
            return None
        self._key = key
        return plan

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
        started = time.perf_counter_ns()
        self._requests += 1
        if self._placement is not None:
            self._place(self._placement)
        self._page.ask(self._requests)
        if type(request) is m.Again and not request.moved:
            sent = self._calls.again(request.plan)
        else:
            sent = self._calls.send(request)
        reply = self._calls.next() if sent else None
        self.last_used = time.perf_counter_ns()
        self._took = self.last_used - started
        if reply is None and self._page.begun != self._requests:
            return m.Draining()
        return reply

    def _place(self, placement: Placement | Apart) -> None:
        """Has the worker's thread run where this caller finds it fastest."""
        if cores := placement.note(_current_cpu(), self._took):
            with contextlib.suppress(OSError):  # it is gone, or a core was taken away meanwhile
                os.sched_setaffinity(self._thread, cores)

    @property
    def is_large(self) -> bool:
        """Whether both ends keep so much memory that it is worth giving back."""
        return self._arena.nbytes + self._handover.mappings.nbytes > LARGE

    def trim(self) -> bool:
        """Gives back the memory of both ends; false if the worker did not answer: close the lane."""
        self._plans, self._asked = Plans(), None
        self._arena.trim()
        self._requests += 1
        self._calls.send(m.Trim())
        done = isinstance(self._calls.next(_TRIM_TIMEOUT), m.Result)
        return done and not self._handover.is_dead()

    def result(self, reply: m.Result | m.Same | int) -> Any:
        """What a request returned: small arrays are copies, large ones views that keep their memory alive."""
        if not isinstance(reply, m.Result):
            return [block.array(t.dtype, t.shape, t.offset).copy() for block, t in self._results_in_place()]
        self._learn(reply.value)
        return self._unpacker.unpack(reply.value)

    def references(self, reply: m.Result | m.Same | int) -> list[Any]:
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


def _placement_of(thread: int, kind: type[Placement | Apart]) -> Placement | Apart | None:
    """None where the system does not let us look, or there is nothing to choose from."""
    try:
        cores = frozenset(os.sched_getaffinity(thread))
    except OSError:
        return None
    return kind(cores) if len(cores) > 1 else None


def _caller_calls(handover: _Handover, ctx: Context, reply_to: str | None, polls: bool) -> _Calls:
    if reply_to is None:
        return _BellCalls(handover, CallerBell(Patience() if polls else None), rings=_REQUEST, hears=_REPLY)
    try:
        return _ZmqCalls(handover, sockets.pair_listener(ctx, reply_to), m.lane_reply)
    except zmq.ZMQError as error:  # the connection to the supervisor ended meanwhile
        raise ConnectionError(str(error)) from error


def _checked(hello: Any, secret: str, fds: int) -> m.LaneHello:
    """The greeting of a caller who may open a lane."""
    if not (isinstance(hello, m.LaneHello) and secrets.compare_digest(hello.secret, secret)):
        raise ProtocolError("Somebody without the secret tried to open a lane.")
    if hello.version != m.PROTOCOL_VERSION:
        raise ProtocolError(f"A caller speaks protocol version {hello.version}.")
    if fds != (2 if hello.reply_to is None else 0):
        raise ProtocolError(f"A caller came with {fds} descriptors.")
    return hello


class WorkerLane(_Lane):
    """The worker's end."""

    def __init__(self, ctx: Context, channel: Channel, secret: str, timeout: float) -> None:
        """Answers a caller who connected.

        Raises:
            ProtocolError: the caller does not know the secret or speaks another version.
            TimeoutError: the caller said nothing for ``timeout`` seconds.
        """
        received = channel.receive(timeout)
        fds = received[1] if received else []
        try:
            hello = _checked(m.lane_request(received[0]) if received else None, secret, len(fds))
        except BaseException:
            sockets.close_all(fds)
            raise
        handover = _Handover(channel, m.lane_request, keep_descriptors=False)
        calls: _Calls
        if hello.reply_to is None:
            self._bell = WorkerBell(fds, Patience() if hello.poll else None)
            calls = _BellCalls(handover, self._bell, rings=_REPLY, hears=_REQUEST)
        else:
            calls = _ZmqCalls(handover, sockets.pair(ctx, hello.reply_to), m.lane_request)
        super().__init__(handover, calls, polls=hello.poll)
        self._calls.send(m.LaneOpen(secret=secret, thread=threading.get_native_id()))
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
        """
        request = self._calls.next()
        if (page := self._handover.mappings.page) is not None and request is not None:
            page.begin()
        return request - _AGAIN if type(request) is int else request

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
            self._calls.send(m.Result(value=packed))
        except BaseException:
            packer.abandon()
            raise
        return packed

    def say(self, message: m.CallFailed | m.Draining | bytes) -> None:
        """Sends a reply that is ready to be sent."""
        self._calls.send(message)

    def say_same(self) -> None:
        """The results lie where the last ones lay."""
        self._calls.same()

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

    def last_touch(self) -> float:
        """When the caller last left the time of a use, in monotonic seconds; 0.0 if never."""
        return self._handover.mappings.clock() / 1e9
