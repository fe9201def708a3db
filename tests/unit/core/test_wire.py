"""Limits of the reader of protobuf's wire format.  Its rules are tested with what reads models by it."""

from __future__ import annotations

import pytest

from onnx_dl.core.wire import BYTES, Field, NotAMessage, WireReader

MANY = b"\x0a\x01a" * 1000


def reader(data: bytes, **limits: float) -> WireReader:
    return WireReader(lambda count, at: data[at : at + count], len(data), **limits)


def test_without_a_limit_all_fields_are_read() -> None:
    found = list(reader(MANY).fields(0, len(MANY)))
    assert len(found) == 1000
    assert found[1] == Field(1, BYTES, 0, 5, 6)


def test_reading_ends_at_its_time() -> None:
    fields = reader(MANY, until=0.0).fields(0, len(MANY))
    with pytest.raises(NotAMessage, match="too large to be read in this time"):
        list(fields)


def test_reading_ends_after_its_number_of_fields_in_all_messages() -> None:
    read = reader(MANY, most_fields=1500)
    list(read.fields(0, len(MANY)))
    with pytest.raises(NotAMessage, match="more than 1500 fields"):
        list(read.fields(0, len(MANY)))


def test_the_bytes_of_a_field_may_lie_outside_of_what_was_read() -> None:
    data = b"\x0a\x80\x80\x08" + b"x" * 131_072 + b"\x12\x02hi"
    read = reader(data)
    first, last = read.fields(0, len(data))
    assert read.text(last) == "hi"
    assert read.data(first) == b"x" * 131_072
