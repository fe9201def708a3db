"""Numbers of the requests of a lane, by which a reply to another request is found out."""

from __future__ import annotations

from typing import Final

from onnx_dl.errors import ProtocolError
from onnx_dl.protocol import codec

NUMBERS: Final = 128
"""A reply carries the number of its request modulo this.  Only one request is under way at a time."""


def encoded(message: codec.Message | bytes) -> bytes:
    """Return the bytes of a message, or what is encoded already."""
    return message if isinstance(message, bytes) else codec.encode(message)


def wrong_reply(answered: int, asked: int) -> ProtocolError:
    """Error for a reply that comes twice or too late: it is not the reply to the next request."""
    return ProtocolError(f"A worker answered request {answered} of a lane instead of {asked % NUMBERS}.")
