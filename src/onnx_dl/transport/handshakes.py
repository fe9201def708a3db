"""Where other processes connect, and wait until they have said something.

Covers how many may be there, how long one may say nothing, and what happens when descriptors run out.  What
they say is for whoever takes them over.
"""

from __future__ import annotations

import collections
import contextlib
import os
import select
from collections.abc import Callable
from typing import Final, NamedTuple

from onnx_dl.system import descriptor_limits, process_setup
from onnx_dl.transport.sockets import Channel, Listener, close_all

PATIENCE: Final = 10.0
"""Seconds in which a connection must have said something."""
MOST_SILENT: Final = 16
"""Connections of one process that may say nothing for longer than :data:`BRIEF`."""
BRIEF: Final = 1.0
"""Seconds that do not count: hundreds of threads that connect at once need a moment until each has spoken."""
_BATCH: Final = 64
"""Connections that are accepted before anything else is looked at."""


class _Guest(NamedTuple):
    since: float
    peer: int


class Silence:
    """Who has connected and said nothing, by descriptor.  Pure: times are handed in."""

    def __init__(self) -> None:
        self._guests: dict[int, _Guest] = {}
        """In the order in which they came."""

    def came(self, fd: int, peer: int, now: float) -> None:
        """``peer``: the process at the other end."""
        self._guests[fd] = _Guest(now, peer)

    def left(self, fd: int) -> None:
        """It has spoken, or is gone."""
        self._guests.pop(fd, None)

    def oldest(self) -> int | None:
        """Who has been silent for longest."""
        return next(iter(self._guests), None)

    def overdue(self, now: float) -> list[int]:
        """Who is to be closed."""
        return [fd for fd, at in self._ends().items() if at <= now]

    def next_deadline(self) -> float | None:
        """When somebody will be overdue; None: nobody is silent."""
        return min(self._ends().values(), default=None)

    def _ends(self) -> dict[int, float]:
        """When each is overdue: of one process, all but the latest ones soon."""
        ends = {}
        later: collections.Counter[int] = collections.Counter()
        for fd, (since, peer) in reversed(self._guests.items()):
            later[peer] += 1
            ends[fd] = since + (PATIENCE if later[peer] <= MOST_SILENT else BRIEF)
        return ends


class Door:
    """Listens at an address.  One descriptor to poll, however many have connected."""

    def __init__(self, address: str, reserve: int, turn_away: Callable[[Channel, str], object]) -> None:
        """
        Args:
            reserve: descriptors that must stay free; with fewer, who comes is turned away.
            turn_away: tells one that comes why it is not let in; it is closed afterwards.

        Raises:
            OSError: this process may have no more descriptors.
        """
        self._listener = Listener(address)
        self._reserve = reserve
        self._turn_away = turn_away
        self._spare: int | None = process_setup.nothing()
        """Given up for a moment when there is no other to accept with: who knocks would knock for ever."""
        self._silence = Silence()
        self._channels: dict[int, Channel] = {}
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)

    def fileno(self) -> int:
        """Readable when :meth:`spoken` has something to do."""
        return self._epoll.fileno()

    def spoken(self, now: float) -> list[Channel]:
        """Lets in who connects; those that have said something, which belong to the caller from now on."""
        found = self._heard()
        if self._accept(now):
            found += self._heard()
        return found

    def next_deadline(self) -> float | None:
        """When :meth:`on_tick` has something to do."""
        return self._silence.next_deadline()

    def on_tick(self, now: float) -> None:
        """Closes those that have said nothing for too long."""
        for fd in self._silence.overdue(now):
            self._release(fd).close()

    def close(self) -> None:
        self._listener.close()
        for fd in list(self._channels):
            self._release(fd).close()
        self._epoll.close()
        if self._spare is not None:
            os.close(self._spare)

    def _heard(self) -> list[Channel]:
        ready = [fd for fd, _ in self._epoll.poll(0) if fd in self._channels]
        found = [self._release(fd) for fd in ready]
        for channel in found:
            if channel.is_dead():
                channel.close()
        return [channel for channel in found if channel.fileno() >= 0]

    def _release(self, fd: int) -> Channel:
        self._epoll.unregister(fd)
        self._silence.left(fd)
        return self._channels.pop(fd)

    def _accept(self, now: float) -> bool:
        """Whether somebody came."""
        count = 0
        while count < _BATCH and (channel := self._listener.accept()) is not None:
            count += 1
            self._let_in(channel, now)
        if not count and not descriptor_limits.free():
            self._accept_with_the_spare()
        return bool(count)

    def _let_in(self, channel: Channel, now: float) -> None:
        if descriptor_limits.free() < self._reserve and (oldest := self._silence.oldest()) is not None:
            self._dismiss(self._release(oldest))  # who says nothing makes way
        if descriptor_limits.free() < self._reserve:
            self._dismiss(channel)
            return
        fd = channel.fileno()
        self._channels[fd] = channel
        self._silence.came(fd, channel.peer_pid(), now)
        self._epoll.register(fd, select.EPOLLIN)

    def _dismiss(self, channel: Channel) -> None:
        with contextlib.suppress(OSError):  # TimeoutError, if it has said nothing
            # What is unread when a socket is closed has the other end see a reset, and not why.
            if (said := channel.receive(0)) is not None:
                close_all(said[1])
        with contextlib.suppress(OSError):
            self._turn_away(channel, str(descriptor_limits.exhausted("A connection")))
        channel.close()

    def _accept_with_the_spare(self) -> None:
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
        if (channel := self._listener.accept()) is not None:
            self._dismiss(channel)
        with contextlib.suppress(OSError):  # the next time there may be one
            self._spare = process_setup.nothing()
