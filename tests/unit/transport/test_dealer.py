"""The application's end of the control socket: with our router, and with libzmq's."""

from __future__ import annotations

import gc
import os
import socket
import time
from collections.abc import Callable

import pytest
import zmq

from onnx_dl.concurrency import primitives
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.transport import sockets
from onnx_dl.transport.dealer import Dealer
from onnx_dl.transport.router import Router
from onnx_dl.transport.sockets import BorrowedSocket, Channel, fresh_address
from tests.support.early_forks import forked_at
from tests.support.waiting import DEADLINE, allowed, eventually

LARGE = os.urandom(3 << 20)


@pytest.fixture
def address() -> str:
    return fresh_address("test")


def test_messages_of_any_size_go_both_ways(address: str) -> None:
    router = Router(address, 8, lambda name: True)
    dealer = Dealer(address, b"me", Deadline(DEADLINE))
    heard: list[bytes] = []
    there: list[tuple[bytes, bytes]] = []

    def attend() -> None:
        there.extend(router.receive(time.monotonic()))
        heard.extend(dealer.receive())

    def is_let_in() -> bool:
        attend()
        return dealer.is_let_in

    eventually(is_let_in, "the handshake")
    for data in (b"", b"small", LARGE):
        dealer.send(data)
    eventually(lambda: attend() or len(there) == 3, "the router's messages")
    for _, data in there:
        router.send(b"me", data)
    eventually(lambda: attend() or len(heard) == 3, "the dealer's messages")
    assert there == [(b"me", data) for data in heard] and heard == [b"", b"small", LARGE]
    router.close(0.0)
    dealer.receive()
    assert dealer.gone
    dealer.close()
    dealer.close()


def test_views_that_somebody_keeps(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``gc.get_objects()`` in another thread keeps the views that are alive during a send."""
    kept: list[object] = []
    real = socket.socket.send

    def send(sock: socket.socket, data: memoryview, *flags: int) -> int:
        kept.append(data)
        kept.extend(found for found in gc.get_objects() if type(found) is memoryview)
        return real(sock, data, *flags)

    router = Router(address, 8, lambda name: True)
    monkeypatch.setattr(BorrowedSocket, "send", send)
    dealer = Dealer(address, b"me", Deadline(DEADLINE))
    there: list[tuple[bytes, bytes]] = []
    eventually(lambda: router.receive(time.monotonic()) or dealer.receive() or dealer.is_let_in, "handshake")
    dealer.send(b"first")
    dealer.send(b"second")
    eventually(lambda: there.extend(router.receive(time.monotonic())) or len(there) == 2, "the messages")
    assert there == [(b"me", b"first"), (b"me", b"second")] and kept
    dealer.close()
    router.close(0.0)


def test_one_that_is_sent_away_comes_again(address: str) -> None:
    router = Router(address, 1 << 30, lambda name: True)  # as if there were no descriptors
    dealer = Dealer(address, b"me", Deadline(DEADLINE))
    eventually(lambda: router.receive(time.monotonic()) or dealer.receive() or dealer.gone, "to be sent away")
    assert not dealer.is_let_in
    router.close(0.0)
    router = Router(address, 8, lambda name: True)
    dealer.reconnect(Deadline(DEADLINE))
    eventually(
        lambda: router.receive(time.monotonic()) or dealer.receive() or dealer.is_let_in, "to be let in"
    )
    dealer.close()
    router.close(0.0)


def test_with_libzmq(address: str) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        router.bind(f"ipc://@{address}")
        dealer = Dealer(address, b"me", Deadline(DEADLINE))
        eventually(lambda: dealer.receive() or dealer.is_let_in, "the handshake")
        dealer.send(LARGE)
        eventually(lambda: dealer.receive() or router.poll(0), "a message")
        assert router.recv_multipart() == [b"me", LARGE]
        router.send_multipart([b"me", b"answer"])
        heard: list[bytes] = []
        eventually(lambda: heard.extend(dealer.receive()) or heard, "an answer")
        assert heard == [b"answer"]
        dealer.close()


def test_nobody_listens(address: str) -> None:
    with pytest.raises(OSError):
        Dealer(address, b"me", Deadline(DEADLINE))


def test_a_number_that_is_the_programs(address: str) -> None:
    router = Router(address, 8, lambda name: True)
    dealer = Dealer(address, b"me", Deadline(DEADLINE))
    number = dealer.fileno()
    theirs = os.memfd_create("theirs")
    os.dup2(theirs, number)
    assert not dealer.is_ours()
    dealer.send(b"data")
    assert dealer.receive() == []
    dealer.close()
    assert os.fstat(number).st_size == 0 and os.lseek(number, 0, os.SEEK_CUR) == 0
    os.close(number)
    os.close(theirs)
    router.close(0.0)


def test_a_channel_that_is_closed_keeps_nobody_waiting() -> None:
    mine, theirs = sockets.Channel.pair()
    assert mine.writable(0.0) and not mine.readable(0.0)
    mine.close()
    assert mine.writable(60.0) and mine.readable(60.0)
    assert not mine.send(b"too late")
    theirs.close()


@pytest.mark.parametrize(
    "kind", [Channel.connect, lambda address, deadline: Dealer(address, b"me", deadline)]
)
def test_a_child_that_is_forked_meanwhile_does_not_hide_the_end_of_a_connection(
    monkeypatch: pytest.MonkeyPatch, address: str, kind: Callable[[str, Deadline], Channel | Dealer]
) -> None:
    types = {Channel.connect: socket.SOCK_SEQPACKET}
    with socket.socket(socket.AF_UNIX, types.get(kind, socket.SOCK_STREAM)) as listener:
        listener.bind(f"\0{address}")
        listener.listen()
        with forked_at(monkeypatch, primitives, "socket"):
            kind(address, Deadline(DEADLINE)).close()
            with listener.accept()[0] as peer:
                peer.settimeout(allowed(DEADLINE))
                while peer.recv(4096):  # a greeting, and then the end
                    pass
