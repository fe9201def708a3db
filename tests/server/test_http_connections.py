"""Requests that are unusual or wrong, byte by byte, on a stand-in for the server."""

from __future__ import annotations

import gzip
import json
import socket
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from onnx_dl.server.http.limits import WAITING_BYTES
from tests.server.http_standin import HttpStandIn, listening
from tests.server.raw_http import Reader, ask, binary_infer, infer, request
from tests.server.standin import TOKEN
from tests.support.waiting import eventually


@pytest.fixture(scope="module")
def server() -> Iterator[HttpStandIn]:
    with listening() as running:
        yield running


@pytest.fixture
def client(server: HttpStandIn) -> Iterator[socket.socket]:
    with server.connect() as connection:
        yield connection


def test_a_connection_serves_one_request_after_the_other(client: socket.socket) -> None:
    reader = Reader(client)
    for _ in range(3):
        client.sendall(request("/v2"))
        assert reader.reply().status == 200
        client.sendall(infer())
        assert json.loads(reader.reply().body)["outputs"][0]["data"] == [1.0, 2.0]


def test_requests_that_are_sent_ahead_are_answered_in_order(client: socket.socket) -> None:
    client.sendall(b"".join(infer([float(number)]) + request("/nothing") for number in range(50)))
    reader = Reader(client)
    for number in range(50):
        assert json.loads(reader.reply().body)["outputs"][0]["data"] == [float(number)]
        assert reader.reply().status == 404


def test_more_may_be_sent_ahead_than_is_kept(client: socket.socket, server: HttpStandIn) -> None:
    requests = 2000
    client.sendall(infer(parameters={"hold": "ahead"}))
    eventually(lambda: server.inference.running == 1, "a run")
    client.sendall(request("/v2/health/live") * requests)
    connections = server.listener._connections
    assert connections is not None
    eventually(lambda: any(len(each._waiting) > WAITING_BYTES for each in connections), "more than is kept")
    server.inference.released.add("ahead")
    reader = Reader(client)
    assert [reader.reply().status for _ in range(requests + 1)] == [200] * (requests + 1)


def test_a_request_may_come_byte_by_byte(client: socket.socket) -> None:
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in infer() + request("/v2"):
        client.sendall(bytes([byte]))
    reader = Reader(client)
    assert [reader.reply().status for _ in range(2)] == [200, 200]


def test_http_1_0(server: HttpStandIn) -> None:
    with server.connect() as client:
        reader = Reader(client)
        client.sendall(b"GET /v2 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert reader.reply().headers["connection"] == "keep-alive"
        client.sendall(b"GET /v2 HTTP/1.0\r\n\r\n")
        assert reader.reply().headers["connection"] == "close" and reader.is_at_end()


def test_head_has_no_body(client: socket.socket) -> None:
    reader = Reader(client)
    client.sendall(request("/v2", "HEAD") + request("/v2"))
    first = reader.reply(has_body=False)
    assert first.headers["content-length"] == str(len(reader.reply().body))


def test_the_absolute_form_and_encoded_names(client: socket.socket) -> None:
    assert ask(client, request("http://localhost:8000/v2/models/%65cho")).status == 200
    assert ask(client, request("/v2/models/e%63ho/ready?a=b")).status == 200


def test_close_is_obeyed(client: socket.socket) -> None:
    client.sendall(request("/v2", Connection="close"))
    reader = Reader(client)
    assert reader.reply().headers["connection"] == "close" and reader.is_at_end()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (request("/v2", X="a" * 70_000), 431),
        (request("/v2", **{f"X{number}": 1 for number in range(101)}), 431),
        (b"GET " + b"/" * 70_000, 431),
        (b"GET /v2 HTTP/2.0\r\n\r\n", 505),
        (request("/v2/models/echo/infer", "POST", Content_Length=1, Transfer_Encoding="chunked"), 400),
        (request("/v2/models/echo/infer", "POST", Transfer_Encoding="chunked") + b"zz\r\n", 400),
        (request("/v2/models/echo/infer", "POST", Content_Length=(64 << 20) + 1), 413),
        (request("/v2/repository/index", "POST", Content_Length=(1 << 20) + 1), 413),
    ],
)
def test_a_request_whose_end_is_not_known_ends_the_connection(
    server: HttpStandIn, sent: bytes, status: int
) -> None:
    with server.connect() as client:
        client.sendall(sent)
        reader = Reader(client)
        reply = reader.reply()
        assert reply.status == status and reply.error and reply.headers["connection"] == "close"
        client.shutdown(socket.SHUT_WR)
        assert reader.is_at_end()


@pytest.mark.parametrize(
    ("sent", "status", "header"),
    [
        (request("/nothing", "POST", b"x" * 1000), 404, None),
        (request("/v2", "DELETE"), 405, ("allow", "GET, HEAD")),
        (request("/v2/models/echo/infer"), 405, ("allow", "POST")),
        (infer(model="unknown"), 404, None),
        (request("/v2/models/echo/versions/9/infer", "POST", b"{}"), 404, None),
        (request("/v2/models/echo/infer", "POST", b""), 400, None),
        (request("/v2/models/echo/infer", "POST", b"{"), 400, None),
        (infer(parameters={"busy": True}), 429, ("retry-after", "3")),
        (infer(X_Request_Timeout_Ms="soon"), 400, None),
        (request("/v2/repository/index", "POST", b"[1]"), 400, None),
        (request("/v2/repository/models/m/load", "POST", b"x"), 400, None),
        (request("/v2/repository/models/unknown/load", "POST", b"{}"), 404, None),
        (request("/v2/cudasharedmemory/region/r/register", "POST", b"{}"), 400, None),
        (request("/v2/cudasharedmemory/region/r/status"), 404, None),
        (request("/v2/logging", "POST", b'{"log_info": false}'), 400, None),
        (request("/v2/health/ready", "GET", b"a body that nobody reads"), 200, None),
    ],
)
def test_a_refusal_keeps_the_connection(
    client: socket.socket, sent: bytes, status: int, header: tuple[str, str] | None
) -> None:
    reader = Reader(client)
    client.sendall(sent)
    reply = reader.reply()
    assert reply.status == status and (status == 200 or reply.error)
    assert header is None or reply.headers[header[0]] == header[1]
    client.sendall(request("/v2"))
    assert reader.reply().status == 200


def test_a_fault_of_the_server_is_500_without_its_trace(
    client: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    reply = ask(client, infer(parameters={"crash": True}))
    assert reply.status == 500 and b"ZeroDivision" not in reply.body and b"Traceback" not in reply.body
    assert "ZeroDivisionError" in caplog.text
    assert ask(client, request("/metrics")).status == 500  # the stand-in has none without Accept
    assert ask(client, infer()).status == 200


def test_a_page_of_metrics_is_in_the_format_that_is_asked_for(client: socket.socket) -> None:
    reply = ask(client, request("/metrics", Accept="application/openmetrics-text"))
    assert (reply.status, reply.headers["content-type"]) == (200, "application/openmetrics-text")


def test_a_fault_at_the_head_is_500_too(server: HttpStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.access, "check", lambda *_: 1 / 0)
    with server.connect() as client:
        reply = ask(client, infer())
        assert reply.status == 500 and b"ZeroDivision" not in reply.body


def test_who_is_told_to_continue_continues(client: socket.socket) -> None:
    head, body = binary_infer(100_000, Expect="100-continue")
    client.sendall(head)
    reader = Reader(client)
    assert reader.reply().status == 100
    client.sendall(body)
    assert reader.reply().body.endswith(bytes(100_000))


def test_who_would_be_refused_is_not_told_to_continue(server: HttpStandIn) -> None:
    for sent in (
        request("/v2/models/echo/infer", "POST", Content_Length=1 << 40, Expect="100-continue"),
        request("/v2/models/no/infer", "POST", Content_Length=5, Expect="100-continue"),
        request("/v2/models/echo/infer", "POST", Content_Length=5, Expect="else"),
    ):
        with server.connect() as client:
            assert ask(client, sent).status in (404, 413, 417)


def test_a_chunked_body(client: socket.socket) -> None:
    head, body = binary_infer(200_000)
    chunked = head.replace(b"Content-Length: %d\r\n" % len(body), b"Transfer-Encoding: chunked\r\n")
    assert chunked != head
    client.sendall(chunked)
    for at in range(0, len(body), 30_000):
        piece = body[at : at + 30_000]
        client.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
    client.sendall(b"0\r\n\r\n" + request("/v2"))
    reader = Reader(client)
    assert reader.reply().body.endswith(bytes(200_000)) and reader.reply().status == 200


def test_a_compressed_body_is_bounded(client: socket.socket) -> None:
    bomb = gzip.compress(bytes(100 << 20))
    reply = ask(client, request("/v2/models/echo/infer", "POST", bomb, Content_Encoding="gzip"))
    assert reply.status == 413 and "67108864" in reply.error
    assert ask(client, infer()).status == 200
    small = gzip.compress(bytes(2 << 20))
    assert ask(client, request("/v2/repository/index", "POST", small, Content_Encoding="gzip")).status == 413


def test_a_large_body_lies_where_the_inference_wants_it(client: socket.socket, server: HttpStandIn) -> None:
    server.inference.allocated.clear()
    head, body = binary_infer(20 << 20)
    client.sendall(head)
    client.sendall(body)
    reply = Reader(client).reply()
    assert reply.status == 200 and reply.body.endswith(bytes(20 << 20))
    data = server.inference.requests[-1].inputs[0].data
    assert isinstance(data, memoryview)
    assert np.frombuffer(data, np.uint8).__array_interface__["data"][0] % 64 == 0
    assert [nbytes >> 20 for nbytes in server.inference.allocated] == [1, 8, 20]


def test_an_idle_connection_holds_neither_body_nor_result(
    server: HttpStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory: list[weakref.ref[np.ndarray]] = []

    def allocate(nbytes: int) -> memoryview:
        array = np.empty(nbytes, np.uint8)
        memory.append(weakref.ref(array))
        return memoryview(array)

    monkeypatch.setattr(server.inference, "allocate", allocate)
    head, body = binary_infer(5 << 20)
    bad, _ = binary_infer(5 << 20)
    with server.connect() as client:
        reader = Reader(client)
        for sent in (head + body, bad + b"x" * len(body)):
            client.sendall(sent)
            assert reader.reply().status in (200, 400)
            server.inference.requests.clear()
            eventually(lambda: memory and not any(made() is not None for made in memory), "free memory")
        client.sendall(request("/v2"))
        assert reader.reply().status == 200


def test_a_body_that_has_no_room_is_told_so(server: HttpStandIn) -> None:
    server.inference.is_full = True
    server.inference.refusals.clear()
    try:
        with server.connect() as client:
            head, body = binary_infer(20 << 20)
            client.sendall(head)
            client.sendall(body)
            reply = Reader(client).reply()
            assert reply.status == 429 and reply.headers["retry-after"] == "3"
        assert server.inference.refusals == [("echo", "", 429, "REJECTED")]
    finally:
        server.inference.is_full = False


@pytest.mark.parametrize(
    ("target", "body", "expected"),
    [
        ("/v2/models/echo/infer", b"{", [("echo", "", 400, "OTHER")]),
        ("/v2/models/echo/versions/1/infer", b"{}", [("echo", "1", 400, "OTHER")]),
        ("/v2/models/unknown/infer", b"{", []),
        ("/v2/repository/index", b"{", []),
    ],
)
def test_inferences_that_are_refused_are_told_to_those_who_count(
    server: HttpStandIn, target: str, body: bytes, expected: list[object]
) -> None:
    server.inference.refusals.clear()
    with server.connect() as client:
        assert ask(client, request(target, "POST", body)).status in (400, 404)
    assert server.inference.refusals == expected


def test_a_request_with_too_large_a_head_is_not_carried_out(server: HttpStandIn) -> None:
    """Its end is there when it is refused."""
    server.inference.requests.clear()
    with server.connect() as client:
        client.sendall(infer(X="a" * 65_600))
        assert Reader(client).reply().status == 431
    with server.connect() as other:
        assert ask(other, infer()).status == 200
    assert len(server.inference.requests) == 1


def test_half_a_body_holds_little(server: HttpStandIn) -> None:
    server.inference.allocated.clear()
    head, body = binary_infer(60 << 20)
    with server.connect() as client:
        client.sendall(head + body[:60_000])
        with server.connect() as other:
            assert ask(other, infer()).status == 200
        assert not server.inference.allocated


def test_who_closes_ends_the_run(server: HttpStandIn) -> None:
    for reset in (False, True):
        server.inference.cancelled = 0
        client = server.connect()
        client.sendall(infer(parameters={"hold": "for ever"}))
        eventually(lambda: server.inference.running == 1, "a run")
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        client.close()
        eventually(lambda: server.inference.cancelled, "an end of the run")
        eventually(lambda: server.inference.running == 0, "no run")


def test_who_closes_ends_the_run_although_much_is_sent_ahead(server: HttpStandIn) -> None:
    server.inference.cancelled = 0
    client = server.connect()
    client.sendall(infer(parameters={"hold": "for ever"}) + request("/v2") * 4000)
    eventually(lambda: server.inference.running == 1, "a run")
    client.close()
    eventually(lambda: server.inference.cancelled, "an end of the run")
    eventually(lambda: server.inference.running == 0, "no run")


def test_who_sends_no_more_still_gets_answers_that_are_no_runs(server: HttpStandIn) -> None:
    server.control.can_load.clear()
    with server.connect() as client:
        client.sendall(request("/v2/repository/models/m/load", "POST", b"{}"))
        client.shutdown(socket.SHUT_WR)
        server.control.can_load.set()
        assert Reader(client).reply().status == 200


def test_the_time_that_a_client_gives_is_what_is_left_of_it(
    client: socket.socket, server: HttpStandIn
) -> None:
    assert ask(client, infer(X_Request_Timeout_Ms="60000")).status == 200
    timeout = server.inference.requests[-1].timeout
    assert timeout is not None and 0 < timeout <= 60
    assert ask(client, infer()).status == 200
    assert server.inference.requests[-1].timeout is None


def test_a_token_is_asked_for_before_the_body(server: HttpStandIn) -> None:
    server.access.needs_token = True
    try:
        with server.connect() as client:
            head, body = binary_infer(1 << 20)
            assert ask(client, head + body).status == 403
        with server.connect() as client:
            head, body = binary_infer(1000, Authorization=TOKEN)
            assert ask(client, head + body).status == 200
            assert ask(client, request("/v2/health/live")).status == 200
        caller = server.access.callers[-1][1]
        assert caller.is_loopback and caller.peer == "127.0.0.1" and caller.certificate is None
    finally:
        server.access.needs_token = False


def test_a_head_that_repeats_is_decided_again(server: HttpStandIn) -> None:
    """It is parsed once only; what may have changed since is not kept."""
    with server.connect() as client:
        for _ in range(2):
            assert ask(client, infer()).status == 200
        server.access.needs_token = True
        try:
            assert ask(client, infer()).status == 403
        finally:
            server.access.needs_token = False
        server.is_draining = True
        try:
            assert ask(client, infer()).status == 503
        finally:
            server.is_draining = False
