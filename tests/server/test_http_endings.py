"""Connections that end: drained, cut because the client is slow, or to make room.  On a stand-in."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import time
from collections.abc import Iterator

import pytest

from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.server.http.limits import HttpLimits
from onnx_dl.server.options import ServeOptions
from tests.server.http_standin import HttpStandIn, listening
from tests.server.raw_http import Reader, ask, binary_infer, infer, request
from tests.support.waiting import DEADLINE, allowed, eventually


@pytest.fixture(scope="module")
def server() -> Iterator[HttpStandIn]:
    with listening() as running:
        yield running


def hasty(**limits: float) -> contextlib.AbstractContextManager[HttpStandIn]:
    """A listener with these limits.  Others stay as they are: a busy machine must not reach them."""
    return listening(HttpLimits(**limits))  # type: ignore[arg-type]


def test_a_drained_listener_finishes_what_was_begun() -> None:
    with listening() as server:
        idle, running, reading = server.connect(), server.connect(), server.connect()
        assert ask(idle, request()).status == 200
        running.sendall(infer(parameters={"hold": "a drain"}))
        head, body = binary_infer(100_000)
        reading.sendall(head + body[:70_000])
        eventually(lambda: server.inference.running == 1 and server.inference.allocated, "a run and a body")
        server.is_draining = True
        server.loop.call_soon_threadsafe(
            lambda: server.loop.create_task(server.listener.drain(Deadline(allowed(DEADLINE))))
        )
        assert Reader(idle).is_at_end()
        with pytest.raises(ConnectionRefusedError):
            server.connect()
        reading.sendall(body[70_000:])
        server.inference.released.add("a drain")
        for client in (running, reading):
            reader = Reader(client)
            reply = reader.reply()
            assert reply.status == 200 and reply.headers["connection"] == "close" and reader.is_at_end()
            client.close()
        idle.close()


def test_what_is_not_finished_at_the_deadline_is_cut() -> None:
    with listening() as server, server.connect() as client:
        client.sendall(infer(parameters={"hold": "for ever"}))
        eventually(lambda: server.inference.running == 1, "a run")
        server.do(server.listener.drain(Deadline(0.1)))
        assert Reader(client).is_at_end()
        eventually(lambda: server.inference.running == 0, "no run")


def test_new_requests_are_refused_while_draining(server: HttpStandIn) -> None:
    server.is_draining = True
    try:
        with server.connect() as client:
            reply = ask(client, infer())
            assert reply.status == 503 and reply.headers["retry-after"] == "1"
        with server.connect() as client:
            assert ask(client, request("/v2/health/live")).status == 200
            assert ask(client, request("/v2/health/ready")).status == 400
    finally:
        server.is_draining = False


def test_a_listener_for_metrics_serves_nothing_else() -> None:
    with listening(metrics_only=True) as server, server.connect() as client:
        assert ask(client, request("/v2")).status == 404
        assert ask(client, infer()).status == 404


def test_a_slow_head_is_cut() -> None:
    with hasty(head=0.6) as server, server.connect() as client:
        client.sendall(b"GET /v2 HT")
        reader = Reader(client)
        assert reader.reply().status == 408 and reader.is_at_end()


def test_a_slow_head_is_cut_although_bytes_come() -> None:
    with hasty(head=0.6) as server, server.connect() as client:
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - began < allowed(DEADLINE):
                client.sendall(b"a")
                client.settimeout(0.05)
                try:
                    if client.recv(4096).startswith(b"HTTP/1.1 408"):
                        raise ConnectionResetError
                except TimeoutError:
                    client.settimeout(allowed(DEADLINE))


def test_who_sends_nothing_is_cut() -> None:
    with hasty(head=0.6) as server, server.connect() as client:
        assert Reader(client).is_at_end()
    with hasty(idle=0.6) as server, server.connect() as client:
        assert ask(client, request()).status == 200
        assert Reader(client).is_at_end()


@pytest.mark.parametrize(("limit", "sent"), [("body_idle", 100_000), ("body_grace", 100)])
def test_a_slow_body_is_cut(limit: str, sent: int) -> None:
    head, body = binary_infer(1 << 20)
    with hasty(**{limit: 0.6}) as server, server.connect() as client:
        client.sendall(head + body[:sent])
        reader = Reader(client)
        assert reader.reply().status == 408 and reader.is_at_end()


def test_who_does_not_read_is_cut() -> None:
    head, body = binary_infer(30 << 20)
    with hasty(send_idle=1.0) as server, server.connect() as client:
        client.sendall(head)
        client.sendall(body)
        eventually(lambda: not connections(server), "the cut")
        with pytest.raises(ConnectionError):
            # The socket's own memory takes some MiB, and no more comes after the cut.
            Reader(client).reply()


@pytest.mark.parametrize("with_uvloop", [True, False])
@pytest.mark.parametrize("with_tls", [True, False])
def test_answers_that_are_not_read_are_counted(with_tls: bool, with_uvloop: bool) -> None:
    trustme = pytest.importorskip("trustme")
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    head, body = binary_infer(12 << 20)
    with listening(context=context if with_tls else None, with_uvloop=with_uvloop) as server:

        def connect() -> socket.socket:
            made = server.connect()
            return trusting.wrap_socket(made, server_hostname="localhost") if with_tls else made

        with connect() as client, connect() as other:
            for each in (client, other):
                each.sendall(head + body)
            eventually(lambda: server.inference.owed > 24 << 20, "answers that are counted")
            reply = Reader(client).reply()
            assert reply.status == 200 and reply.body.endswith(body[-(12 << 20) :])
            eventually(lambda: server.inference.owed < 13 << 20, "one answer is sent")
            assert ask(client, infer()).status == 200
        eventually(lambda: server.inference.owed == 0, "no client")


def connections(server: HttpStandIn) -> list[object]:
    """The open connections of a listener."""
    return list(server.listener._connections or ())


def test_an_idle_connection_makes_room_for_a_new_one() -> None:
    with listening(HttpLimits(connections=3)) as server:
        clients = [server.connect() for _ in range(3)]
        for client in clients:
            assert ask(client, request()).status == 200
        with server.connect() as newest:
            assert ask(newest, request()).status == 200
            assert Reader(clients[0]).is_at_end()
            assert ask(clients[1], request()).status == 200
        for client in clients:
            client.close()


def test_without_idle_connections_a_new_one_is_refused() -> None:
    with listening(HttpLimits(connections=2)) as server:
        clients = [server.connect() for _ in range(2)]
        for client in clients:
            client.sendall(infer(parameters={"hold": "for ever"}))
        eventually(lambda: server.inference.running == 2, "two runs")
        with server.connect() as newest:
            reader = Reader(newest)
            assert reader.reply().status == 503 and reader.is_at_end()
        for client in clients:
            client.close()


def test_any_bytes_get_an_answer_or_an_end() -> None:
    """Damaged requests, cut and joined anywhere: the server neither fails nor keeps a connection."""
    choice = random.Random(7)
    head, body = binary_infer(300)
    good = [infer(), request("/v2"), head + body, request("/v2/repository/index", "POST", b"{}")]
    with hasty(linger=0.6) as server:
        for _ in range(150):
            data = bytearray(b"".join(choice.choices(good, k=3)))
            for _ in range(choice.randrange(4)):
                at = choice.randrange(len(data))
                data[at : at + choice.randrange(3)] = choice.randbytes(choice.randrange(3))
            with server.connect() as client:
                # The server may have closed already, perhaps with bytes unread: that resets the connection.
                with contextlib.suppress(OSError):
                    client.sendall(data[: choice.randrange(1, len(data) + 1)])
                    client.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):
                    while client.recv(1 << 16):
                        pass
        with server.connect() as client:
            assert ask(client, infer()).status == 200
        eventually(lambda: not connections(server), "no connection")
        assert server.inference.running == 0


def test_it_works_on_asyncios_own_loop() -> None:
    with listening(with_uvloop=False) as server, server.connect() as client:
        head, body = binary_infer(9 << 20)
        reader = Reader(client)
        client.sendall(head)
        client.sendall(body + infer())
        assert reader.reply().body.endswith(bytes(9 << 20)) and reader.reply().status == 200


def test_the_limit_of_bodies_is_an_option() -> None:
    with listening(options=ServeOptions(max_body=1000)) as server, server.connect() as client:
        head, body = binary_infer(2000)
        reply = ask(client, head + body)
        assert reply.status == 413 and "1000 bytes" in reply.error
