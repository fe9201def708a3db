from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_dl.server.http.chunked import ChunkDecoder, chunk_size
from onnx_dl.server.v2.failures import RequestFailure


def decode(*pieces: bytes) -> tuple[bytes, bytes, bool]:
    """What chunks carry, what follows them, and whether they are complete."""
    carried = bytearray()
    decoder = ChunkDecoder(lambda data: carried.extend(data))
    rest = b""
    for piece in pieces:
        rest += piece[decoder.feed(memoryview(piece)) :]
    return bytes(carried), rest, decoder.is_complete


def test_chunks_carry_bytes_and_end_where_the_next_request_begins() -> None:
    body = b"5\r\nhello\r\n1;name=value\r\n \r\nA\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\nGET /"
    assert decode(body) == (b"hello 0123456789", b"GET /", True)


def test_chunks_may_come_byte_by_byte() -> None:
    body = b"3\r\nabc\r\n00\r\n\r\nrest"
    assert decode(*(bytes([byte]) for byte in body)) == (b"abc", b"rest", True)


@pytest.mark.parametrize(
    "body",
    [
        b"\r\n", b"x\r\n", b"-1\r\n", b"+1\r\n", b"0x1\r\n", b"1 1\r\n", b"1_0\r\n", b" 1\r\na", b"1\na",
        b"1\r\nab\r\n", b"1\r\na\n", b"1000000000000000\r\n", b"1;" + b"x" * 300, b"1" * 300,
        b"0\r\n" + b"X: y\r\n" * 3000, b"0\r\nX: y\n", b"\xb2\r\n",
    ],
)  # fmt: skip
def test_what_are_no_chunks_is_refused(body: bytes) -> None:
    with pytest.raises(RequestFailure) as caught:
        decode(body)
    assert caught.value.http == 400


def test_sizes_are_hexadecimal() -> None:
    assert [chunk_size(line) for line in (b"0", b"fF", b"10 ;x", b"00000000000000a")] == [0, 255, 16, 10]


@given(st.lists(st.binary(min_size=1, max_size=300)), st.randoms(use_true_random=False))
def test_whatever_was_sent_in_chunks_is_decoded(chunks: list[bytes], choice: random.Random) -> None:
    sent = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n" + b"next"
    pieces = []
    while sent:
        cut = choice.randint(1, len(sent))
        pieces.append(sent[:cut])
        sent = sent[cut:]
    assert decode(*pieces) == (b"".join(chunks), b"next", True)


@given(st.binary(max_size=200))
def test_any_bytes_are_chunks_or_refused(data: bytes) -> None:
    try:
        carried, rest, _ = decode(data)
    except RequestFailure as failure:
        assert failure.http == 400
    else:
        assert len(carried) + len(rest) <= len(data)
