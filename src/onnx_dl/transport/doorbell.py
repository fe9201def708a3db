"""Wakes the other end of a lane with a number, in as few and as cheap system calls as possible.

The caller rings an eventfd, which cannot raise SIGPIPE in an application.  The worker rings a pipe, whose EOF
tells the caller that the worker is gone.  The worker learns from the lane's socket that a caller is gone; its
main thread then rings in the caller's place.  :mod:`onnx_dl.transport.call_channel` gives the numbers their
meaning.
"""

from __future__ import annotations

import abc
import contextlib
import os
import select
import time
from collections.abc import Callable
from typing import Final

from onnx_dl.concurrency import forking, primitives, waits
from onnx_dl.system.owned_descriptors import Descriptor, are_held

_POLL: Final = 1 << 31
"""Added to a caller's number: the worker is to poll for the next one.  Greater than any other number."""
_GONE: Final = 1 << 32
"""Greater than any number that a caller rings."""
_REST: Final = 16
"""Numbers for which a worker sleeps that another lane has disturbed."""

_BYTES: Final = [bytes([number]) for number in range(256)]

LONGEST_SPIN: Final = 300e-6
"""Seconds after which every waiter sleeps: the price that an idle lane pays once."""

_WORTH: Final = 0.8 * LONGEST_SPIN
"""Usual wait from which on polling stops.  Far above the waits of one that polls: the waits of a sleeper are
longer by two wake-ups, and must not keep it asleep."""
_YIELD_EVERY: Final = 20e-6
"""Seconds after which one that polls lets other threads have its core."""
_MARGIN: Final = 20e-6
_WEIGHT: Final = 1 / 8


class SpinBudget:
    """Time for which one that polls does so before it sleeps: twice the usual wait, at most
    :data:`LONGEST_SPIN`, and none if messages take so long that sleeping is as good.  Pure."""

    def __init__(self) -> None:
        self._usual = LONGEST_SPIN / 4

    @property
    def seconds(self) -> float:
        """Seconds to poll for the next message; 0.0: sleep at once."""
        return min(2 * self._usual + _MARGIN, LONGEST_SPIN) if self._usual < _WORTH else 0.0

    def note(self, waited: float) -> None:
        """Record that a message came after this many seconds.  A long silence counts little more than a short
        one, so that polling resumes soon after it."""
        self._usual += (min(waited, 2 * LONGEST_SPIN) - self._usual) * _WEIGHT


class _Waiter(abc.ABC):
    """Waits for numbers on one descriptor.  While ``polls``, it polls for a while before it sleeps."""

    def __init__(self, fd: int, is_ours: Callable[[], bool]) -> None:
        """``is_ours``: whether the number of the descriptor still belongs to it."""
        self._fd = fd
        self._is_ours = is_ours
        self._polls = False
        self._spin = SpinBudget()
        self._poll = primitives.poll()
        self._poll.register(fd, select.POLLIN)
        self.sleep = self._poll.poll
        self._is_cooperative = waits.are_cooperative()
        if self._is_cooperative:
            os.set_blocking(fd, False)

    @property
    def polls(self) -> bool:
        """True if the next wait begins with polling."""
        return self._polls

    @polls.setter
    def polls(self, value: bool) -> None:
        if value != self._polls and self._is_ours():
            # One that sleeps spares a system call if its read may block.
            os.set_blocking(self._fd, not value and not self._is_cooperative)
            self._polls = value

    @abc.abstractmethod
    def _read(self) -> int | None:
        """Read one number; None at the end."""

    def wait(self, timeout: float | None = None) -> int | None:
        """Return the number that the other end rang; None if it is gone.  Raises TimeoutError if nothing
        rang for ``timeout`` seconds."""
        if self._polls:
            return self._spin_and_wait(timeout)
        if timeout is not None:
            self._sleep(timeout)
            if not self._is_ours():
                return None
        try:
            return self._read()
        except BlockingIOError:  # made non-blocking by uvloop, or by us for greenlets
            return self._wait_and_read(timeout)

    def _wait_and_read(self, timeout: float | None) -> int | None:
        while True:
            self._sleep(timeout)
            if not self._is_ours():
                return None
            with contextlib.suppress(BlockingIOError):  # it was ready for a moment only
                return self._read()

    def _sleep(self, timeout: float | None) -> None:
        if not waits.polled(self._poll, self._fd, select.POLLIN, timeout):
            raise TimeoutError("the bell did not ring in time")

    def _spin_and_wait(self, timeout: float | None) -> int | None:
        """Poll, and give the core away from time to time: a thread that has work, such as onnxruntime's,
        would otherwise wait until the scheduler takes the core from us."""
        clock = time.perf_counter
        started = now = clock()
        deadline, next_yield = started + self._spin.seconds, started + _YIELD_EVERY
        try:
            while now < deadline:
                try:
                    return self._read()
                except BlockingIOError:
                    now = clock()
                if now >= next_yield:
                    os.sched_yield()
                    next_yield = now + _YIELD_EVERY
            return self._wait_and_read(timeout)
        finally:
            self._spin.note(clock() - started)


class _ReplyWaiter(_Waiter):
    def _read(self) -> int | None:
        data = os.read(self._fd, 1)
        return data[0] if data else None


class _RequestWaiter(_Waiter):
    """Polls if the caller says so with the number before."""

    _rests = 0

    def _read(self) -> int | None:
        number = os.eventfd_read(self._fd)
        if number < _POLL:
            self.polls = False
            return number
        if number >= _GONE:
            return None
        self._rests -= self._rests > 0
        self.polls = not self._rests
        return number - _POLL

    def rest(self) -> None:
        """Sleep for some numbers."""
        self._rests, self.polls = _REST, False


class CallerBell:
    """The caller's end."""

    def __init__(self) -> None:
        # A child that another thread forks before the worker's end has an owner would keep it open: the death
        # of the worker would not show, and a call would wait for ever.
        with forking.still():
            self._eventfd = os.eventfd(0, os.EFD_CLOEXEC)
            self._ring = Descriptor(self._eventfd)
            self._pipe, workers_end = os.pipe()
            self._reading, self._workers_end = Descriptor(self._pipe), Descriptor(workers_end)
        self._waiter = _ReplyWaiter(self._pipe, self._reading.holds)
        self.wait = self._waiter.wait
        self._added = 0

    @property
    def polls(self) -> bool:
        """True if both ends poll for each other, from the next number on."""
        return self._waiter.polls

    @polls.setter
    def polls(self, value: bool) -> None:
        self._waiter.polls = value
        self._added = _POLL if value else 0

    def descriptors(self) -> tuple[int, int]:
        """Return the descriptors of the worker's end, to be sent to it."""
        return self._ring.number, self._workers_end.number

    def handed_over(self) -> None:
        """Close our copy of the worker's end of the pipe: it would hide the worker's death."""
        self._workers_end.close()

    def ring(self, number: int) -> bool:
        """Wake the worker with a number from 1 on.  False: the program has closed this end, and the
        descriptors' numbers may be those of its own files."""
        if not are_held(self._ring, self._reading):
            return False
        os.eventfd_write(self._eventfd, number + self._added)
        return True

    def sleep(self, milliseconds: int) -> bool:
        """Sleep until the worker has rung or is gone; false after that time.  In few steps, and for a program
        without greenlets."""
        return bool(self._waiter.sleep(milliseconds))

    def fileno(self) -> int:
        """Return a descriptor that is readable when the worker has rung or is gone."""
        return self._pipe

    def close(self) -> None:
        """Close the descriptors.  May be called twice."""
        for descriptor in (self._ring, self._reading, self._workers_end):
            descriptor.close()


class WorkerBell:
    """The worker's end, made of the descriptors that the caller has sent."""

    def __init__(self, fds: list[int]) -> None:
        self._eventfd, self._pipe = fds
        self._waiter = _RequestWaiter(self._eventfd, lambda: True)
        self.wait = self._waiter.wait

    @property
    def polls(self) -> bool:
        """True if the next wait begins with polling."""
        return self._waiter.polls

    def rest(self) -> None:
        """Sleep for some numbers also if the caller polls: other lanes of this process are busy, too."""
        self._waiter.rest()

    def ring(self, number: int) -> bool:
        """Wake the caller with a number from 0 to 255.  Always true: the next wait shows if it is gone."""
        try:  # noqa: SIM105  # contextlib.suppress() takes as long as the system call
            os.write(self._pipe, _BYTES[number])
        except BrokenPipeError:
            pass
        return True

    def hang_up(self) -> None:
        """End the wait of the lane's thread, called by another thread that knows that the caller is gone.
        Does not wait: if the eventfd has no room for the number, the one that will be read is as large."""
        os.set_blocking(self._eventfd, False)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._eventfd, _GONE)

    def close(self) -> None:
        """Close the descriptors."""
        primitives.close(self._eventfd)
        primitives.close(self._pipe)
