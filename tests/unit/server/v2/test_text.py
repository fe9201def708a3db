"""BYTES in the protocol's binary form."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from onnx_dl.server.v2 import text


@pytest.mark.parametrize("items", [[], [""], ["a"], ["", "é€😀", "x" * 70_000, "a\0b"]])
def test_what_is_encoded_is_decoded(items: list[str]) -> None:
    array = np.array([*items, None], object)[:-1]
    assert text.decode(text.encode(array), len(items)) == items


def test_bytes_and_text_may_be_mixed_and_have_any_shape() -> None:
    array = np.empty((2, 2), object)
    array[:] = [["a", b"\xff"], [b"", "é"]]
    assert text.encode(array) == b"\1\0\0\0a\1\0\0\0\xff\0\0\0\0\2\0\0\0\xc3\xa9"


def test_items_are_encoded_as_their_array() -> None:
    items = ["a", b"\xff", memoryview(b"xyz")[1:], ""]
    expected = b"\1\0\0\0a\1\0\0\0\xff\2\0\0\0yz\0\0\0\0"
    assert text.encode(items) == text.encode(iter(items)) == expected
    assert text.encode(np.array([["a", "é"]])) == b"\1\0\0\0a\2\0\0\0\xc3\xa9"
    assert text.encode([]) == b""


def test_triton_encodes_the_same() -> None:
    serialize = pytest.importorskip("tritonclient.utils").serialize_byte_tensor
    array = np.array(["a", "é", "", "x" * 300], object)
    assert text.encode(array) == serialize(array).item()


@pytest.mark.parametrize(
    ("data", "count", "words"),
    [
        (b"", 1, "at least 4 bytes"),
        (b"\1\0\0\0a", 0, "5 bytes after its 0 texts"),
        (b"\1\0\0\0a", 2, "at least 8 bytes"),
        (b"\1\0\0\0a\0\0\0", 2, "has 1 texts"),
        (b"\5\0\0\0a", 1, "claims 5 bytes where 1 are left"),
        (b"\xff\xff\xff\xffa", 1, "claims 4294967295 bytes"),
        (b"\1\0\0\0\xff", 1, "not UTF-8"),
        (b"\3\0\0\0\xed\xa0\x80", 1, "not UTF-8"),
        (b"\0\0\0\0" * 3, 1 << 62, "at least"),
    ],
)
def test_lies_about_lengths_are_found(data: bytes, count: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        text.decode(data, count)


def test_a_claim_of_many_texts_allocates_nothing() -> None:
    with pytest.raises(ValueError, match="needs at least"):
        text.decode(struct.pack("<I", 0) * 1000, 1 << 40)


def test_views_are_decoded_where_they_lie() -> None:
    array = np.frombuffer(b"....\1\0\0\0a", np.uint8)
    assert text.decode(memoryview(array)[4:], 1) == ["a"]
