from __future__ import annotations

import gzip
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_dl.server.http.answers import HttpAnswer
from onnx_dl.server.http.compression import asked_encoding, compress, inflate
from onnx_dl.server.http.head import Encoding
from onnx_dl.server.v2.failures import RequestFailure

MOST = 1 << 20
_GZIP = gzip.compress(b"x" * 1000, mtime=0)


def inflated(data: bytes, encoding: Encoding, most: int = MOST) -> bytes:
    return bytes(inflate(memoryview(data), encoding, None, most, lambda n: memoryview(bytearray(n))))


def refused(data: bytes, encoding: Encoding, most: int = MOST) -> int:
    with pytest.raises(RequestFailure) as caught:
        inflated(data, encoding, most)
    return caught.value.http


@pytest.mark.parametrize("size", [0, 1, 70_000, MOST])
def test_a_compressed_body_is_what_was_compressed(size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    assert inflated(gzip.compress(data), "gzip") == data
    assert inflated(zlib.compress(data), "deflate") == data


def test_gzip_may_have_several_members() -> None:
    assert inflated(gzip.compress(b"one") + gzip.compress(b"two"), "gzip") == b"onetwo"


def test_very_many_members_are_refused() -> None:
    empty = gzip.compress(b"", mtime=0)
    assert inflated(empty * 10_000 + gzip.compress(b"x"), "gzip") == b"x"
    assert refused(empty * 40_000, "gzip") == 400


def test_zlib_gets_the_body_in_pieces() -> None:
    """It copies what it has not taken: of a whole body that takes the square of the time."""
    given: list[int] = []

    class Stream:
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def decompress(self, data: memoryview, most: int) -> bytes:
            given.append(len(data))
            piece: bytes = self._stream.decompress(data, most)
            return piece

        def __getattr__(self, name: str) -> object:
            return getattr(self._stream, name)

    data = np.random.default_rng(1).bytes(MOST)
    body = gzip.compress(data[: MOST // 2]) + gzip.compress(data[MOST // 2 :])
    with pytest.MonkeyPatch.context() as patch:
        real = zlib.decompressobj
        patch.setattr(zlib, "decompressobj", lambda bits: Stream(real(bits)))
        assert inflated(body, "gzip") == data
    assert max(given) <= 256 << 10


def test_a_bomb_is_refused_when_it_exceeds_the_limit() -> None:
    allocated = []

    def allocate(nbytes: int) -> memoryview:
        allocated.append(nbytes)
        return memoryview(bytearray(nbytes))

    bomb = gzip.compress(bytes(256 << 20), 9)
    with pytest.raises(RequestFailure) as caught:
        inflate(memoryview(bomb), "gzip", None, MOST, allocate)
    assert caught.value.http == 413 and sum(allocated) <= 4 * MOST


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        (b"not compressed", "gzip"),
        (b"not compressed", "deflate"),
        (_GZIP[:-9], "gzip"),
        (zlib.compress(b"x" * 1000)[:-5], "deflate"),
        (zlib.compress(b"x") + b"more", "deflate"),
        (_GZIP + b"more", "gzip"),
        (_GZIP, "deflate"),
        (zlib.compress(b"x"), "gzip"),
    ],
)
def test_what_is_damaged_is_refused(data: bytes, encoding: Encoding) -> None:
    assert refused(data, encoding) == 400


def test_one_byte_more_than_the_limit_is_refused() -> None:
    assert inflated(gzip.compress(bytes(100)), "gzip", 100) == bytes(100)
    assert refused(gzip.compress(bytes(101)), "gzip", 100) == 413


def test_nobody_inflates_for_a_client_that_has_gone() -> None:
    with pytest.raises(RequestFailure) as caught:
        inflate(
            memoryview(gzip.compress(bytes(MOST))), "gzip", None, MOST, lambda n: memoryview(bytearray(n)),
            lambda: True,
        )  # fmt: skip
    assert caught.value.http == 499


@given(st.binary(max_size=300), st.sampled_from(["gzip", "deflate"]), st.integers(0, 60))
def test_any_bytes_are_inflated_or_refused(noise: bytes, encoding: Encoding, at: int) -> None:
    whole = gzip.compress(b"y" * 500) if encoding == "gzip" else zlib.compress(b"y" * 500)
    for data in (noise, whole[:at] + noise + whole[at + 1 :]):
        try:
            assert len(inflated(data, encoding)) <= MOST
        except RequestFailure as failure:
            assert failure.http in (400, 413)


@pytest.mark.parametrize(
    ("accept", "encoding"),
    [
        (None, ""), (b"", ""), (b"gzip", "gzip"), (b" Deflate ", "deflate"), (b"identity", ""), (b"br", ""),
        (b"gzip, deflate", ""), (b"gzip, deflate, br, zstd", ""), (b"*", ""),
    ],
)  # fmt: skip
def test_an_answer_is_compressed_for_who_asks_for_one_encoding(accept: bytes | None, encoding: str) -> None:
    assert asked_encoding(accept) == encoding


def test_a_compressed_answer_is_the_same_answer() -> None:
    array = np.arange(100_000, dtype=np.float32)
    for encoding, inverse in (("gzip", gzip.decompress), ("deflate", zlib.decompress)):
        answer = HttpAnswer(200, [b"{json}", array.view(np.uint8).data])
        compress(answer, encoding)
        assert inverse(b"".join(answer.parts)) == b"{json}" + array.tobytes()
        assert answer.headers == [(b"Content-Encoding", encoding.encode())]
