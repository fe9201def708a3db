"""ZeroMQ's wire protocol (ZMTP 3.0 without security), the part that a ROUTER and DEALERs need.  Pure.

See rfc.zeromq.org/spec/23.  Works on bytes; :mod:`onnx_dl.transport.router` has the sockets.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from onnx_dl.errors import ProtocolError

GREETING: Final = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
"""Signature, version 3.0, mechanism, and as-server = 0."""
_MORE, _LONG, _COMMAND = 1, 2, 4
_SHORT_SIZE: Final = 255
_LENGTH: Final = struct.Struct(">Q")
_PROPERTY: Final = struct.Struct(">I")
LONGEST_READY: Final = 1024
"""Bytes of a handshake frame."""
LONGEST: Final = 1 << 30
"""Bytes of a message."""


def frame(data: bytes, kind: int = 0) -> bytes:
    """Return one frame: a whole message or a command."""
    if len(data) > _SHORT_SIZE:
        return bytes([kind | _LONG]) + _LENGTH.pack(len(data)) + data
    return bytes([kind, len(data)]) + data


def ready(**properties: bytes) -> bytes:
    """Return the command that ends the handshake; ``_`` in a name stands for ``-``."""
    parts = [b"\x05READY"]
    for name, value in properties.items():
        key = name.replace("_", "-").encode()
        parts += [bytes([len(key)]), key, _PROPERTY.pack(len(value)), value]
    return frame(b"".join(parts), _COMMAND)


class FrameReader:
    """Decodes the bytes of one peer, in pieces of any size."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._greeted = False
        self._parts = 0
        """Frames of the present message so far, if it has several."""
        self.identity: bytes | None = None
        """The peer's routing id after the handshake; empty: it has none."""

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Return the messages that these bytes complete.  Skips messages of several frames: none are in use.
        Raises ProtocolError if the peer does not speak this protocol."""
        self._data += data
        if not self._greet():
            return
        while (found := self._frame()) is not None:
            kind, body = found
            if kind & _COMMAND:
                self._handle_command(body)
            elif self.identity is None:
                raise ProtocolError("A peer on the control socket sent a message before it was ready.")
            elif kind & _MORE:
                self._parts += 1
            else:
                parts, self._parts = self._parts, 0
                if not parts:
                    yield body

    def _greet(self) -> bool:
        if self._greeted:
            return True
        data = self._data
        if (data and data[0] != GREETING[0]) or (len(data) > 10 and data[10] < 3):
            raise ProtocolError("A peer on the control socket does not speak ZMTP 3.")
        if len(data) < len(GREETING):
            return False
        if data[12:32] != GREETING[12:32]:
            raise ProtocolError("A peer on the control socket uses another mechanism than NULL.")
        del data[: len(GREETING)]
        self._greeted = True
        return True

    def _frame(self) -> tuple[int, bytes] | None:
        """Return kind and body of the next frame; None: it is incomplete."""
        data = self._data
        if len(data) < 2:
            return None
        kind = data[0]
        start = 9 if kind & _LONG else 2
        if len(data) < start:
            return None
        size = _LENGTH.unpack_from(data, 1)[0] if kind & _LONG else data[1]
        if kind > 7 or size > (LONGEST_READY if self.identity is None else LONGEST):
            raise ProtocolError("A peer on the control socket sent an impossible frame.")
        if len(data) < start + size:
            return None
        body = bytes(data[start : start + size])
        del data[: start + size]
        return kind, body

    def _handle_command(self, command: bytes) -> None:
        """Finish the handshake.  Later commands are ignored."""
        if self.identity is None:
            if not command.startswith(b"\x05READY"):
                raise ProtocolError("A peer on the control socket did not send READY.")
            self.identity = _properties(command[6:]).get(b"identity", b"")


def _properties(data: bytes) -> dict[bytes, bytes]:
    found = {}
    try:
        while data:
            name, data = data[1 : 1 + data[0]], data[1 + data[0] :]
            (size,) = _PROPERTY.unpack_from(data)
            found[name.lower()], data = data[4 : 4 + size], data[4 + size :]
    except struct.error:
        raise ProtocolError("A peer on the control socket sent malformed properties.") from None
    return found
