"""Inflated requests, and compressed answers.  Runs in threads: zlib lets go of the GIL."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Final

from onnx_dl.server.http.answers import HttpAnswer, Part
from onnx_dl.server.http.bodies import Allocate, Gathered
from onnx_dl.server.http.head import Encoding
from onnx_dl.server.v2.failures import cancelled, invalid

_BITS: Final = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
"""``deflate`` in HTTP means the form of zlib."""
_PIECE: Final = 256 << 10
_MOST_STREAMS: Final = 1 << 15
"""Streams of one body.  Each costs time, and some are 20 bytes long and empty."""
_LEVEL: Final = 1
"""Tensors hardly become smaller at a higher level, and take far longer."""


def inflate(
    body: memoryview,
    encoding: Encoding,
    header_length: int | None,
    most: int,
    allocate: Allocate,
    is_given_up: Callable[[], bool] = lambda: False,
) -> memoryview:
    """Return the body as it was before its compression.  ``most``: bytes of it.  ``is_given_up`` is asked
    between pieces: nobody waits for the result any more.

    Raises:
        RequestFailure: 400: it is damaged; 413: it is larger; 429: there is no memory for it.
    """
    gathered = Gathered(most, header_length, allocate)
    at = streams = 0
    while at < len(body):
        streams += 1
        if streams > _MOST_STREAMS:
            raise invalid(f"The body has more than {_MOST_STREAMS} {encoding} streams.")
        at = _inflate_one(body, at, encoding, gathered, is_given_up)
    return gathered.take()


def _inflate_one(
    body: memoryview, at: int, encoding: Encoding, gathered: Gathered, is_given_up: Callable[[], bool]
) -> int:
    """Inflate the stream at ``at``; return where it ends: gzip may have several.

    The body is given to zlib in pieces, because zlib copies what it does not take.
    """
    stream = zlib.decompressobj(_BITS[encoding])
    given: memoryview | bytes = b""
    try:
        while not stream.eof:
            if is_given_up():
                raise cancelled()
            if not given:
                given = body[at : at + _PIECE]
                at += len(given)
            piece = stream.decompress(given, _PIECE)
            if not piece and not given:
                raise invalid(f"The body ends within its {encoding} stream.")
            given = stream.unconsumed_tail
            gathered.put(memoryview(piece))
    except zlib.error as error:
        raise invalid(f"The body is not a valid {encoding} stream: {error}") from None
    if encoding == "deflate" and (stream.unused_data or at < len(body)):
        raise invalid("The body has bytes after its deflate stream.")
    return at - len(stream.unused_data)


def asked_encoding(accept: bytes | None) -> Encoding:
    """The encoding that a client asks for, by the header Accept-Encoding.

    It asks by naming one only, as Triton's clients do.  A list of all that a client understands, which
    most send by themselves, asks for nothing: tensors take long to compress, and save little.
    """
    match accept.strip().lower() if accept is not None else b"":
        case b"gzip":
            return "gzip"
        case b"deflate":
            return "deflate"
    return ""


def compress(answer: HttpAnswer, encoding: Encoding) -> None:
    """Compress the parts of an answer."""
    stream = zlib.compressobj(_LEVEL, wbits=_BITS[encoding])
    parts: list[Part] = [piece for part in answer.parts if (piece := stream.compress(part))]
    parts.append(stream.flush())
    answer.parts = parts
    answer.headers.append((b"Content-Encoding", encoding.encode()))
