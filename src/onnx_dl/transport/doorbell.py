"""Wakes the other end of a lane with a number, in the fewest and cheapest system calls there are.

The caller rings an eventfd, which cannot raise SIGPIPE in an application; the worker rings a pipe, whose EOF
tells the caller that the worker is gone.  That a caller is gone, the worker learns from the lane's socket:
its main thread then rings for it.  What numbers mean is :mod:`onnx_dl.transport.call_channel`'s.
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
"""More than any number that a caller rings."""

_BYTES: Final = [bytes([number]) for number in range(256)]


class _Waiter:
    """Waits on one descriptor.  With ``patience`` it looks again and again for a while before it sleeps."""

    def __init__(self, fd: int, patience: Patience | None) -> None:
        self._fd = fd
        self._is_ours: Callable[[], bool] = lambda: True
        """Whether the descriptor still is what it was."""
        self._patience = patience
        self._poll = primitives.poll()
        self._poll.register(fd, select.POLLIN)
        if patience is not None or waits.are_cooperative():
            os.set_blocking(fd, False)

    def wait(self, timeout: float | None = None) -> int | None:
        """The number that the other end rang; None if it is gone.

        Raises:
            TimeoutError: nobody rang for ``timeout`` seconds.
        """
        if self._patience is not None:
            return self._wait_patiently(self._patience, timeout)
        if timeout is not None:
            self._sleep(timeout)
            if not self._is_ours():
                return None
        try:
            return self._read()
        except BlockingIOError:  # uvloop has made it non-blocking, or we did for greenlets
            return self._wait_and_read(timeout)

    def _wait_and_read(self, timeout: float | None) -> int | None:
        while True:
            self._sleep(timeout)
            if not self._is_ours():
                return None
            with contextlib.suppress(BlockingIOError):  # it was ready for a moment only
                return self._read()

    def _read(self) -> int | None:
        raise NotImplementedError

    def _sleep(self, timeout: float | None) -> None:
        if not waits.polled(self._poll, self._fd, select.POLLIN, timeout):
            raise TimeoutError("nobody rang in time")

    def _wait_patiently(self, patience: Patience, timeout: float | None) -> int | None:
        started = time.perf_counter()
        deadline = started + patience.budget
        try:
            while time.perf_counter() < deadline:
                try:
                    return self._read()
                except BlockingIOError:
                    continue
            return self._wait_and_read(timeout)
        finally:
            patience.note(time.perf_counter() - started)


class CallerBell(_Waiter):
    """The caller's end."""

    def __init__(self, patience: Patience | None) -> None:
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC)
        self._ring = Descriptor(self._eventfd)
        hears, workers_end = os.pipe()
        self._hears, self._workers_end = Descriptor(hears), Descriptor(workers_end)
        super().__init__(hears, patience)
        self._rings_ours, self._is_ours = self._ring.holds, self._hears.holds  # looked up at each call

    def descriptors(self) -> tuple[int, int]:
        """What the worker's end is made of; to be sent to it."""
        return self._ring.number, self._workers_end.number

    def handed_over(self) -> None:
        """The worker has its end: ours of the pipe would hide its death."""
        self._workers_end.close()

    def ring(self, number: int) -> bool:
        """Wakes the worker with a number from 1 on.  False: the program has closed this end, and the numbers
        may be those of its own files."""
        if not (self._rings_ours() and self._is_ours()):
            return False
        os.eventfd_write(self._eventfd, number)
        return True

    def fileno(self) -> int:
        """Readable when the worker rang or is gone."""
        return self._fd

    def _read(self) -> int | None:
        data = os.read(self._fd, 1)
        return data[0] if data else None

    def close(self) -> None:
        """Gives up the descriptors.  May be called twice."""
        for descriptor in (self._ring, self._hears, self._workers_end):
            descriptor.close()


class WorkerBell(_Waiter):
    """The worker's end, made of what came from the caller."""

    def __init__(self, fds: list[int], patience: Patience | None) -> None:
        self._eventfd, self._pipe = fds
        super().__init__(self._eventfd, patience)

    def ring(self, number: int) -> bool:
        """Wakes the caller with a number from 0 to 255.  That it is gone shows when it is waited for."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._pipe, _BYTES[number])
        return True

    def hang_up(self) -> None:
        """For another thread that knows that the caller is gone.

        It does not wait: where there is no room for the number, the one that will be read is as large.
        """
        os.set_blocking(self._eventfd, False)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._eventfd, _GONE)

    def _read(self) -> int | None:
        number = os.eventfd_read(self._eventfd)
        return number if number < _GONE else None

    def close(self) -> None:
        """Gives up the descriptors."""
        primitives.close(self._eventfd)
        primitives.close(self._pipe)
