"""Encodes and decodes messages; the version of the protocol and the types that fields share."""

from __future__ import annotations

import sys
from typing import Annotated, Generic, TypeVar

import msgspec
from msgspec import Meta

from onnx_dl.core.status import to_plain
from onnx_dl.errors import ProtocolError

PROTOCOL_VERSION = 9

_T = TypeVar("_T")


class Message(msgspec.Struct, kw_only=True, tag=True):
    """Base of all messages.  On the wire a message is a map whose ``type`` is the class name."""


_encoder = msgspec.msgpack.Encoder(enc_hook=to_plain)


def encode(message: Message) -> bytes:
    """Encode a message as msgpack; raises OverflowError or TypeError if that is not possible."""
    return _encoder.encode(message)


class Reader(Generic[_T]):
    """Decodes the messages of one direction of one socket; rejects all others."""

    def __init__(self, union: object) -> None:
        self._decoder: msgspec.msgpack.Decoder[_T] = msgspec.msgpack.Decoder(union)

    def __call__(self, data: bytes | memoryview | msgspec.Raw) -> _T:
        try:
            return self._decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(
                f"Received a message that protocol version {PROTOCOL_VERSION} does not know ({error}). "
                "Both processes must run the same version of onnx-dl."
            ) from None


Count = Annotated[int, Meta(ge=0)]
"""Bytes.  A negative number would free memory that does not exist."""
Seconds = Annotated[float, Meta(ge=0, le=sys.float_info.max)]
Ttl = Annotated[float, Meta(ge=-1, le=sys.float_info.max)]
"""Seconds, or -1.  Infinity and NaN are rejected: they cannot be compared with a time."""
