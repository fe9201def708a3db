"""Wakes the other end of a lane with a number, in as few and as cheap system calls as possible.

The caller rings an eventfd, which cannot raise SIGPIPE in an application.  The worker rings a pipe, whose EOF
tells the caller that the worker is gone.  The worker learns from the lane's socket that a caller is gone; its
main thread then rings in the caller's place.  :mod:`onnx_dl.transport.call_channel` gives the numbers their
meaning.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable
from typing import Final

from onnx_dl.concurrency import primitives, waits
from onnx_dl.system.owned_descriptors import Descriptor, are_held

_GONE: Final = 1 << 32
"""Greater than any number that a caller rings."""

_BYTES: Final = [bytes([number]) for number in range(256)]

LONGEST_SPIN: Final = 300e-6
"""Seconds after which every waiter sleeps: the price that an idle lane pays once."""

_WORTH: Final = 0.8 * LONGEST_SPIN
"""Usual wait from which on polling stops.  Far above the waits of one that polls: the waits of a sleeper are
longer by two wake-ups, and must not keep it asleep."""
_MARGIN: Final = 20e-6
_WEIGHT: Final = 1 / 8


class SpinBudget:
    """Time for which a caller with ``latency="low"`` polls before it sleeps: twice the usual wait, at most
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


class _Waiter:
    """Waits for numbers on one descriptor.  With ``spin`` it polls for a while before it sleeps."""

    def __init__(
        self,
        fd: int,
        read: Callable[[int], int | None],
        is_ours: Callable[[], bool],
        spin: SpinBudget | None,
    ) -> None:
        """``read``: reads one number, None at the end.  ``is_ours``: whether the number of the descriptor
        still belongs to it."""
        self._fd = fd
        self._read = read
        self._is_ours = is_ours
        self._spin = spin
        self._poll = primitives.poll()
        self._poll.register(fd, select.POLLIN)
        if spin is not None or waits.are_cooperative():
            os.set_blocking(fd, False)

    def wait(self, timeout: float | None = None) -> int | None:
        """Return the number that the other end rang; None if it is gone.  Raises TimeoutError if nothing
        rang for ``timeout`` seconds."""
        if self._spin is not None:
            return self._spin_and_wait(self._spin, timeout)
        if timeout is not None:
            self._sleep(timeout)
            if not self._is_ours():
                return None
        try:
            return self._read(self._fd)
        except BlockingIOError:  # made non-blocking by uvloop, or by us for greenlets
            return self._wait_and_read(timeout)

    def _wait_and_read(self, timeout: float | None) -> int | None:
        while True:
            self._sleep(timeout)
            if not self._is_ours():
                return None
            with contextlib.suppress(BlockingIOError):  # it was ready for a moment only
                return self._read(self._fd)

    def _sleep(self, timeout: float | None) -> None:
        if not waits.polled(self._poll, self._fd, select.POLLIN, timeout):
            raise TimeoutError("the bell did not ring in time")

    def _spin_and_wait(self, spin: SpinBudget, timeout: float | None) -> int | None:
        started = time.perf_counter()
        deadline = started + spin.seconds
        try:
            while time.perf_counter() < deadline:
                try:
                    return self._read(self._fd)
                except BlockingIOError:
                    continue
            return self._wait_and_read(timeout)
        finally:
            spin.note(time.perf_counter() - started)


def _read_pipe(fd: int) -> int | None:
    data = os.read(fd, 1)
    return data[0] if data else None


def _read_eventfd(fd: int) -> int | None:
    number = os.eventfd_read(fd)
    return number if number < _GONE else None


class CallerBell:
    """The caller's end."""

    def __init__(self, spin: SpinBudget | None) -> None:
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC)
        self._ring = Descriptor(self._eventfd)
        self._pipe, workers_end = os.pipe()
        self._reading, self._workers_end = Descriptor(self._pipe), Descriptor(workers_end)
        self.wait = _Waiter(self._pipe, _read_pipe, self._reading.holds, spin).wait

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
        os.eventfd_write(self._eventfd, number)
        return True

    def fileno(self) -> int:
        """Return a descriptor that is readable when the worker has rung or is gone."""
        return self._pipe

    def close(self) -> None:
        """Close the descriptors.  May be called twice."""
        for descriptor in (self._ring, self._reading, self._workers_end):
            descriptor.close()


class WorkerBell:
    """The worker's end, made of the descriptors that the caller has sent."""

    def __init__(self, fds: list[int], spin: SpinBudget | None) -> None:
        self._eventfd, self._pipe = fds
        self.wait = _Waiter(self._eventfd, _read_eventfd, lambda: True, spin).wait

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
