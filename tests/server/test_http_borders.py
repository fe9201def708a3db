"""Requests whose border two programs may see in different places: none of them hides another request."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

for needed in ("httptools", "starlette", "uvloop"):
    pytest.importorskip(needed, reason="needs the packages of the extra serve")

from tests.server.http_standin import HttpStandIn, listening  # noqa: E402

POST = b"POST /v2/repository/index HTTP/1.1\r\nHost: localhost\r\n"
GET = b"GET /v2 HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
HIDDEN = b"POST /v2/repository/models/hidden/load HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"
"""What would be carried out if the border were elsewhere."""
REFUSED = {
    "both lengths": POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "the same length twice": POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
    "a list of lengths": POST + b"Content-Length: 2, 2\r\n\r\n{}",
    "a sign": POST + b"Content-Length: +2\r\n\r\n{}",
    "a minus": POST + b"Content-Length: -2\r\n\r\n{}",
    "hexadecimal": POST + b"Content-Length: 0x2\r\n\r\n{}",
    "a length of many digits": POST + b"Content-Length: 18446744073709551618\r\n\r\n{}",
    "a space before the colon": POST + b"Content-Length : 2\r\n\r\n{}",
    "another coding": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a coding behind chunked": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "chunked twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked in HTTP/1.0": CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + b"0\r\n\r\n",
    "a negative chunk": CHUNKED + b"-2\r\n{}\r\n0\r\n\r\n",
    "a chunk with 0x": CHUNKED + b"0x2\r\n{}\r\n0\r\n\r\n",
    "a chunk with an underscore": CHUNKED + b"0_2\r\n{}\r\n0\r\n\r\n",
    "a huge chunk": CHUNKED + b"ffffffffffffffff2\r\n{}\r\n0\r\n\r\n",
    "chunks with bare LF": CHUNKED + b"2\n{}\n0\n\n",
    "a chunk that is longer": CHUNKED + b"2\r\n{} \r\n0\r\n\r\n",
    "a folded line": GET + b"X-A: b\r\n c\r\n\r\n",
    "a NUL": GET + b"X-A: b\0c\r\n\r\n",
    "a bare CR": GET + b"X-A: b\rc\r\n\r\n",
    "no name": GET + b": b\r\n\r\n",
    "two hosts": GET + b"Host: evil.example\r\n\r\n",
    "no host": b"GET /v2 HTTP/1.1\r\n\r\n",
    "no path": b"GET  HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a small method": b"get /v2 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "another version": b"GET /v2 HTTP/1.9\r\nHost: localhost\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[HttpStandIn]:
    with listening() as running:
        yield running


def answers(server: HttpStandIn, sent: bytes) -> list[int]:
    """The status of each answer that comes until the server closes the connection."""
    with server.connect() as client:
        client.sendall(sent)
        came = b"".join(iter(lambda: client.recv(1 << 16), b""))
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", came)]


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_without_a_clear_border_is_refused_and_ends_the_connection(
    server: HttpStandIn, name: str
) -> None:
    asked = len(server.control.asked)
    (status,) = answers(server, REFUSED[name] + HIDDEN)
    assert status in (400, 501, 505)
    assert len(server.control.asked) == asked


def test_the_request_that_might_be_hidden_is_carried_out_where_it_is_not(server: HttpStandIn) -> None:
    """Else the tests above show nothing."""
    asked = len(server.control.asked)
    last = GET + b"Connection: close\r\n\r\n"
    assert len(answers(server, POST + b"Content-Length: 2\r\n\r\n{}" + HIDDEN + last)) == 3
    assert len(server.control.asked) == asked + 1


def test_a_body_is_no_request(server: HttpStandIn) -> None:
    asked = len(server.control.asked)
    body = HIDDEN.replace(b"{}", b"  ")
    length = b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
    for head in (GET, POST, b"POST /nothing HTTP/1.1\r\nHost: localhost\r\n"):
        assert len(answers(server, head + length + body)) == 1
    assert len(server.control.asked) == asked


def test_an_upgrade_is_not_made(server: HttpStandIn) -> None:
    wish = b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    assert answers(server, GET + wish + GET + b"Connection: close\r\n\r\n") == [200, 200]
