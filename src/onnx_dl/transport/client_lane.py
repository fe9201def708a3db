"""A caller's end of its way to one worker.

Both ends hand each other blocks of shared memory over a Unix socket, on which they also see each other die.
One call is on a lane at a time; concurrent callers have a lane each.  The worker's end is
:mod:`onnx_dl.transport.worker_lane`.  What is called, and what to do when a lane breaks, is not known here.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Final

import numpy as np
import zmq

from onnx_dl.concurrency import waits
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.errors import ProtocolError
from onnx_dl.protocol import codec, control, failures, lane
from onnx_dl.tensors.block import Block, Reference, home_of
from onnx_dl.tensors.call_plans import Asked, Plan, Plans, can_repeat, key_of, targets_of, texts_of
from onnx_dl.tensors.result_forms import in_one_place, reader_of
from onnx_dl.tensors.values import VIEW_FROM, Packer, Unpacker, as_it_is
from onnx_dl.transport import sockets
from onnx_dl.transport.addresses import fresh_address, same_secret
from onnx_dl.transport.affinity import Apart, Placement
from onnx_dl.transport.call_channel import CallerBellCalls, Calls, NoCalls, ZmqCalls
from onnx_dl.transport.doorbell import CallerBell
from onnx_dl.transport.lane_socket import Handover
from onnx_dl.transport.sockets import Channel, Context
from onnx_dl.transport.spin import Patience

Request = Plan | Asked | lane.Invoke | lane.Touch | lane.Hold | lane.Unhold | lane.Terminate | lane.Trim

LARGE: Final = 1 << 20
"""Bytes of shared memory that an idle lane may keep."""

_TRIM_TIMEOUT: Final = 0.2

_current_cpu: Final[Callable[[], int]] = getattr(ctypes.CDLL(None), "sched_getcpu", lambda: -1)


class Lane:
    """What both ends have in common.  Used by one thread at a time.

    Calls go over the Unix socket with a bell to wake the peer, or over a ZeroMQ socket beside it.
    """

    def __init__(self, handover: Handover, calls: Calls, *, polls: bool) -> None:
        self._handover = handover
        self._arena = handover.arena
        self._calls: Calls = calls
        self.polls = polls
        self.over_zmq = isinstance(calls, ZmqCalls)

    def close_calls(self) -> None:
        """Ends the calls; who polls the channel closes that."""
        self._calls.close()

    def close(self) -> None:
        """Ends the lane.  Arrays that lie in its blocks stay valid.  May be called twice."""
        calls, self._calls = self._calls, NoCalls()
        calls.close()
        self._handover.channel.close()


class ClientLane(Lane):
    """The caller's end."""

    def __init__(
        self,
        ctx: Context | None,
        granted: control.Granted,
        deadline: Deadline,
        *,
        over_zmq: bool,
        latency: str,
    ) -> None:
        """Opens a lane to the worker that was granted.  ``latency``: "low" polls, see
        :mod:`onnx_dl.transport.spin`; not in a program with greenlets, which would wait meanwhile.

        Raises:
            DeadlinePassed: the worker did not answer in time.
            OSError: it is gone.
        """
        self.granted = granted
        self.origin: Any = None
        """Who granted it, if whoever opens the lane wants to know that later."""
        self.latency = latency
        handover = Handover(
            Channel.connect(granted.address, deadline), lane.lane_reply, keep_descriptors=True
        )
        polls = latency == "low" and not over_zmq and not waits.are_cooperative() and _has_two_cores()
        reply_to = fresh_address("lane") if over_zmq else None
        try:
            calls = _caller_calls(handover, ctx, reply_to, polls)
        except BaseException:
            handover.channel.close()
            raise
        super().__init__(handover, calls, polls=polls)
        try:
            self._page = self._open(granted, reply_to, deadline)
        except BaseException:
            self.close()
            raise
        self._placement = None if over_zmq else _placement_of(self._thread, Apart if polls else Placement)
        self._unpacker = Unpacker(self._handover.block, copy=True)
        self._plans = Plans()
        self._asked: Plan | None = None
        """Of the request that was sent last.  It joins ``_plans`` when that is answered."""
        self._drops = self._requests = 0
        self._sent = False
        self._sent_at = self._took = 0
        self.last_used = time.perf_counter_ns()

    def _open(self, granted: control.Granted, reply_to: str | None, deadline: Deadline) -> Block:
        bell = self._calls.bell if isinstance(self._calls, CallerBellCalls) else None
        page = self._arena.page()  # travels with the greeting
        hello = lane.LaneHello(
            version=codec.PROTOCOL_VERSION,
            secret=granted.secret,
            reply_to=reply_to,
            poll=self.polls,
            model=granted.model,
        )
        fds = bell.descriptors() if isinstance(bell, CallerBell) else ()
        self._handover.send(codec.encode(hello), fds)
        if isinstance(bell, CallerBell):
            bell.handed_over()
        opened = self._await(deadline) or self._handover.next()  # why there is no lane, if it could say so
        if isinstance(opened, lane.CallFailed):
            raise failures.rebuild(opened.failure)
        if opened is None:
            raise ConnectionError("the worker did not open the lane")
        if not (isinstance(opened, lane.LaneOpen) and same_secret(opened.secret, granted.secret)):
            raise ProtocolError("Another process than the worker answered on a lane.")
        self._thread = opened.thread
        return page

    def _await(self, deadline: Deadline) -> Any:
        """The worker's first message.  It may be stopped, or native code may hold its interpreter's lock."""
        while True:
            try:
                return self._calls.next(deadline.step())
            except TimeoutError:
                deadline.check("the worker to open a lane")

    def pack(self, values: Iterable[Any]) -> list[lane.Value]:
        """Copies the arrays in ``values`` to where the worker sees them; see :class:`Packer`."""
        return Packer(self._arena).pack(values)

    def call(
        self,
        outputs: Any,
        feed: Mapping[Any, Any],
        options: dict[str, Any] | None,
        *,
        keep: bool = False,
        background: bool = False,
    ) -> Request:
        """The request for one inference; the arrays in ``feed`` are copied, unless they lie in shared memory.

        To make it changes nothing that an answer of the worker depends on, so a request that is not sent
        after all needs no undoing.  ``keep``: for :meth:`references` instead of :meth:`result`.
        ``background``: Started comes first.

        Raises: like :meth:`Packer.pack`.
        """
        moved, feed = self._moved(feed)
        key = None
        if options is None and not background:
            try:
                key = key_of(outputs, feed, keep, moved)
                plan = self._plans.find(key)
            except TypeError:  # names that cannot be hashed: not what onnxruntime takes; it shall say so
                plan = None
            if plan is not None and plan.fill(feed, self._arena):
                return plan if moved is None else Asked(_again(plan, moved), plan)
        return self._first_call(outputs, feed, options, moved or {}, key, keep=keep, background=background)

    def _moved(self, given: Mapping[Any, Any]) -> tuple[dict[Any, lane.Tensor] | None, Mapping[Any, Any]]:
        """Where the worker finds the large arrays that lie in shared memory already, and the feed; in this,
        what the worker cannot be told of is an array to be copied."""
        found, feed = None, given
        for name, value in given.items():
            if type(value) is Reference:
                block, offset = value.block, value.offset
            elif type(value) is np.ndarray and value.nbytes >= VIEW_FROM and (home := home_of(value)):
                block, offset = home, home.offset_of(value)
            else:
                continue
            if found is None and feed is given:
                self._arena.adoptions.next_message()
            if (number := self._arena.adopt(block)) is None:
                if type(value) is Reference:
                    feed = {**feed, name: block.array(value.dtype.str, value.shape, offset)}
                continue
            found = found or {}
            found[name] = lane.Tensor(value.dtype.str, value.shape, number, offset)
        return found, feed

    def _first_call(
        self,
        outputs: Any,
        feed: Mapping[Any, Any],
        options: Any,
        moved: dict[Any, lane.Tensor],
        key: Hashable | None,
        *,
        keep: bool,
        background: bool,
    ) -> Asked:
        packer = Packer(self._arena, moved={id(feed[name]): tensor for name, tensor in moved.items()})
        packed_outputs, *values = packer.pack([as_it_is(outputs), *feed.values()])
        places = [(index, name) for index, name in enumerate(feed) if name in moved]
        plan = None
        if key is not None and can_repeat(feed):
            number = self._plans.next_number(packer.scratch)
            targets, texts = targets_of(values, packer.scratch), texts_of(feed, values)
            plan = Plan(key, number, packer.scratch, packer.nbytes, targets, texts, places)
        call = lane.Call(
            outputs=packed_outputs,
            feed=list(zip(feed, values, strict=True)),
            options=options,
            plan=None if plan is None else plan.number,
            moved=[index for index, _ in places],
            keep=keep,
            background=background,
        )
        return Asked(call, plan)

    def exchange(self, request: Request, timeout: float | None = None) -> Any:
        """Sends a request and waits for its reply, see :meth:`send` and :meth:`receive`."""
        self.send(request)
        return self.receive(timeout)

    def send(self, request: Any) -> None:
        """Sends a :data:`Request`.  An exception, KeyboardInterrupt included, leaves the lane unusable: close
        it."""
        kind = type(request)
        self._asked = request if kind is Plan else request.plan if kind is Asked else None
        self._sent_at = time.perf_counter_ns()
        self._requests += 1
        if self._placement is not None:
            self._place(self._placement)
        self._page.ask(self._requests)
        if kind is Plan:
            self._sent = self._calls.again(request.number)
        else:
            self._sent = self._calls.send(request.message if kind is Asked else request)

    def receive(self, timeout: float | None = None) -> Any:
        """The reply to the request that was sent; None if the worker went without one.

        A worker that was gone before is as one that drains: it has not begun anything.  An exception other
        than this leaves the lane unusable: close it.

        Raises:
            TimeoutError: it did not come within ``timeout`` seconds; it may still.
        """
        reply = self._calls.next(timeout) if self._sent else None
        self.last_used = time.perf_counter_ns()
        self._took = self.last_used - self._sent_at
        if reply is None and self._page.begun != self._requests:
            return lane.Draining()
        return reply

    def _place(self, placement: Placement | Apart) -> None:
        """Has the worker's thread run where this caller finds it fastest."""
        if cores := placement.note(_current_cpu(), self._took):
            with contextlib.suppress(OSError):  # it is gone, or a core was taken away meanwhile
                os.sched_setaffinity(self._thread, cores)

    def end_of_this(self) -> lane.Terminate:
        """The request, for another lane, that ends the present call of this one."""
        return lane.Terminate(thread=self._thread, request=self._requests)

    @property
    def reply_fd(self) -> int | None:
        """Readable when a reply is there; None if calls go over ZeroMQ."""
        bell = getattr(self._calls, "bell", None)
        return bell.fileno() if isinstance(bell, CallerBell) else None

    @property
    def is_large(self) -> bool:
        """Whether both ends keep so much memory that it is worth giving back."""
        arena = self._arena
        return arena.nbytes + arena.adoptions.nbytes + self._handover.mappings.nbytes > LARGE

    def forget(self) -> None:
        """No call is made again by its number: the worker does not remember them."""
        self._plans = Plans()

    def trim(self) -> bool:
        """Gives back the memory of both ends; false if the worker did not answer: close the lane."""
        self.forget()
        self._arena.trim()
        try:
            return isinstance(self.exchange(lane.Trim(), _TRIM_TIMEOUT), lane.Result)
        except TimeoutError:
            return False

    def result(self, reply: lane.Result | lane.Same | int) -> Any:
        """What a request returned: small arrays are copies, large ones views that keep their memory alive."""
        if not isinstance(reply, lane.Result):
            plan = self._repeated()
            return [read() for read in plan.readers or self._read_by(plan)]
        self._learn(reply.value)
        return self._unpacker.unpack(reply.value)

    def references(self, reply: lane.Result | lane.Same | int) -> list[Any]:
        """What a call with ``keep`` returned: where arrays lie, for as long as nothing else is said on this
        lane.  What cannot be passed on like that is a value."""
        if isinstance(reply, lane.Result):
            self._learn(reply.value)
            if self._asked is None or self._asked.results is None:
                values: list[Any] = self._unpacker.unpack(reply.value)
                return values
        return list(map(self._reference, self._repeated().results or []))

    def _reference(self, value: lane.Value) -> Any:
        if not isinstance(value, lane.Tensor):
            return self._unpacker.unpack(value)
        return Reference(self._handover.block(value.block), np.dtype(value.dtype), value.shape, value.offset)

    def _repeated(self) -> Plan:
        """The plan of the request that was sent last, of which it is known where its results lie."""
        plan = self._asked
        if plan is None or plan.results is None:
            raise ProtocolError("A worker answered that its results lie where none ever lay.")
        return plan

    def _learn(self, value: lane.Value) -> None:
        mappings = self._handover.mappings
        if mappings.drops != self._drops:
            self._drops = mappings.drops
            self._plans.let_go(lambda number: mappings.get(number) is not None)
        if (plan := self._asked) is None:
            return
        plan.results, plan.readers = in_one_place(value), []
        self._plans.remember(plan)

    def _read_by(self, plan: Plan) -> list[Callable[[], Any]]:
        """What reads the results of the plan.  Not made before they are read: to look at a block maps it."""
        copy, block = self._unpacker.copies.copy, self._handover.block
        plan.readers = [reader_of(value, block(value.block), copy) for value in plan.results or []]
        return plan.readers

    def is_dead(self) -> bool:
        """Whether the worker is gone; does not wait."""
        return self._handover.is_dead()

    def touch(self) -> None:
        """Leaves the time of a use where the worker looks before its TTL ends it.  Costs no message."""
        self._page.clock = time.monotonic_ns()


def _has_two_cores() -> bool:
    return len(os.sched_getaffinity(0)) > 1


def _again(plan: Plan, moved: Mapping[Any, lane.Tensor]) -> lane.Again:
    return lane.Again(plan=plan.number, moved=[(index, moved[name]) for index, name in plan.moved])


def _placement_of(thread: int, kind: type[Placement | Apart]) -> Placement | Apart | None:
    """None where the system does not let us look, or there is nothing to choose from."""
    try:
        cores = frozenset(os.sched_getaffinity(thread))
    except OSError:
        return None
    return kind(cores) if len(cores) > 1 else None


def _caller_calls(handover: Handover, ctx: Context | None, reply_to: str | None, polls: bool) -> Calls:
    if reply_to is None or ctx is None:
        return CallerBellCalls(handover, CallerBell(Patience() if polls else None))
    try:
        return ZmqCalls(handover, sockets.pair_listener(ctx, reply_to), calls=True)
    except zmq.ZMQError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise OSError(error.errno, str(error)) from error
        raise ConnectionError(str(error)) from error  # the connection to the supervisor ended meanwhile
