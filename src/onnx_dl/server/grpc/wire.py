"""The wire format of protobuf, as far as tensors need it.  Pure.

A parser copies every tensor.  So of a large request the tensors' bytes are taken as views, and a parser gets
the rest; and an answer is joined from its parts once.

    ModelInferRequest   = { field } ; raw_input_contents is field 7
    field               = tag, value ; tag = number << 3 | kind, as a varint
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

RAW_INPUTS: Final = 7
"""Number of ``raw_input_contents`` in ModelInferRequest."""
MOST_FIELDS: Final = 4096
"""Fields of a large request, without those within its fields.  More would keep this process busy."""
MOST_REST: Final = 32 << 20
"""Bytes of a request that are not raw tensors.  A parser's objects take many times that."""

_VARINT, _FIXED64, _BYTES, _GROUP, _FIXED32 = 0, 1, 2, 3, 5


class WireError(ValueError):
    """The bytes are not a message."""


def split(data: bytes) -> tuple[bytes, list[memoryview]]:
    """Takes ``raw_input_contents`` out of a ModelInferRequest.

    Returns:
        The message without them, and views of them, in their order.

    Raises:
        WireError: the bytes are no message, or exceed a limit.
    """
    view = memoryview(data)
    size = len(data)
    rest: list[memoryview] = []
    raw: list[memoryview] = []
    at = kept_from = count = 0
    while at < size:
        count += 1
        if count > MOST_FIELDS:
            raise WireError(f"it has more than {MOST_FIELDS} fields")
        begin = at
        tag, at = read_varint(data, at)
        if tag >> 3 == 0 or tag > 0xFFFFFFFF:
            raise WireError(f"there is no field with the tag {tag}")
        start, at = _value(data, at, tag & 7, size)
        if tag == RAW_INPUTS << 3 | _BYTES:
            rest.append(view[kept_from:begin])
            raw.append(view[start:at])
            kept_from = at
    rest.append(view[kept_from:])
    if sum(map(len, rest)) > MOST_REST:
        raise WireError(
            f"it has more than {MOST_REST >> 20} MiB beside raw_input_contents; send large tensors there"
        )
    return b"".join(rest), raw


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at ``at``, of 64 bits at most, and the index behind it.  Raises WireError."""
    value = shift = 0
    for index in range(at, min(at + 10, len(data))):
        byte = data[index]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value > 0xFFFFFFFFFFFFFFFF:
                break
            return value, index + 1
        shift += 7
    raise WireError(f"no number of 64 bits at byte {at}")


def _value(data: bytes, at: int, kind: int, size: int) -> tuple[int, int]:
    """Begin and end of the value of a field, which begins at ``at``.  Raises WireError."""
    if kind == _VARINT:
        return at, read_varint(data, at)[1]
    if kind == _BYTES:
        length, at = read_varint(data, at)
        if length > size - at:
            raise WireError(f"the field at byte {at} says {length} bytes, and {size - at} are left")
        return at, at + length
    if kind in (_FIXED64, _FIXED32):
        end = at + (8 if kind == _FIXED64 else 4)
        if end > size:
            raise WireError(f"the message ends within the number at byte {at}")
        return at, end
    # Groups were given up before this protocol was made, and 4, 6 and 7 begin nothing.
    raise WireError(f"no field begins with the kind {kind}, at byte {at}")


def varint(value: int) -> bytes:
    """A number of at most 64 bits, not negative, in the wire format."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def head(number: int, length: int) -> bytes:
    """Tag and length of a field, before its value of ``length`` bytes."""
    return varint(number << 3 | _BYTES) + varint(length)


def field(number: int, value: bytes) -> bytes:
    """A field of bytes, text or a message."""
    return head(number, len(value)) + value


def nbytes(parts: Iterable[bytes | memoryview]) -> int:
    """Bytes of the parts together.  Views have one byte an item."""
    return sum(map(len, parts))
