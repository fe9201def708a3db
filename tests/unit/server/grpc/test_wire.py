"""The own reader of large requests, compared with protobuf's, and with bytes that lie."""

from __future__ import annotations

import random

import pytest
from google.protobuf.message import DecodeError

from onnx_dl.server.grpc import wire
from onnx_dl.server.grpc.messages import Message, ModelInferRequest


def a_request(random_: random.Random) -> Message:
    """A request with any of the fields, and sizes that need one byte of length or more."""
    message = ModelInferRequest(model_name="m" * random_.choice((0, 1, 200)), id=str(random_.random()))
    for index in range(random_.randrange(4)):
        tensor = message.inputs.add(
            name=f"input {index}", datatype="FP32", shape=[1, random_.randrange(1 << 40)]
        )
        if random_.random() < 0.3:
            tensor.contents.fp32_contents.extend([1.5] * random_.randrange(40))
        if random_.random() < 0.3:
            tensor.parameters["binary"].bool_param = True
    for index in range(random_.randrange(3)):
        message.outputs.add(name=f"output {index}")
    for _ in range(random_.randrange(4)):
        message.raw_input_contents.append(random_.randbytes(random_.choice((0, 1, 127, 128, 20_000))))
    if random_.random() < 0.5:
        message.parameters["timeout"].int64_param = -random_.randrange(1 << 40)
    return message


def shuffled(data: bytes, random_: random.Random) -> bytes:
    """The message with its fields in another order, and unknown ones between them."""
    parts = []
    at = 0
    while at < len(data):
        begin = at
        _, at = wire.read_varint(data, at)
        length, at = wire.read_varint(data, at)
        at += length
        parts.append(data[begin:at])
    unknown = [
        wire.field(99, b"unknown"), wire.varint(100 << 3) + wire.varint(1 << 63),
        wire.varint(101 << 3 | 1) + bytes(8), wire.varint(102 << 3 | 5) + bytes(4),
        wire.varint(7 << 3) + b"\x05",  # the number of raw_input_contents, and not its kind
    ]  # fmt: skip
    repeated = [part for part in parts if part[0] >> 3 in (5, 6, 7)]
    others = [part for part in parts if part not in repeated] + random_.sample(unknown, random_.randrange(5))
    for part in others:
        repeated.insert(random_.randrange(len(repeated) + 1), part)
    return b"".join(repeated)


@pytest.mark.parametrize("seed", range(150))
def test_what_is_split_is_what_protobuf_reads(seed: int) -> None:
    random_ = random.Random(seed)
    data = shuffled(a_request(random_).SerializeToString(), random_)
    whole = ModelInferRequest.FromString(data)
    rest, raw = wire.split(data)
    assert [bytes(view) for view in raw] == list(whole.raw_input_contents)
    read = ModelInferRequest.FromString(rest)
    assert not read.raw_input_contents
    read.raw_input_contents.extend(map(bytes, raw))
    assert read == whole


def test_tensors_are_views_of_the_message() -> None:
    message = ModelInferRequest(raw_input_contents=[b"first", b"second"])
    data = message.SerializeToString()
    _, raw = wire.split(data)
    assert [view.obj is data for view in raw] == [True, True]


def read_by_protobuf(data: bytes) -> Message | None:
    try:
        return ModelInferRequest.FromString(data)
    except DecodeError:
        return None


@pytest.mark.parametrize("seed", range(300))
def test_damaged_messages_are_read_as_protobuf_reads_them_or_refused(seed: int) -> None:
    random_ = random.Random(seed)
    data = bytearray(a_request(random_).SerializeToString() or b"\x0a\x01m")
    for _ in range(random_.randrange(1, 4)):
        at = random_.randrange(len(data))
        data[at] = random_.choice(
            (0, 0x7F, 0x80, 0xFF, random_.randrange(256), data[at] ^ 1 << random_.randrange(8))
        )
    if random_.random() < 0.3:
        del data[random_.randrange(len(data)) :]
    damaged = bytes(data)
    whole = read_by_protobuf(damaged)
    try:
        rest, raw = wire.split(damaged)
    except wire.WireError:
        return  # groups, which protobuf skips, and numbers written in more bytes than they need
    read = read_by_protobuf(rest)
    if read is not None:
        read.raw_input_contents.extend(map(bytes, raw))
    assert read == whole


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\x3a", "no number"),  # ends within the length
        (b"\x3a\x05abcd", "says 5 bytes, and 4 are left"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f" + b"x" * 9, "says 9223372036854775807 bytes"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "no number of 64 bits"),
        (b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "no number of 64 bits"),
        (b"\x80", "no number"),
        (b"\x08\x80\x80", "no number"),
        (b"\x09\x00\x00", "ends within the number"),
        (b"\x0d\x00", "ends within the number"),
        (b"\x02\x00", "no field with the tag"),  # number 0
        (b"\xff\xff\xff\xff\x7f\x00", "no field with the tag"),
        (b"\x3b\x3c", "the kind 3"),  # a group
        (b"\x3c", "the kind 4"),
        (b"\x3e", "the kind 6"),
        (b"\x3b" * 10_000, "the kind 3"),  # groups in groups
    ],
)
def test_bytes_that_are_no_message_are_refused(data: bytes, what: str) -> None:
    with pytest.raises(wire.WireError, match=what):
        wire.split(data)


def test_many_small_fields_do_not_keep_the_process_busy() -> None:
    assert len(wire.split(b"\x3a\x00" * wire.MOST_FIELDS)[1]) == wire.MOST_FIELDS
    with pytest.raises(wire.WireError, match="more than 4096 fields"):
        wire.split(b"\x3a\x00" * 10_000_000)


def test_what_a_parser_would_have_to_take_apart_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MOST_REST", 1 << 20)
    large = wire.field(wire.RAW_INPUTS, bytes(2 << 20))
    assert wire.split(large + wire.field(1, bytes(1000)))[0] == wire.field(1, bytes(1000))
    with pytest.raises(wire.WireError, match="more than 1 MiB beside raw_input_contents"):
        wire.split(large + wire.field(5, bytes(1 << 20)))


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, (1 << 32) - 1, (1 << 64) - 1])
def test_numbers_are_written_as_they_are_read(value: int) -> None:
    written = wire.varint(value)
    assert wire.read_varint(b"before" + written + b"behind", 6) == (value, 6 + len(written))
