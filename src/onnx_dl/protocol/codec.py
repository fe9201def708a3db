"""Encodes and decodes messages; the version of the protocol and the types that fields share."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from onnx_dl.core.status import to_plain
from onnx_dl.errors import ProtocolError

PROTOCOL_VERSION = 5

Count = Annotated[int, Meta(ge=0)]
"""Bytes.  What is less than none would make room that there is not."""
Seconds = Annotated[float, Meta(ge=0, le=sys.float_info.max)]
Ttl = Annotated[float, Meta(ge=-1, le=sys.float_info.max)]
"""Seconds, or -1; neither infinite nor no number, with which no time can be compared."""


class Message(msgspec.Struct, kw_only=True, tag=True):
    """Base of all messages; on the wire each is a map whose ``type`` is the class name."""


_encoder = msgspec.msgpack.Encoder(enc_hook=to_plain)


def encode(message: Message) -> bytes:
    """The message as msgpack.

    Raises:
        OverflowError, TypeError: a value in it has no form in msgpack.
    """
    return _encoder.encode(message)


class Reader:
    """Decodes the messages of one direction of one socket, and nothing else."""

    def __init__(self, union: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(union)

    def __call__(self, data: bytes | memoryview | msgspec.Raw) -> Any:
        try:
            return self._decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(
                f"Received a message that protocol version {PROTOCOL_VERSION} does not have ({error}). "
                "Both processes must run the same version of onnx-dl."
            ) from None
