"""The socket between two processes of a server: whole messages, descriptors, and ends."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest

from onnx_dl.server.interfaces import IndexRow, RegionStatus, ServedTable
from onnx_dl.server.processes import messages as m
from onnx_dl.server.processes.link import Link, Tickets
from tests.support.waiting import DEADLINE, allowed

HEAD = struct.Struct("<II")
LARGE = ServedTable(rows=[IndexRow(f"model {number}", "1", "READY", "r" * 200) for number in range(20_000)])


class End:
    """One end of a pair, and what came there."""

    def __init__(self, sock: socket.socket, kind: Any) -> None:
        self.messages: asyncio.Queue[tuple[Any, list[int]]] = asyncio.Queue()
        self.losses = 0
        self.lost = asyncio.Event()
        self.link: Link[Any] = Link(sock, msgspec.msgpack.Decoder(kind), self._take, self._on_lost)

    def _take(self, message: Any, fds: list[int]) -> None:
        self.messages.put_nowait((message, fds))

    def _on_lost(self) -> None:
        self.losses += 1
        self.lost.set()

    async def next(self) -> tuple[Any, list[int]]:
        async with asyncio.timeout(allowed(DEADLINE)):
            return await self.messages.get()

    async def end(self) -> None:
        async with asyncio.timeout(allowed(DEADLINE)):
            await self.lost.wait()


def run(test: Callable[[End, End], Coroutine[Any, Any, None]]) -> None:
    """Runs a test with the owner's end and a child's end."""

    async def whole() -> None:
        ours, theirs = socket.socketpair()
        owner, child = End(ours, m.ToOwner), End(theirs, m.ToChild)
        try:
            await test(owner, child)
        finally:
            owner.link.close()
            child.link.close()

    asyncio.run(whole())


def run_raw(test: Callable[[socket.socket, End], Coroutine[Any, Any, None]]) -> None:
    """Runs a test with a plain socket and a child's end."""

    async def whole() -> None:
        ours, theirs = socket.socketpair()
        child = End(theirs, m.ToChild)
        with ours:
            try:
                await test(ours, child)
            finally:
                child.link.close()

    asyncio.run(whole())


def content(fd: int) -> bytes:
    """What a descriptor leads to, which is closed."""
    try:
        return os.pread(fd, 100, 0)
    finally:
        os.close(fd)


def file(text: bytes) -> int:
    fd = os.memfd_create("test")
    os.write(fd, text)
    return fd


def test_messages_arrive_whole_and_in_order() -> None:
    async def test(owner: End, child: End) -> None:
        owner.link.send(m.UseTable(ticket=1, table=LARGE))
        owner.link.send(m.AskCounts(ticket=2))
        first, fds = await child.next()
        assert first == m.UseTable(ticket=1, table=LARGE) and fds == []
        assert (await child.next())[0] == m.AskCounts(ticket=2)
        child.link.send(m.Taken(ticket=1))
        assert (await owner.next())[0] == m.Taken(ticket=1)

    run(test)


def test_descriptors_come_with_their_message() -> None:
    async def test(owner: End, child: End) -> None:
        region = RegionStatus("a", "/a", 0, 1)
        for number in range(20):  # beside messages that do not fit at once
            fd = file(b"%d" % number)
            owner.link.send(m.UseTable(ticket=number, table=LARGE))
            owner.link.send(m.UseRegion(ticket=number, region=region), [fd, fd])
            os.close(fd)
        for number in range(20):
            assert (await child.next())[1] == []
            message, fds = await child.next()
            assert message.ticket == number
            assert [content(fd) for fd in fds] == [b"%d" % number] * 2

    run(test)


def test_the_end_of_a_process_is_told_once() -> None:
    async def test(owner: End, child: End) -> None:
        owner.link.send(m.Drain(seconds=1.0))
        owner.link.close()
        owner.link.close()
        assert (await child.next())[0] == m.Drain(seconds=1.0)  # what it has sent arrives
        await child.end()
        child.link.send(m.Listening())
        await asyncio.sleep(0)
        assert (child.losses, owner.losses) == (1, 0)

    run(test)


def test_descriptors_that_are_not_sent_are_closed() -> None:
    async def test(owner: End, child: End) -> None:
        before = len(os.listdir("/proc/self/fd"))
        fd = file(b"x")
        for number in range(10):
            owner.link.send(m.UseTable(ticket=number, table=LARGE), [fd])
        os.close(fd)
        owner.link.close()
        child.link.close()
        assert len(os.listdir("/proc/self/fd")) == before - 2

    run(test)


@pytest.mark.parametrize(
    "data",
    [
        HEAD.pack(5, 0) + b"\xc1" * 5,  # no msgpack
        HEAD.pack(1, 0) + b"\x80",  # a map without a type
        HEAD.pack(1 << 31, 0),
        HEAD.pack(1, 1 << 20) + b"\x80",
        HEAD.pack(23, 1)
        + msgspec.msgpack.encode({"type": "AskCounts", "ticket": 1}),  # its descriptor is missing
        HEAD.pack(26, 0) + msgspec.msgpack.encode({"type": "AskCounts", "ticket": "one"}),
        HEAD.pack(13, 0) + msgspec.msgpack.encode({"type": "Unknown"}),
    ],
)
def test_what_is_no_message_ends_the_link(data: bytes) -> None:
    async def test(sock: socket.socket, child: End) -> None:
        sock.sendall(data)
        await child.end()
        assert child.messages.empty() and not child.link.is_open

    run_raw(test)


def test_a_message_that_cannot_be_handled_ends_the_link(caplog: pytest.LogCaptureFixture) -> None:
    async def test(owner: End, child: End) -> None:
        child.messages = asyncio.Queue(maxsize=1)
        for ticket in range(3):  # the second finds no room
            owner.link.send(m.AskCounts(ticket=ticket))
        await child.end()
        await owner.end()

    run(test)
    assert "QueueFull" in caplog.text


def test_a_message_in_single_bytes() -> None:
    async def test(sock: socket.socket, child: End) -> None:
        body = msgspec.msgpack.encode(m.AskCounts(ticket=7))
        for byte in HEAD.pack(len(body), 0) + body:
            sock.sendall(bytes([byte]))
            await asyncio.sleep(0)
        assert (await child.next())[0] == m.AskCounts(ticket=7)

    run_raw(test)


def test_tickets_are_answered_once_and_forgotten() -> None:
    async def test() -> None:
        tickets = Tickets()
        first, one = tickets.open()
        second, two = tickets.open()
        third, three = tickets.open()
        assert len({first, second, third}) == 3
        tickets.answer(second, "b")
        tickets.answer(second, "again")
        tickets.answer(99, "nobody")
        three.cancel()
        tickets.answer(third, "too late")
        assert await two == "b"
        tickets.fail(RuntimeError("gone"))
        with pytest.raises(RuntimeError, match="gone"):
            await one
        await asyncio.sleep(0)
        assert not tickets._waiting

    asyncio.run(test())
