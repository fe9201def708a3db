"""Who connects, who says nothing, and what happens when there are no descriptors."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterator

import pytest

from onnx_dl.system import descriptor_limits
from onnx_dl.transport.handshakes import GRACE, MOST_SILENT, SILENCE_TIMEOUT, Handshakes, SilentPeers
from onnx_dl.transport.sockets import Channel, fresh_address
from tests.support.waiting import DEADLINE, allowed, eventually

# --- who says nothing --------------------------------------------------------------------------------------


def test_one_that_says_nothing_has_ten_seconds() -> None:
    silence = SilentPeers()
    assert silence.next_deadline() is None
    silence.add(5, pid=1, now=100.0)
    assert silence.next_deadline() == 100.0 + SILENCE_TIMEOUT
    assert silence.overdue(100.0 + SILENCE_TIMEOUT - 0.1) == []
    assert silence.overdue(100.0 + SILENCE_TIMEOUT) == [5]


def test_one_that_speaks_is_not_overdue() -> None:
    silence = SilentPeers()
    silence.add(5, pid=1, now=0.0)
    silence.remove(5)
    silence.remove(6)
    assert silence.overdue(1000.0) == []


def test_of_one_process_only_so_many_may_say_nothing() -> None:
    """The oldest go; those of another process have not done anything."""
    silence = SilentPeers()
    silence.add(1000, pid=2, now=0.0)
    for fd in range(MOST_SILENT + 3):
        silence.add(fd, pid=1, now=0.0)
    assert silence.overdue(GRACE - 0.1) == []
    assert silence.next_deadline() == GRACE
    assert set(silence.overdue(GRACE)) == {0, 1, 2}
    for fd in (0, 1, 2):
        silence.remove(fd)
    assert silence.next_deadline() == SILENCE_TIMEOUT


def test_a_burst_that_speaks_within_a_moment_is_let_in() -> None:
    silence = SilentPeers()
    for fd in range(400):
        silence.add(fd, pid=1, now=fd / 1000)
    assert silence.overdue(GRACE - 0.01) == []


# --- the door ----------------------------------------------------------------------------------------------


class Rig:
    """A door, and those who come to it."""

    def __init__(self, reserve: int = 8) -> None:
        self.address = fresh_address("test")
        self.turned_away: list[str] = []
        self.door = Handshakes(self.address, reserve, self._turn_away)
        self.guests: list[Channel] = []

    def _turn_away(self, channel: Channel, why: str) -> None:
        self.turned_away.append(why)
        channel.send(b"no")

    def connect(self) -> Channel:
        guest = Channel.connect(self.address, DEADLINE)
        self.guests.append(guest)
        return guest

    def spoken(self, count: int) -> list[Channel]:
        found: list[Channel] = []

        def all_there() -> bool:
            found.extend(self.door.ready(time.monotonic()))
            return len(found) >= count

        eventually(all_there, f"{count} have spoken")
        self.guests += found
        return found


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.door.close()
    for guest in rig.guests:
        guest.close()


def test_who_speaks_is_handed_over(rig: Rig) -> None:
    silent, speaker = rig.connect(), rig.connect()
    speaker.send(b"hello")
    (found,) = rig.spoken(1)
    received = found.receive(0)
    assert received is not None and bytes(received[0]) == b"hello"
    assert rig.door.next_deadline() is not None, "the silent one waits"
    rig.door.on_tick(time.monotonic() + SILENCE_TIMEOUT)
    assert silent.receive(allowed(DEADLINE)) is None
    found.send(b"still here")
    assert speaker.receive(allowed(DEADLINE)) is not None


def test_who_has_gone_is_forgotten(rig: Rig) -> None:
    for _ in range(50):
        rig.connect().close()
    eventually(lambda: not rig.door.ready(time.monotonic()) and not rig.door._channels, "all are closed")
    assert rig.door.next_deadline() is None


def test_hundreds_at_once(rig: Rig) -> None:
    for _ in range(400):  # more than the kernel lets wait
        rig.connect().send(b"hello")
        if len(rig.guests) % 100 == 0:
            rig.spoken(100)
    assert not rig.turned_away


@contextlib.contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """This process may have so many more descriptors."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    fillers = []
    highest = max(map(int, os.listdir("/proc/self/fd")))
    while (fd := os.open(os.devnull, os.O_RDONLY)) <= highest:  # no gaps below the limit
        fillers.append(fd)
    os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + count, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in fillers:
            os.close(fd)


def test_the_reserve_is_kept(rig: Rig) -> None:
    """Who says nothing makes way; who comes when there is nobody like that is told why not."""
    guests = [rig.connect() for _ in range(10)]
    with descriptors_left(12):  # the door's own reserve is 8
        rig.door.ready(time.monotonic())
        assert rig.turned_away and "more file descriptors than process" in rig.turned_away[0]
        assert descriptor_limits.free() >= 8
    told = [bytes(answer[0]) for guest in guests if (answer := _heard(guest))]
    assert told == [b"no"] * len(rig.turned_away)


def _heard(guest: Channel) -> tuple[memoryview, list[int]] | None:
    try:
        return guest.receive(0)
    except TimeoutError:
        return None


def test_with_no_descriptor_at_all_nobody_knocks_for_ever(rig: Rig) -> None:
    guest = rig.connect()
    with descriptors_left(0):
        rig.door.ready(time.monotonic())
        assert rig.turned_away
    assert guest.receive(allowed(DEADLINE)) is not None
    rig.connect().send(b"hello")  # and afterwards all is as it was
    rig.spoken(1)
