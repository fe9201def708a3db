"""A caller's end of its way to one worker; the worker's is :mod:`onnx_dl.transport.worker_lane`.

:mod:`onnx_dl.tensors.call_codec` encodes the calls.  The reaction to a lane that breaks is
:mod:`onnx_dl.client.pending_call`'s.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from onnx_dl import linux_only
from onnx_dl.concurrency import forking, waits
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.errors import ProtocolError
from onnx_dl.protocol import codec, control, failures, lane
from onnx_dl.system import free_cores
from onnx_dl.tensors.block import Block
from onnx_dl.tensors.call_codec import CallCodec, Request
from onnx_dl.tensors.call_plans import CallPlan, EncodedCall
from onnx_dl.transport.adaptive_polling import AdaptivePolling, LastUse
from onnx_dl.transport.affinity import CallMode, CallModes, MeasuredAffinity, ModeChoice, SeparateAffinity
from onnx_dl.transport.call_channel import CallerBellChannel, CallerChannel, Lane
from onnx_dl.transport.doorbell import CallerBell
from onnx_dl.transport.lane_socket import LaneSocket
from onnx_dl.transport.sockets import Channel, fresh_address, same_secret

if TYPE_CHECKING:
    from onnx_dl.transport.zeromq import Context

Reply = codec.Message | int | None
"""A number stands for SameResult; None: the worker went."""

LARGE: Final = 1 << 20
"""Bytes of shared memory that an idle lane may keep."""

_TRIM_TIMEOUT: Final = 0.2

_current_cpu: Final[Callable[[], int]] = linux_only.libc_function(
    "sched_getcpu",
    ctypes.PyDLL,  # it never waits, and another thread would take the interpreter's lock
    otherwise=lambda: -1,
)


_last_use: Final = LastUse()


class ClientLane(Lane[CallerChannel]):
    """The caller's end."""

    def __init__(
        self, ctx: Context | None, granted: control.Granted, deadline: Deadline, *, latency: str
    ) -> None:
        """Open a lane to the worker that was granted.

        ``ctx``: calls go over ZeroMQ; None: over the Unix socket.  ``latency``: "low" polls, "auto" does so
        while that pays (:mod:`onnx_dl.transport.adaptive_polling`); but neither in a program with greenlets,
        which would wait meanwhile.

        Raises:
            DeadlinePassed: the worker did not answer in time.
            OSError: it is gone.
        """
        self.granted = granted
        self.latency = latency
        channel = Channel.connect(granted.address, deadline)
        lane_socket = LaneSocket(channel, lane.lane_reply, keep_descriptors=True)
        reply_to = None if ctx is None else fresh_address("lane")
        calls: CallerChannel
        try:
            if ctx is None or reply_to is None:
                calls = CallerBellChannel(lane_socket, CallerBell())
            else:
                over_zmq = forking.importing("onnx_dl.transport.zmq_channel")
                calls = over_zmq.listening(lane_socket, ctx, reply_to)
        except BaseException:
            channel.close()
            raise
        super().__init__(lane_socket, calls)
        try:
            self._page = self._greet(calls, reply_to)
            self._thread = self._await_opening(deadline)
        except BaseException:
            self.close()
            raise
        self._bell = calls.bell if isinstance(calls, CallerBellChannel) else None
        self._way = CallMode(frozenset(), False)
        self._choice = None if self._bell is None else self._new_choice()
        self.codec = CallCodec(self.arena, self.mappings)
        self._requests = 0
        self._was_sent = False
        """True if the present request was sent, as far as is known."""
        self._sent_at = self._took = 0
        self.last_used = time.perf_counter_ns()
        self.was_large = False
        """:attr:`is_large` when that was looked at last.  A repeated call changes nothing in it."""

    def _greet(self, calls: CallerChannel, reply_to: str | None) -> Block:
        page = self.arena.page()  # travels with the greeting
        hello = lane.LaneHello(
            version=codec.PROTOCOL_VERSION,
            secret=self.granted.secret,
            reply_to=reply_to,
            model=self.granted.model,
        )
        bell = calls.bell if isinstance(calls, CallerBellChannel) else None
        self._lane_socket.send(codec.encode(hello), () if bell is None else bell.descriptors())
        if bell is not None:
            bell.handed_over()
        return page

    def _await_opening(self, deadline: Deadline) -> int:
        """Return the native id of the thread that serves the lane, from the worker's first message.  The
        worker may be stopped, or native code may hold its interpreter's lock."""
        while True:
            try:
                opened = self._calls.next(deadline.step())
                break
            except TimeoutError:
                deadline.check("the worker to open a lane")
        opened = opened or self._lane_socket.next()  # the reason for which there is no lane, if it was sent
        if isinstance(opened, lane.CallFailed):
            raise failures.rebuild(opened.failure)
        if opened is None:
            raise ConnectionError("the worker did not open the lane")
        if not (isinstance(opened, lane.LaneOpen) and same_secret(opened.secret, self.granted.secret)):
            raise ProtocolError("Another process than the worker answered on a lane.")
        return opened.thread

    def exchange(self, request: Request, timeout: float | None = None) -> Reply:
        """Send a request and wait for its reply; see :meth:`send` and :meth:`receive`."""
        self.send(request)
        return self.receive(timeout)

    def repeat(self, number: int) -> Reply:
        """Repeat the call of this plan: :meth:`send` and :meth:`receive` in fewer steps."""
        self._begin()
        reply = self._calls.repeat(number)
        self.last_used = now = time.perf_counter_ns()
        self._took = now - self._sent_at
        if reply is None and self._page.begun != self._requests:
            return lane.Draining()
        return reply

    def send(self, request: Request) -> None:
        """Send a request.  After an exception, KeyboardInterrupt included, close the lane."""
        self._begin()
        if isinstance(request, CallPlan):
            self._was_sent = self._calls.replay(request.number)
        else:
            self._was_sent = self._calls.send(
                request.message if isinstance(request, EncodedCall) else request
            )

    def _begin(self) -> None:
        """Count a request, and choose where the worker's thread runs and whether both ends poll."""
        self._sent_at = now = time.perf_counter_ns()
        self._requests += 1
        follows = _last_use.is_again(id(self))
        if self._choice is not None:
            way = self._choice.next(_current_cpu(), self._took, now - self.last_used, now, follows)
            if way is not self._way:
                self._go(way)
        self._page.ask(self._requests)

    def receive(self, timeout: float | None = None) -> Reply:
        """Return the reply to the request that was sent last; None if the worker went without one.

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

    def receive_early(self, milliseconds: int) -> Reply:
        """Do :meth:`receive` with a timeout in fewer steps, in a program without greenlets."""
        bell = self._bell
        if bell is not None and not bell.polls and self._was_sent and not bell.sleep(milliseconds):
            raise TimeoutError("there is no reply yet")
        return self.receive(None if bell is not None and not bell.polls else milliseconds / 1000)

    def _new_choice(self) -> ModeChoice | None:
        """Return None where there is no choice: the system tells no cores, or the worker has one."""
        may_poll = linux_only.usable_processors() > 1 and not waits.are_cooperative()
        cores: frozenset[int] = frozenset()
        with contextlib.suppress(OSError):
            cores = frozenset(os.sched_getaffinity(self._thread))
        if len(cores) < 2:
            if self.latency == "low" and may_poll:
                self._go(CallMode(self._way.cores, True))
            return None
        ways = CallModes(cores)
        self._way = ways.anywhere
        if self.latency == "low" and may_poll:
            return SeparateAffinity(ways)
        if self.latency == "auto" and may_poll:
            return AdaptivePolling(ways, free_cores.have_one)
        return MeasuredAffinity(ways)

    def _go(self, way: CallMode) -> None:
        """Move the worker's thread, and have both ends poll or sleep."""
        if way.cores != self._way.cores:
            with contextlib.suppress(OSError):  # it is gone, or a core was taken away meanwhile
                os.sched_setaffinity(self._thread, way.cores)
        if self._bell is not None:
            self._bell.polls = way.polls
        self._way = way

    def end_of_this(self) -> lane.Terminate:
        """Return the request, for another lane, that ends the present call of this one."""
        return lane.Terminate(thread=self._thread, request=self._requests)

    @property
    def reply_fd(self) -> int | None:
        """Readable when a reply is there; None if calls go over ZeroMQ."""
        return None if self._bell is None else self._bell.fileno()

    def note_size(self) -> bool:
        """Set and return :attr:`was_large`."""
        self.was_large = self.is_large
        return self.was_large

    @property
    def is_large(self) -> bool:
        """True if both ends keep so much memory that it is worth giving back."""
        memories = self.arena.memories
        if len(memories) or self.codec.loans.are_open:  # the owner of these may wait for their end
            return True
        own = self.arena.nbytes + self.arena.adoptions.nbytes + memories.copied
        return own + self.mappings.nbytes > LARGE

    def trim(self) -> bool:
        """Return the memory of both ends to the system.  False: there was no answer; close the lane."""
        self.codec.plans.clear()
        self.codec.loans.are_open = False
        self.arena.trim()
        try:
            return isinstance(self.exchange(lane.Trim(), _TRIM_TIMEOUT), lane.Result)
        except (OSError, ProtocolError):
            return False

    def is_dead(self) -> bool:
        """True if the worker is gone; does not wait."""
        return self._lane_socket.channel.is_dead()

    def touch(self) -> None:
        """Write the time of a use where the worker reads it before its TTL ends it.  Sends no message."""
        self._page.clock = time.monotonic_ns()
