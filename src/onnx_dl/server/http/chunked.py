"""Decoder of chunked bodies, strict.  Pure."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Final

from onnx_dl.server.v2.failures import invalid

_MOST_LINE: Final = 256
"""Bytes of the line with a chunk's size, extensions included."""
_MOST_TRAILERS: Final = 8 << 10
_HEX: Final = frozenset(b"0123456789abcdefABCDEF")
_MOST_DIGITS: Final = 15


class _State(enum.Enum):
    SIZE = enum.auto()
    DATA = enum.auto()
    END_OF_DATA = enum.auto()
    TRAILERS = enum.auto()
    DONE = enum.auto()


class ChunkDecoder:
    """Takes the bytes of a body in pieces and hands out what they carry.

    Trailers are skipped.  Lines end with CRLF only: whoever accepts less may see other borders of requests
    than a proxy does.
    """

    def __init__(self, sink: Callable[[memoryview], None]) -> None:
        """``sink`` gets the data, as views that are valid during the call."""
        self._sink = sink
        self._state = _State.SIZE
        self._left = 0
        self._line = bytearray()
        self._trailers = 0

    @property
    def is_complete(self) -> bool:
        return self._state is _State.DONE

    def feed(self, data: memoryview) -> int:
        """Take bytes; return how many belong to this body.

        Raises:
            RequestFailure: 400: they are not chunks.
        """
        at = 0
        while at < len(data) and self._state is not _State.DONE:
            if self._state is _State.DATA:
                step = min(self._left, len(data) - at)
                self._sink(data[at : at + step])
                self._left -= step
                at += step
                if not self._left:
                    self._state = _State.END_OF_DATA
            else:
                at += self._feed_line(data[at:])
        return at

    def _feed_line(self, data: memoryview) -> int:
        """Take bytes up to the end of a line."""
        piece = bytes(data[: _MOST_LINE + 2])
        end = piece.find(b"\n")
        taken = len(piece) if end < 0 else end + 1
        self._line += piece[:taken]
        if self._state is _State.TRAILERS:
            self._trailers += taken
        if len(self._line) > _MOST_LINE or self._trailers > _MOST_TRAILERS:
            raise invalid("A line between the chunks of the body is too long.")
        if end >= 0:
            if not self._line.endswith(b"\r\n"):
                raise invalid("A line between the chunks of the body does not end with CRLF.")
            line = bytes(self._line[:-2])
            self._line.clear()
            self._end_line(line)
        return taken

    def _end_line(self, line: bytes) -> None:
        match self._state:
            case _State.SIZE:
                self._left = chunk_size(line)
                self._state = _State.DATA if self._left else _State.TRAILERS
            case _State.END_OF_DATA:
                if line:
                    raise invalid("A chunk of the body is longer than its size.")
                self._state = _State.SIZE
            case _State.TRAILERS if not line:
                self._state = _State.DONE


def chunk_size(line: bytes) -> int:
    """The number of bytes that follow, of the line before a chunk."""
    digits = line.partition(b";")[0].rstrip(b" \t")
    if not digits or len(digits) > _MOST_DIGITS or not _HEX.issuperset(digits):
        raise invalid("A chunk of the body has no valid size.")
    return int(digits, 16)
