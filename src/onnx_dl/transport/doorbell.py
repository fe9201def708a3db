"""Wakes the other end of a lane with a number, in as few and as cheap system calls as possible.

The caller rings an eventfd, which cannot raise SIGPIPE in an application.  The worker rings a pipe, whose EOF
tells the caller that the worker is gone.  The worker learns from the lane's socket that a caller is gone; its
main thread then rings in the caller's place.  :mod:`onnx_dl.transport.call_channel` gives the numbers their meaning.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable
from typing import Final

from onnx_dl.concurrency import primitives, waits
from onnx_dl.system.owned_descriptors import Descriptor
from onnx_dl.transport.spin import Patience

_GONE: Final = 1 << 32
"""Greater than any number that a caller rings."""

_BYTES: Final = [bytes([number]) for number in range(256)]


class _Waiter:
    """Waits for numbers on one descriptor.  With ``patience`` it polls for a while before it sleeps."""

    def __init__(
        self,
        fd: int,
        read: Callable[[int], int | None],
        is_ours: Callable[[], bool],
        patience: Patience | None,
    ) -> None:
        """``read``: reads one number, None at the end.  ``is_ours``: whether the number of the descriptor
        still belongs to it."""
        self._fd = fd
        self._read = read
        self._is_ours = is_ours
        self._patience = patience
        self._poll = primitives.poll()
        self._poll.register(fd, select.POLLIN)
        if patience is not None or waits.are_cooperative():
            os.set_blocking(fd, False)

    def wait(self, timeout: float | None = None) -> int | None:
        """Return the number that the other end rang; None if it is gone.

        Raises:
            TimeoutError: nothing rang for ``timeout`` seconds.
        """
        if self._patience is not None:
            return self._wait_patiently(self._patience, timeout)
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

    def _wait_patiently(self, patience: Patience, timeout: float | None) -> int | None:
        started = time.perf_counter()
        deadline = started + patience.budget
        try:
            while time.perf_counter() < deadline:
                try:
                    return self._read(self._fd)
                except BlockingIOError:
                    continue
            return self._wait_and_read(timeout)
        finally:
            patience.note(time.perf_counter() - started)


def _read_pipe(fd: int) -> int | None:
    data = os.read(fd, 1)
    return data[0] if data else None


def _read_eventfd(fd: int) -> int | None:
    number = os.eventfd_read(fd)
    return number if number < _GONE else None


class CallerBell:
    """The caller's end."""

    def __init__(self, patience: Patience | None) -> None:
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC)
        self._ring = Descriptor(self._eventfd)
        self._pipe, workers_end = os.pipe()
        self._reading, self._workers_end = Descriptor(self._pipe), Descriptor(workers_end)
        self._rings_ours, self._reads_ours = self._ring.holds, self._reading.holds  # looked up at each call
        self._waiter = _Waiter(self._pipe, _read_pipe, self._reads_ours, patience)

    def descriptors(self) -> tuple[int, int]:
        """Return the descriptors of the worker's end, to be sent to it."""
        return self._ring.number, self._workers_end.number

    def handed_over(self) -> None:
        """Close our copy of the worker's end of the pipe: it would hide the worker's death."""
        self._workers_end.close()

    def ring(self, number: int) -> bool:
        """Wake the worker with a number from 1 on.  False: the program has closed this end, and the
        descriptors' numbers may be those of its own files."""
        if not (self._rings_ours() and self._reads_ours()):
            return False
        os.eventfd_write(self._eventfd, number)
        return True

    def wait(self, timeout: float | None = None) -> int | None:
        """Return the number that the worker rang; see :meth:`_Waiter.wait`."""
        return self._waiter.wait(timeout)

    def fileno(self) -> int:
        """Return a descriptor that is readable when the worker has rung or is gone."""
        return self._pipe

    def close(self) -> None:
        """Close the descriptors.  May be called twice."""
        for descriptor in (self._ring, self._reading, self._workers_end):
            descriptor.close()


class WorkerBell:
    """The worker's end, made of the descriptors that the caller has sent."""

    def __init__(self, fds: list[int], patience: Patience | None) -> None:
        self._eventfd, self._pipe = fds
        self._waiter = _Waiter(self._eventfd, _read_eventfd, lambda: True, patience)

    def ring(self, number: int) -> bool:
        """Wake the caller with a number from 0 to 255.  Always true: the next wait shows if it is gone."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._pipe, _BYTES[number])
        return True

    def wait(self, timeout: float | None = None) -> int | None:
        """Return the number that the caller rang; see :meth:`_Waiter.wait`."""
        return self._waiter.wait(timeout)

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
