"""One end of the Unix socket pair between two processes of a server: whole messages, with descriptors.

On the wire: length of the message and number of its descriptors (two little-endian 32-bit numbers), then the
message.  Descriptors travel beside the first byte of their message.
"""

from __future__ import annotations

import array
import asyncio
import collections
import logging
import os
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Final, Generic, NamedTuple, TypeVar

import msgspec

_HEAD: Final = struct.Struct("<II")
_CHUNK: Final = 1 << 18
_MOST_BYTES: Final = 1 << 28
"""Largest message; a table of a hundred thousand models is smaller."""
_MOST_DESCRIPTORS: Final = 16
_SPACE: Final = socket.CMSG_SPACE(_MOST_DESCRIPTORS * array.array("i").itemsize)

_In = TypeVar("_In")
_log: Final = logging.getLogger("onnx_dl.server")


class LinkError(Exception):
    """The other end sent what is no message."""


class _Unsent(NamedTuple):
    data: memoryview
    fds: list[int]
    """Duplicates, which are closed when they are sent."""


class Link(Generic[_In]):
    """A connected stream socket of the running event loop.  All methods belong to its thread.

    ``receive(message, fds)`` is called for each message, in order, and owns the descriptors.  ``lost()`` is
    called once, when the other process is gone or what it sends is no message.
    """

    def __init__(
        self,
        sock: socket.socket,
        decoder: msgspec.msgpack.Decoder[_In],
        receive: Callable[[_In, list[int]], None],
        lost: Callable[[], None],
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._decoder = decoder
        self._receive = receive
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._unsent: collections.deque[_Unsent] = collections.deque()
        self._read = bytearray()
        self._fds: collections.deque[int] = collections.deque()
        self.is_open = True
        self._loop.add_reader(sock.fileno(), self._on_readable)

    def send(self, message: msgspec.Struct, fds: Sequence[int] = ()) -> None:
        """Sends a message with duplicates of these descriptors, as soon as there is room for it.  Does
        nothing if the link is closed."""
        if not self.is_open:
            return
        body = msgspec.msgpack.encode(message)
        data = memoryview(_HEAD.pack(len(body), len(fds)) + body)
        was_empty = not self._unsent
        self._unsent.append(_Unsent(data, [os.dup(fd) for fd in fds]))
        if was_empty:
            self._flush()

    def close(self) -> None:
        """May be called twice.  What is not sent yet is dropped."""
        if not self.is_open:
            return
        self.is_open = False
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for fd in (*self._fds, *(fd for unsent in self._unsent for fd in unsent.fds)):
            os.close(fd)
        self._fds.clear()
        self._unsent.clear()

    def _end(self) -> None:
        if self.is_open:
            self.close()
            self._lost()

    def _flush(self) -> None:
        while self.is_open and self._unsent:
            data, fds = self._unsent[0]
            try:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                sent = self._sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                self._loop.add_writer(self._sock.fileno(), self._flush)
                return
            except OSError:
                self._end()
                return
            for fd in fds:
                os.close(fd)
            if sent == len(data):
                self._unsent.popleft()
            else:
                self._unsent[0] = _Unsent(data[sent:], [])
        if self.is_open:
            self._loop.remove_writer(self._sock.fileno())

    def _on_readable(self) -> None:
        try:
            data, control, flags, _ = self._sock.recvmsg(_CHUNK, _SPACE, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._end()
            return
        for _level, _kind, content in control:
            found = array.array("i")
            found.frombytes(content[: len(content) - len(content) % found.itemsize])
            self._fds.extend(found)
        if not data or flags & socket.MSG_CTRUNC:
            self._end()
            return
        self._read += data
        try:
            self._take()
        except (LinkError, msgspec.DecodeError) as error:
            _log.error("a message between processes of the server is not valid: %s", error)
            self._end()
        except Exception:  # of a handler: without an answer, the other side would wait for nothing
            _log.exception("a message between processes of the server failed")
            self._end()

    def _take(self) -> None:
        """Hands on all messages that have arrived whole."""
        while self.is_open and len(self._read) >= _HEAD.size:
            size, count = _HEAD.unpack_from(self._read)
            if size > _MOST_BYTES or count > _MOST_DESCRIPTORS:
                raise LinkError(f"a message of {size} bytes with {count} descriptors")
            if len(self._read) < _HEAD.size + size:
                return
            if len(self._fds) < count:
                raise LinkError("descriptors are missing")
            with memoryview(self._read) as view:
                message = self._decoder.decode(view[_HEAD.size : _HEAD.size + size])
            del self._read[: _HEAD.size + size]
            self._receive(message, [self._fds.popleft() for _ in range(count)])


class Tickets:
    """Questions that wait for an answer, each with a future.  All methods belong to the loop's thread."""

    def __init__(self) -> None:
        self._waiting: dict[int, asyncio.Future[object]] = {}
        self._last = 0

    def open(self) -> tuple[int, asyncio.Future[object]]:
        """A new ticket, and the future of its answer."""
        self._last += 1
        ticket = self._last
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = future
        future.add_done_callback(lambda _: self._waiting.pop(ticket, None))
        return ticket, future

    def answer(self, ticket: int, message: object) -> None:
        """Sets the answer; an unknown ticket is ignored: its asker has given up."""
        if (future := self._waiting.get(ticket)) is not None and not future.done():
            future.set_result(message)

    def fail(self, error: Exception) -> None:
        """Ends all waits."""
        for future in list(self._waiting.values()):
            if not future.done():
                future.set_exception(error)
