"""A reader of protobuf's wire format in a file: the fields of a message, without their contents.

It seeks over what nobody asks for, so a model of gigabytes takes as long as one with the same number of
fields.  The file may have any content.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_WINDOW: Final = 64 << 10
"""Bytes that are read at once, for short fields that follow each other."""
_FAR: Final = 512
"""Bytes that are read at once behind a field that was longer than a window."""
_MOST_FIELDS: Final = 3_000_000
"""Fields of one file; more take longer than anybody waits."""
_CLOCK_INTERVAL: Final = 64
"""Fields between two looks at the clock."""


class NotAMessage(ValueError):
    """The bytes are no message of protobuf."""


class Field(NamedTuple):
    """One field.  ``value``: the number of a varint, else 0; ``start`` and ``end``: where the bytes of the
    others lie in the file."""

    number: int
    wire: int
    value: int
    start: int
    end: int


class WireReader:
    """Reads one file of ``size`` bytes.

    Args:
        read: ``read(count, offset)`` returns that many bytes, or fewer at the end, as ``os.pread`` does; it
            may raise OSError.
        until: monotonic time at which reading ends with :class:`NotAMessage`; None: there is none.
        most_fields: fields after which it ends in this way.
    """

    def __init__(
        self,
        read: Callable[[int, int], bytes],
        size: int,
        *,
        until: float | None = None,
        most_fields: int = _MOST_FIELDS,
    ) -> None:
        self._read = read
        self._until = until
        self._most_fields = most_fields
        self.size = size
        self._window = b""
        self._at = 0
        self._fields = 0

    def fields(self, start: int, end: int) -> Iterator[Field]:
        """The fields of a message.

        Raises:
            NotAMessage: these bytes are none; fields before the fault were yielded.
        """
        at = start
        while at < end:
            self._fields += 1
            if self._fields % _CLOCK_INTERVAL == 0:
                self._check_limits()
            tag, at = self._varint(at)
            number, wire = tag >> 3, tag & 7
            if not number:
                raise NotAMessage("a field has no number")
            value, first = 0, at
            if wire == VARINT:
                value, at = self._varint(at)
            elif wire == BYTES:
                length, first = self._varint(at)
                at = first + length
            elif wire in (FIXED64, FIXED32):
                at += 8 if wire == FIXED64 else 4
            else:
                raise NotAMessage(f"wire type {wire}")
            if at > end:
                raise NotAMessage("a field is longer than its message, or the file is cut off")
            yield Field(number, wire, value, first, at)

    def data(self, field: Field) -> bytes:
        """The bytes of a field; fewer if the file has become shorter."""
        offset = field.start - self._at
        end = offset + field.end - field.start
        if offset >= 0 and end <= len(self._window):
            return self._window[offset:end]
        return self._read(field.end - field.start, field.start)

    def text(self, field: Field, most: int = 4096) -> str:
        """The text of a field, of at most this many bytes.  Raises NotAMessage."""
        if field.wire != BYTES or field.end - field.start > most:
            raise NotAMessage(f"field {field.number} is no text of at most {most} bytes")
        try:
            return self.data(field).decode()
        except UnicodeDecodeError:
            raise NotAMessage(f"field {field.number} is not UTF-8") from None

    def _check_limits(self) -> None:
        if self._fields > self._most_fields:
            raise NotAMessage(f"it has more than {self._most_fields} fields")
        if self._until is not None and time.monotonic() >= self._until:
            raise NotAMessage("it is too large to be read in this time")

    def _varint(self, at: int) -> tuple[int, int]:
        """A number, and where the next byte is."""
        value = shift = 0
        while shift <= 63:
            offset = at - self._at
            if not 0 <= offset < len(self._window):
                near = 0 <= offset <= len(self._window) + _FAR
                self._window, self._at, offset = self._read(_WINDOW if near else _FAR, at), at, 0
                if not self._window:
                    raise NotAMessage("it ends within a field")
            byte = self._window[offset]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value & (2**64 - 1), at
        raise NotAMessage("a number has more than 64 bits")
