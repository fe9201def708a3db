from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_dl.server.http.head import Framing, framing, parse_head, skipped_length
from onnx_dl.server.v2.failures import RequestFailure

LINE = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: localhost:8000\r\n"


def head(*lines: bytes, first: bytes = LINE) -> bytes:
    return first + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


def status(data: bytes) -> int:
    """The status with which a head is refused, by its form or by how its body comes."""
    with pytest.raises(RequestFailure) as caught:
        framing(parse_head(data), 1000, 500)
    assert str(caught.value)
    return caught.value.http


def test_a_head_is_its_method_target_and_headers_in_lower_case() -> None:
    parsed = parse_head(head(b"CONTENT-length: 5", b"X-Twice: a", b"x-twice: b"))
    assert (parsed.method, parsed.target, parsed.version) == ("POST", b"/v2/models/m/infer", "1.1")
    assert parsed.headers == {
        b"host": b"localhost:8000", b"content-length": b"5", b"x-twice": b"a, b",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("first", "line", "keeps"),
    [
        (LINE, b"", True),
        (LINE, b"Connection: close", False),
        (LINE, b"Connection: Keep-Alive, CLOSE", False),
        (b"GET / HTTP/1.0\r\n", b"", False),
        (b"GET / HTTP/1.0\r\n", b"Connection: Keep-Alive", True),
        (b"GET / HTTP/1.0\r\n", b"Connection: close", False),
    ],
)
def test_a_connection_is_kept_as_its_client_says(first: bytes, line: bytes, keeps: bool) -> None:
    assert parse_head(head(*filter(None, [line]), first=first)).keeps_alive is keeps


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        head(b"bad name: x"),
        head(b"name : x"),
        head(b"name: x\x00y"),
        head(b" folded"),
        LINE + b"X: y\n\nGET / HTTP/1.1\r\nHost: z\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        head(b"Host: other"),
        head(b"Content-Length: 1", b"Content-Length: 2"),
        head(b"Content-Length: 1", b"Content-Length: 1"),
        head(b"Content-Length: 1", b"Transfer-Encoding: chunked"),
        head(b"Transfer-Encoding: chunked", b"Content-Length: 1"),
        head(b"Content-Length: +1"),
        head(b"Content-Length: 0x1"),
        head(b"Content-Length: -1"),
        head(b"Content-Length: 1e3"),
        head(b"Content-Length: 99999999999999999999999999"),
        head(b"Transfer-Encoding: gzip"),
        head(b"Inference-Header-Content-Length: 1_0", b"Content-Length: 20"),
        head(b"Inference-Header-Content-Length: -1", b"Content-Length: 20"),
        head(b"Inference-Header-Content-Length: 21", b"Content-Length: 20"),
        head(b"Inference-Header-Content-Length: 2", b"Inference-Header-Content-Length: 3"),
        head(b"Authorization: Bearer a", b"Authorization: Bearer b"),
        b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_what_is_not_a_valid_request_is_refused(data: bytes) -> None:
    assert status(data) == 400


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (head(b"Transfer-Encoding: gzip, chunked"), 501),
        (b"GET /old\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\n", 505),
        (head(b"Content-Length: 1001"), 413),
        (head(b"Content-Length: 501"), 413),
        (head(b"Content-Length: 900", b"Inference-Header-Content-Length: 501"), 413),
        (head(b"Content-Length: 1001", b"Content-Encoding: gzip"), 413),
        (head(b"Content-Encoding: br", b"Content-Length: 1"), 415),
        (head(b"Expect: a-miracle", b"Content-Length: 1"), 417),
        (head(*[b"X-%d: 1" % number for number in range(100)]), 431),
    ],
)
def test_other_refusals_have_their_own_status(data: bytes, expected: int) -> None:
    assert status(data) == expected


def test_a_hundred_headers_are_enough() -> None:
    assert len(parse_head(head(*[b"X-%d: 1" % number for number in range(99)])).headers) == 100


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], Framing(0, "", None, False)),
        ([b"Content-Length: 7"], Framing(7, "", None, False)),
        ([b"Transfer-Encoding: Chunked"], Framing(None, "", None, False)),
        ([b"Content-Length: 7", b"Content-Encoding: GZIP"], Framing(7, "gzip", None, False)),
        ([b"Content-Length: 7", b"Content-Encoding: identity"], Framing(7, "", None, False)),
        ([b"Content-Length: 700", b"Content-Encoding: deflate"], Framing(700, "deflate", None, False)),
        (
            [b"Content-Length: 900", b"Inference-Header-Content-Length: 500", b"Expect: 100-Continue"],
            Framing(900, "", 500, True),
        ),
        # Compressed, the JSON may be longer than the body.
        (
            [b"Content-Length: 9", b"Inference-Header-Content-Length: 30", b"Content-Encoding: gzip"],
            Framing(9, "gzip", 30, False),
        ),
    ],
)
def test_how_a_body_comes(lines: list[bytes], expected: Framing) -> None:
    assert framing(parse_head(head(*lines)), 1000, 500) == expected


def test_an_upgrade_is_ignored() -> None:
    parsed = parse_head(head(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"Content-Length: 3"))
    assert framing(parsed, 10, 10).length == 3 and parsed.keeps_alive


def test_the_body_of_a_refused_request_is_skipped_if_its_end_is_known() -> None:
    def skipped(*lines: bytes) -> int | None:
        return skipped_length(parse_head(head(*lines)))

    assert skipped() == 0
    assert skipped(b"Content-Length: 1000") == 1000
    assert skipped(b"Content-Length: 2000000") is None
    assert skipped(b"Transfer-Encoding: chunked") is None
    assert skipped(b"Content-Length: 1000", b"Expect: 100-continue") is None
    assert skipped(b"Content-Length: 1000", b"Content-Encoding: br") is None
    assert skipped_length(None) is None


TOKENS = st.sampled_from(
    [
        b"GET", b"POST", b" ", b"/", b"HTTP/1.1", b"HTTP/1.0", b"\r\n", b"\n", b"\r", b"Host: x", b":",
        b"\x00", b"Content-Length: 5", b"Transfer-Encoding: chunked", b"Expect: 100-continue", b"\xff",
        b"a" * 300, b"\t", b"Connection: close", b"Upgrade: x", b"http://h/", b"CONNECT", b"*",
    ]
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(st.one_of(TOKENS, st.binary(max_size=8)), max_size=24))
def test_any_bytes_are_a_head_or_a_refusal(pieces: list[bytes]) -> None:
    try:
        parsed = parse_head(b"".join(pieces) + b"\r\n\r\n")
        sent = framing(parsed, 1000, 1000)
    except RequestFailure as failure:
        assert 400 <= failure.http < 506 and str(failure)
    else:
        assert parsed.target and (sent.length is None or 0 <= sent.length <= 1000)
