"""A caller's end of its way to one worker; the worker's is :mod:`onnx_dl.transport.worker_lane`.

:mod:`onnx_dl.tensors.call_codec` encodes the calls.  The reaction to a lane that breaks is
:mod:`onnx_dl.client.pending_call`'s.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import time
from collections.abc import Callable
from typing import Final

import zmq

from onnx_dl.concurrency import waits
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.errors import ProtocolError
from onnx_dl.protocol import codec, control, failures, lane
from onnx_dl.tensors.block import Block
from onnx_dl.tensors.call_codec import CallCodec, Request
from onnx_dl.tensors.call_plans import CallPlan, EncodedCall
from onnx_dl.transport import sockets
from onnx_dl.transport.addresses import fresh_address, same_secret
from onnx_dl.transport.affinity import Apart, Placement
from onnx_dl.transport.call_channel import CallerBellChannel, CallerChannel, ZmqChannel
from onnx_dl.transport.doorbell import CallerBell
from onnx_dl.transport.lane import Lane
from onnx_dl.transport.lane_socket import Handover
from onnx_dl.transport.sockets import Channel, Context
from onnx_dl.transport.spin import Patience

Reply = codec.Message | int | None
"""A number stands for SameResult; None: the worker went."""

LARGE: Final = 1 << 20
"""Bytes of shared memory that an idle lane may keep."""

_TRIM_TIMEOUT: Final = 0.2

_current_cpu: Final[Callable[[], int]] = getattr(ctypes.CDLL(None), "sched_getcpu", lambda: -1)


class ClientLane(Lane[CallerChannel]):
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
        """Opens a lane to the worker that was granted.

        ``latency``: "low" polls (see :mod:`onnx_dl.transport.spin`), but not in a program with greenlets,
        which would wait meanwhile.

        Raises:
            DeadlinePassed: the worker did not answer in time.
            OSError: it is gone.
        """
        self.granted = granted
        self.latency = latency
        handover = Handover(
            Channel.connect(granted.address, deadline), lane.lane_reply, keep_descriptors=True
        )
        has_cores = len(os.sched_getaffinity(0)) > 1
        polls = latency == "low" and not over_zmq and not waits.are_cooperative() and has_cores
        reply_to = fresh_address("lane") if over_zmq else None
        try:
            calls = _channel(handover, ctx, reply_to, polls)
        except BaseException:
            handover.channel.close()
            raise
        super().__init__(handover, calls, polls=polls)
        try:
            self._page = self._greet(calls, reply_to)
            self._thread = self._await_opening(deadline)
        except BaseException:
            self.close()
            raise
        self._placement = None if over_zmq else _placement_of(self._thread, Apart if polls else Placement)
        self.codec = CallCodec(handover.arena, handover.mappings, handover.block)
        self._requests = 0
        self._was_sent = False
        """Whether the present request was sent, as far as is known."""
        self._sent_at = self._took = 0
        self.last_used = time.perf_counter_ns()

    def _greet(self, calls: CallerChannel, reply_to: str | None) -> Block:
        page = self._arena.page()  # travels with the greeting
        hello = lane.LaneHello(
            version=codec.PROTOCOL_VERSION,
            secret=self.granted.secret,
            reply_to=reply_to,
            poll=self.polls,
            model=self.granted.model,
        )
        bell = calls.bell if isinstance(calls, CallerBellChannel) else None
        self._handover.send(codec.encode(hello), () if bell is None else bell.descriptors())
        if bell is not None:
            bell.handed_over()
        return page

    def _await_opening(self, deadline: Deadline) -> int:
        """The native id of the thread that serves the lane, from the worker's first message.

        The worker may be stopped, or native code may hold its interpreter's lock.
        """
        while True:
            try:
                opened = self._calls.next(deadline.step())
                break
            except TimeoutError:
                deadline.check("the worker to open a lane")
        opened = opened or self._handover.next()  # the reason for which there is no lane, if it was sent
        if isinstance(opened, lane.CallFailed):
            raise failures.rebuild(opened.failure)
        if opened is None:
            raise ConnectionError("the worker did not open the lane")
        if not (isinstance(opened, lane.LaneOpen) and same_secret(opened.secret, self.granted.secret)):
            raise ProtocolError("Another process than the worker answered on a lane.")
        return opened.thread

    def exchange(self, request: Request, timeout: float | None = None) -> Reply:
        """Sends a request and waits for its reply, see :meth:`send` and :meth:`receive`."""
        self.send(request)
        return self.receive(timeout)

    def send(self, request: Request) -> None:
        """Sends a request.  After an exception, KeyboardInterrupt included, close the lane."""
        self._sent_at = time.perf_counter_ns()
        self._requests += 1
        if self._placement is not None:
            self._place(self._placement)
        self._page.ask(self._requests)
        if isinstance(request, CallPlan):
            self._was_sent = self._calls.replay(request.number)
        else:
            self._was_sent = self._calls.send(
                request.message if isinstance(request, EncodedCall) else request
            )

    def receive(self, timeout: float | None = None) -> Reply:
        """The reply to the request that was sent last; None if the worker went without one.

        Draining stands also for a worker that was gone before it began the request.  After an exception other
        than TimeoutError, close the lane.

        Raises:
            TimeoutError: the reply did not come within ``timeout`` seconds; it may still come.
        """
        reply = self._calls.next(timeout) if self._was_sent else None
        self.last_used = time.perf_counter_ns()
        self._took = self.last_used - self._sent_at
        if reply is None and self._page.begun != self._requests:
            return lane.Draining()
        return reply

    def _place(self, placement: Placement | Apart) -> None:
        """Has the worker's thread run on the cores where its replies come fastest."""
        if cores := placement.note(_current_cpu(), self._took):
            with contextlib.suppress(OSError):  # it is gone, or a core was taken away meanwhile
                os.sched_setaffinity(self._thread, cores)

    def end_of_this(self) -> lane.Terminate:
        """The request, for another lane, that ends the present call of this one."""
        return lane.Terminate(thread=self._thread, request=self._requests)

    @property
    def reply_fd(self) -> int | None:
        """Readable when a reply is there; None if calls go over ZeroMQ."""
        calls = self._calls
        return calls.bell.fileno() if isinstance(calls, CallerBellChannel) else None

    @property
    def is_large(self) -> bool:
        """Whether both ends keep so much memory that it is worth giving back."""
        arena = self._arena
        return arena.nbytes + arena.adoptions.nbytes + self._handover.mappings.nbytes > LARGE

    def trim(self) -> bool:
        """Gives back the memory of both ends.  False: there was no answer; close the lane."""
        self.codec.forget()
        self._arena.trim()
        try:
            return isinstance(self.exchange(lane.Trim(), _TRIM_TIMEOUT), lane.Result)
        except (OSError, ProtocolError):
            return False

    def is_dead(self) -> bool:
        """Whether the worker is gone; does not wait."""
        return self._handover.is_dead()

    def touch(self) -> None:
        """Writes the time of a use where the worker reads it before its TTL ends it.  Sends no message."""
        self._page.clock = time.monotonic_ns()


def _placement_of(thread: int, kind: type[Placement | Apart]) -> Placement | Apart | None:
    """None where the system does not let us look, or there is only one core."""
    try:
        cores = frozenset(os.sched_getaffinity(thread))
    except OSError:
        return None
    return kind(cores) if len(cores) > 1 else None


def _channel(handover: Handover, ctx: Context | None, reply_to: str | None, polls: bool) -> CallerChannel:
    if reply_to is None or ctx is None:
        return CallerBellChannel(handover, CallerBell(Patience() if polls else None))
    try:
        return ZmqChannel(handover, sockets.pair_listener(ctx, reply_to), is_caller=True)
    except zmq.ZMQError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise OSError(error.errno, str(error)) from error
        raise ConnectionError(str(error)) from error  # the connection to the supervisor ended meanwhile
