"""The supervisor's control socket, with libzmq's DEALERs at the other end."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import zmq

from onnx_dl.errors import ProtocolError
from onnx_dl.transport import zeromq, zmtp
from onnx_dl.transport.handshakes import SILENCE_TIMEOUT
from onnx_dl.transport.router import MOST_UNREAD, Router
from onnx_dl.transport.sockets import fresh_address
from tests.support.waiting import DEADLINE, allowed, eventually

NAME = b"0123456789abcdef"
SIZES = [0, 1, 255, 256, 70_000, 5_000_000]


class Rig:
    """A router that expects these names, and DEALERs."""

    def __init__(self, expected: set[bytes]) -> None:
        self.address = fresh_address("test")
        self.expected = expected
        self.router = Router(self.address, 8, self.expected.__contains__)
        self.context = zmq.Context()
        self.dealers: list[zmq.Socket[bytes]] = []
        self.heard: list[tuple[bytes, bytes]] = []

    def dealer(self, name: bytes) -> zmq.Socket[bytes]:
        dealer = zeromq.dealer(self.context, self.address, name)
        self.dealers.append(dealer)
        return dealer

    def stranger(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(f"\0{self.address}")
        return sock

    def hear(self, count: int) -> list[tuple[bytes, bytes]]:
        """Everything that was heard, when it is so many messages."""

        def all_there() -> bool:
            self.heard += self.router.receive(time.monotonic())
            return len(self.heard) >= count

        eventually(all_there, f"{count} messages")
        return self.heard

    def attend(self) -> bool:
        self.heard += self.router.receive(time.monotonic())
        return True


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig({NAME, b"other"})
    yield rig
    rig.router.close(0)
    for dealer in rig.dealers:
        dealer.close(0)
    rig.context.term()


def closed(rig: Rig, sock: socket.socket) -> bool:
    """Whether the router has ended this connection."""
    rig.attend()
    sock.setblocking(False)
    try:
        return not sock.recv(4096)
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True


# --- messages ----------------------------------------------------------------------------------------------


def test_messages_of_all_sizes_both_ways(rig: Rig) -> None:
    dealer = rig.dealer(NAME)
    sent = [bytes([i]) * size for i, size in enumerate(SIZES)]
    for data in sent:
        dealer.send(data)
    assert rig.hear(len(SIZES)) == [(NAME, data) for data in sent]
    for data in sent:
        rig.router.send(NAME, data)
    got = []
    while len(got) < len(sent):
        rig.attend()  # what the socket did not take at once
        with contextlib.suppress(zmq.Again):
            got.append(dealer.recv(zmq.NOBLOCK))
    assert got == sent


def test_each_hears_what_is_meant_for_it(rig: Rig) -> None:
    dealers = {name: rig.dealer(name) for name in (NAME, b"other")}
    for name, dealer in dealers.items():
        dealer.send(b"from " + name)
    assert sorted(rig.hear(2)) == sorted((name, b"from " + name) for name in dealers)
    for name, dealer in dealers.items():
        rig.router.send(name, b"to " + name)
        assert dealer.recv() == b"to " + name


def test_what_a_peer_said_before_its_end_is_heard(rig: Rig) -> None:
    dealer = rig.dealer(NAME)
    dealer.send(b"hello")
    rig.hear(1)
    dealer.linger = 5000
    dealer.send(b"last words")
    dealer.close()
    assert rig.hear(2)[1] == (NAME, b"last words")
    eventually(lambda: rig.attend() and not rig.router._peers, "the end of the connection")
    again = rig.dealer(NAME)  # the name is free again
    again.send(b"back")
    assert rig.hear(3)[2] == (NAME, b"back")


def test_what_is_sent_last_is_taken(rig: Rig) -> None:
    dealer = rig.dealer(NAME)
    dealer.send(b"hello")
    rig.hear(1)
    rig.router.send(NAME, bytes(3_000_000))
    rig.router.send(NAME, b"bye")
    rig.router.close(DEADLINE)
    assert len(dealer.recv()) == 3_000_000
    assert dealer.recv() == b"bye"
    rig.router = Router(rig.address, 8, rig.expected.__contains__)


def test_nobody_of_this_name(rig: Rig) -> None:
    rig.router.send(b"nobody", b"is dropped")
    rig.router.forget(b"nobody")


def test_one_that_does_not_read_is_not_waited_for(rig: Rig) -> None:
    with contextlib.closing(rig.stranger()) as mute:
        mute.sendall(zmtp.GREETING + zmtp.ready(Socket_Type=b"DEALER", Identity=NAME) + zmtp.frame(b"hello"))
        rig.hear(1)
        with pytest.raises(BufferError, match="unread"):
            for _ in range(MOST_UNREAD):
                rig.router.send(NAME, bytes(1 << 22))
        rig.router.forget(NAME)
        rig.router.send(NAME, b"dropped")


# --- strangers ---------------------------------------------------------------------------------------------


def test_a_name_that_is_not_expected_is_sent_away(rig: Rig) -> None:
    with contextlib.closing(rig.stranger()) as odd:
        odd.sendall(zmtp.GREETING + zmtp.ready(Identity=b"odd") + zmtp.frame(b"hello"))
        eventually(lambda: closed(rig, odd), "it is sent away")
    assert rig.heard == []


def test_a_name_that_is_taken_is_sent_away(rig: Rig) -> None:
    dealer = rig.dealer(NAME)
    dealer.send(b"hello")
    rig.hear(1)
    with contextlib.closing(rig.stranger()) as thief:
        thief.sendall(zmtp.GREETING + zmtp.ready(Identity=NAME) + zmtp.frame(b"it is me"))
        eventually(lambda: closed(rig, thief), "it is sent away")
    dealer.send(b"still here")
    assert rig.hear(2) == [(NAME, b"hello"), (NAME, b"still here")]


NONSENSE = {
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "zeros": bytes(100),
    "version 2": b"\xff" + bytes(8) + b"\x7f\x01\x05" + bytes(60),
    "CURVE": zmtp.GREETING[:12] + b"CURVE".ljust(20, b"\0") + bytes(32),
    "a message first": zmtp.GREETING + zmtp.frame(b"hello"),
    "another command": zmtp.GREETING + zmtp.frame(b"\x05HELLO", 4),
    "a broken property": zmtp.GREETING + zmtp.frame(b"\x05READY\x08Identity\xff", 4),
    "a property that is too short": zmtp.GREETING + zmtp.frame(b"\x05READY\xff", 4),
    "a long handshake": zmtp.GREETING + b"\x06" + (1 << 20).to_bytes(8, "big"),
    "a frame of all memory": zmtp.GREETING + zmtp.ready(Identity=NAME) + b"\x02" + b"\xff" * 8,
    "odd flags": zmtp.GREETING + zmtp.ready(Identity=NAME) + b"\x70\x00",
}


@pytest.mark.parametrize("data", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_ends_the_connection_that_it_comes_on(rig: Rig, data: bytes) -> None:
    with contextlib.closing(rig.stranger()) as odd:
        odd.sendall(data)
        eventually(lambda: closed(rig, odd), "it is sent away")
    dealer = rig.dealer(b"other")
    dealer.send(b"hello")
    assert rig.hear(1) == [(b"other", b"hello")]


@pytest.mark.parametrize("size", [1, 7, 64])
def test_pieces_of_any_size(size: int) -> None:
    said = [b"a", b"", bytes(300), b"z"]
    stream = zmtp.GREETING + zmtp.ready(Socket_Type=b"DEALER", Identity=NAME)
    stream += b"".join(map(zmtp.frame, said))
    reader = zmtp.FrameReader()
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]
    assert [data for piece in pieces for data in reader.feed(piece)] == said
    assert reader.identity == NAME


def test_messages_of_several_frames_are_left_out() -> None:
    reader = zmtp.FrameReader()
    head = zmtp.GREETING + zmtp.ready(Identity=NAME)
    assert list(reader.feed(head + zmtp.frame(b"1", 1) + zmtp.frame(b"2") + zmtp.frame(b"3"))) == [b"3"]
    with pytest.raises(ProtocolError):
        list(reader.feed(b"\x70\x00"))


def test_who_says_nothing_is_closed_after_a_while(rig: Rig) -> None:
    with contextlib.closing(rig.stranger()) as silent, contextlib.closing(rig.dealer(NAME)) as dealer:
        dealer.send(b"hello")
        rig.hear(1)
        eventually(lambda: rig.attend() and rig.router.next_deadline() is not None, "it was let in")
        rig.router.on_tick(time.monotonic() + SILENCE_TIMEOUT)
        eventually(lambda: closed(rig, silent), "it is closed")
        assert rig.router.next_deadline() is None
        dealer.send(b"still here")
        rig.hear(2)


STORM = """
import os, resource, sys, time
from onnx_dl.transport.router import Router
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
router = Router(sys.argv[1], 8, lambda name: name == b"client")
print("up", flush=True)
heard = []
while not heard:
    heard += router.receive(time.monotonic())
    time.sleep(0.001)
print(heard[0][1].decode(), len(os.listdir("/proc/self/fd")) < 64, flush=True)
"""


def test_more_connections_than_descriptors(nothing_is_left_behind: None) -> None:
    """Which would end libzmq, and the process with it."""
    address = fresh_address("test")
    with (
        subprocess.Popen(
            [sys.executable, "-c", STORM, address], stdout=subprocess.PIPE, text=True
        ) as process,
        contextlib.ExitStack() as stack,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        for _ in range(300):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            sock.settimeout(allowed(DEADLINE))
            sock.connect(f"\0{address}")
        context = zmq.Context()
        dealer = zeromq.dealer(context, address, b"client")
        dealer.send(b"let in")
        assert process.stdout.readline() == "let in True\n"
        dealer.close(0)
        context.term()
        assert process.wait(allowed(DEADLINE)) == 0
