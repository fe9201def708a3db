from __future__ import annotations

import pytest

from onnx_dl.server.http.answers import JOINED, HttpAnswer, failed, not_allowed, rendered
from onnx_dl.server.http.head import Head
from onnx_dl.server.v2 import failures


def asked(method: str = "GET", version: str = "1.1") -> Head:
    return Head(method, b"/", version, {})


def sent(answer: HttpAnswer, head: Head | None = None, *, keeps_alive: bool = True) -> bytes:
    return b"".join(rendered(answer, head, keeps_alive=keeps_alive))


def test_an_answer_is_a_head_and_its_parts() -> None:
    assert sent(HttpAnswer(200, (b"{", b"}"), headers=[(b"X-Y", b"z")])) == (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Y: z\r\nContent-Length: 2\r\n\r\n{}"
    )


@pytest.mark.parametrize(
    ("version", "keeps_alive", "line"),
    [("1.1", False, b"Connection: close"), ("1.0", True, b"Connection: keep-alive"), ("1.1", True, b"")],
)
def test_the_connection_is_named_where_it_must_be(version: str, keeps_alive: bool, line: bytes) -> None:
    head = sent(HttpAnswer(404), asked(version=version), keeps_alive=keeps_alive)
    assert head.startswith(b"HTTP/1.1 404 Not Found\r\n") and (
        line in head if line else b"Connection" not in head
    )


def test_the_answer_to_head_has_the_length_and_no_body() -> None:
    head = sent(HttpAnswer(200, (b"12345",)), asked("HEAD"))
    assert head.endswith(b"Content-Length: 5\r\n\r\n")


def test_large_parts_are_not_joined() -> None:
    large = memoryview(bytearray(JOINED + 1))
    parts = rendered(HttpAnswer(200, (b"json", b"", large)), asked(), keeps_alive=True)
    assert len(parts) == 3 and parts[2] is large


@pytest.mark.parametrize(
    ("failure", "status", "header"),
    [
        (failures.too_many("full", 0.2), 429, (b"Retry-After", b"1")),
        (failures.unavailable("later", 2.1), 503, (b"Retry-After", b"3")),
        (failures.unauthenticated("who"), 401, (b"WWW-Authenticate", b"Bearer")),
    ],
)
def test_a_failure_says_what_helps(
    failure: failures.RequestFailure, status: int, header: tuple[bytes, bytes]
) -> None:
    answer = failed(failure)
    assert answer.status == status and header in answer.headers
    assert b"".join(answer.parts) == b'{"error":"%s"}' % str(failure).encode()


def test_other_methods_are_named() -> None:
    answer = not_allowed(["GET", "HEAD"])
    assert answer.status == 405 and answer.headers == [(b"Allow", b"GET, HEAD")]


def test_a_long_error_is_cut() -> None:
    answer = failed(failures.invalid("x" * 5_000_000))
    assert 2000 < answer.nbytes < 2100 and bytes(answer.parts[0]).endswith(b' ..."}')
