"""Accepts connections and keeps them until they send their first message.

Limits how many may be silent and for how long, and handles the lack of descriptors.  The owner of this
object reads the first message.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import select
from collections.abc import Callable
from typing import Final, TypeVar

from onnx_dl.system import descriptor_limits, process_setup
from onnx_dl.transport.sockets import Channel, Listener, close_all

SILENCE_TIMEOUT: Final = 10.0
"""Seconds within which a connection must send something."""
MOST_SILENT: Final = 16
"""Connections of one process that may be silent for longer than :data:`GRACE`."""
GRACE: Final = 1.0
"""Seconds of silence that every connection has: hundreds of threads that connect at once need a moment."""
_BATCH: Final = 64
"""Connections that are accepted in one go."""


_T = TypeVar("_T")


class SilentPeers:
    """Connections that have sent nothing yet, by descriptor.  Pure: the caller passes the time."""

    def __init__(self) -> None:
        self._peers: dict[int, tuple[float, int]] = {}
        """Time of each connection, by which they are ordered, and process id of its peer."""

    def add(self, fd: int, pid: int, now: float) -> None:
        """Add a connection of process ``pid``."""
        self._peers[fd] = now, pid

    def remove(self, fd: int) -> None:
        """Remove a connection that has sent something or is gone."""
        self._peers.pop(fd, None)

    def oldest(self) -> int | None:
        """Return the connection that has been silent for longest."""
        return next(iter(self._peers), None)

    def overdue(self, now: float) -> list[int]:
        """Return the connections that must be closed."""
        return [fd for fd, at in self._deadlines().items() if at <= now]

    def next_deadline(self) -> float | None:
        """Return when the next connection is overdue; None: there are none."""
        return min(self._deadlines().values(), default=None)

    def _deadlines(self) -> dict[int, float]:
        """Return when each is overdue: the latest ones of a process have more time than its others."""
        ends = {}
        later: collections.Counter[int] = collections.Counter()
        for fd, (since, pid) in reversed(self._peers.items()):
            later[pid] += 1
            ends[fd] = since + (SILENCE_TIMEOUT if later[pid] <= MOST_SILENT else GRACE)
        return ends


class SpareDescriptor:
    """A descriptor that is closed to accept and reject a connection when no other is left: one that is not
    accepted would wake this process for ever."""

    def __init__(self) -> None:
        """Raises OSError if this process may have no more descriptors."""
        self._fd: int | None = process_setup.open_null()

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def accept_all(
        self, accept: Callable[[], _T | None], admit: Callable[[_T], object], reject: Callable[[_T], object]
    ) -> bool:
        """Admit the waiting connections.  If there is no descriptor for one, reject one.

        ``accept``: returns a connection; None: there is none, or no descriptor for it.  False: none was
        admitted.
        """
        count = 0
        while count < _BATCH and (connection := accept()) is not None:
            count += 1
            admit(connection)
        if not count and not descriptor_limits.free():
            self.close()
            if (connection := accept()) is not None:
                reject(connection)
        if self._fd is None:
            with contextlib.suppress(OSError):
                self._fd = process_setup.open_null()
        return bool(count)


class Handshakes:
    """Listens at an address.  Has one descriptor to poll for all connections."""

    def __init__(self, address: str, reserve: int, turn_away: Callable[[Channel, str], object]) -> None:
        """
        Args:
            reserve: descriptors that must stay free; with fewer, connections are rejected.
            turn_away: sends a connection the reason of its rejection; it is closed afterwards.

        Raises:
            OSError: this process may have no more descriptors.
        """
        self._listener = Listener(address)
        self._reserve = reserve
        self._turn_away = turn_away
        self._spare = SpareDescriptor()
        self._silent = SilentPeers()
        self._channels: dict[int, Channel] = {}
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)

    def fileno(self) -> int:
        """Readable when :meth:`ready` has something to do."""
        return self._epoll.fileno()

    def ready(self, now: float) -> list[Channel]:
        """Accept new connections; return those that have sent something, which now belong to the caller."""
        found = self._speakers()
        admit = functools.partial(self._admit, now)
        if self._spare.accept_all(self._listener.accept, admit, self._reject):
            found += self._speakers()
        return found

    def next_deadline(self) -> float | None:
        """Return when :meth:`on_tick` has something to do."""
        return self._silent.next_deadline()

    def on_tick(self, now: float) -> None:
        """Close the connections that have been silent for too long."""
        for fd in self._silent.overdue(now):
            self._release(fd).close()

    def close(self) -> None:
        self._listener.close()
        for fd in list(self._channels):
            self._release(fd).close()
        self._epoll.close()
        self._spare.close()

    def _speakers(self) -> list[Channel]:
        ready = [fd for fd, _ in self._epoll.poll(0) if fd in self._channels]
        found = [self._release(fd) for fd in ready]
        for channel in found:
            if channel.is_dead():
                channel.close()
        return [channel for channel in found if channel.fileno() >= 0]

    def _release(self, fd: int) -> Channel:
        self._epoll.unregister(fd)
        self._silent.remove(fd)
        return self._channels.pop(fd)

    def _admit(self, now: float, channel: Channel) -> None:
        if descriptor_limits.free() < self._reserve and (oldest := self._silent.oldest()) is not None:
            self._reject(self._release(oldest))  # silent connections are closed first
        if descriptor_limits.free() < self._reserve:
            self._reject(channel)
            return
        fd = channel.fileno()
        self._channels[fd] = channel
        self._silent.add(fd, channel.peer_pid(), now)
        self._epoll.register(fd, select.EPOLLIN)

    def _reject(self, channel: Channel) -> None:
        with contextlib.suppress(OSError):  # TimeoutError, if it has sent nothing
            # Unread data at a close would make the peer see a reset instead of the reason.
            if (received := channel.receive(0)) is not None:
                close_all(received[1])
        with contextlib.suppress(OSError):
            self._turn_away(channel, str(descriptor_limits.exhausted("A connection")))
        channel.close()
