"""The supervisor's control socket: a ZeroMQ ROUTER without libzmq.

Its peers are DEALERs, of libzmq or our own.  libzmq itself ends the process when ``accept`` finds no
descriptor (``ipc_listener.cpp``, also in 4.3.5), and every connection takes one.  It also keeps messages for
a client that never reads, without a limit.  Here both cases are handled.  Used by one thread.
"""

from __future__ import annotations

import functools
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Final

from onnx_dl.errors import ProtocolError
from onnx_dl.system import descriptor_limits
from onnx_dl.transport import zmtp
from onnx_dl.transport.handshakes import SilentPeers, SpareDescriptor
from onnx_dl.transport.sockets import BACKLOG, same_user

MOST_UNREAD: Final = 64 << 20
"""Unread bytes of a peer; a peer with more is disconnected."""
_CHUNK: Final = 1 << 18
_AT_ONCE: Final = 1 << 20
"""Bytes that are read from one peer before the other peers."""


class _Peer:
    """One connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.reader = zmtp.FrameReader()
        self.unsent = bytearray(zmtp.GREETING + zmtp.ready(Socket_Type=b"ROUTER", Identity=b""))
        self.gone = False

    def flush(self) -> None:
        """Send as much as the peer takes now."""
        try:
            while self.unsent:
                with memoryview(self.unsent) as unsent, unsent[:_CHUNK] as chunk:
                    sent = self.sock.send(chunk, socket.MSG_NOSIGNAL)
                del self.unsent[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self.gone = True
            self.unsent.clear()

    def read(self) -> Iterator[bytes]:
        """Return the messages that have arrived; raises ProtocolError if they are not of the protocol."""
        taken = 0
        while taken < _AT_ONCE and not self.gone:
            try:
                data = self.sock.recv(_CHUNK)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            self.gone = not data
            taken += len(data)
            yield from self.reader.feed(data)


class Router:
    """Listens at an abstract address.  Messages are routed by the names that peers choose."""

    def __init__(self, address: str, reserve: int, expected: Callable[[bytes], bool]) -> None:
        """
        Args:
            reserve: descriptors that stay free; with fewer, new connections are closed, and come again.
            expected: whether a peer of this name may connect; others are disconnected.

        Raises:
            OSError: this process may have no more descriptors.
        """
        self._reserve = reserve
        self._expected = expected
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(f"\0{address}")
        self._listener.listen(BACKLOG)
        self._listener.setblocking(False)
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._spare = SpareDescriptor()
        self._peers: dict[int, _Peer] = {}
        self._by_name: dict[bytes, _Peer] = {}
        self._silent = SilentPeers()

    def fileno(self) -> int:
        """Readable when :meth:`receive` has something to do."""
        return self._epoll.fileno()

    def receive(self, now: float) -> list[tuple[bytes, bytes]]:
        """Return the messages that have arrived, each with its sender's name."""
        found: list[tuple[bytes, bytes]] = []
        for fd, events in self._epoll.poll(0):
            if fd == self._listener.fileno():
                self._spare.accept_all(
                    self._accepted, functools.partial(self._admit, now), socket.socket.close
                )
            elif (peer := self._peers.get(fd)) is not None:
                self._attend(peer, events, found)
        return found

    def send(self, name: bytes, data: bytes) -> None:
        """Send a message; the rest waits if the peer does not take all of it now.  Without a peer of this
        name it is dropped.  Raises BufferError if the peer does not read."""
        peer = self._by_name.get(name)
        if peer is None:
            return
        if len(peer.unsent) + len(data) > MOST_UNREAD + zmtp.LONGEST_READY and peer.unsent:
            raise BufferError(f"A peer has left {len(peer.unsent)} bytes unread.")
        peer.unsent += zmtp.frame(data)
        self._flush(peer)

    def unread(self, name: bytes) -> int | None:
        """Return the unsent bytes of this peer; None: it is not connected."""
        peer = self._by_name.get(name)
        return None if peer is None else len(peer.unsent)

    def forget(self, name: bytes) -> None:
        """Disconnect the peer of this name."""
        if (peer := self._by_name.get(name)) is not None:
            self._drop(peer)

    def next_deadline(self) -> float | None:
        """Return when :meth:`on_tick` has something to do."""
        return self._silent.next_deadline()

    def on_tick(self, now: float) -> None:
        """Close connections that are silent for too long."""
        for fd in self._silent.overdue(now):
            self._drop(self._peers[fd])

    def close(self, linger: float) -> None:
        """Close all connections when everything is sent, or after ``linger`` seconds."""
        self._listener.close()
        deadline = time.monotonic() + linger
        while any(peer.unsent for peer in self._by_name.values()):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            for fd, _ in self._epoll.poll(left):
                if (peer := self._peers.get(fd)) is not None:
                    self._attend(peer, select.EPOLLOUT | select.EPOLLIN, [])
        for peer in list(self._peers.values()):
            self._drop(peer)
        self._epoll.close()
        self._spare.close()

    # --- connections --------------------------------------------------------------------------------------

    def _attend(self, peer: _Peer, events: int, found: list[tuple[bytes, bytes]]) -> None:
        if events & select.EPOLLOUT:
            peer.flush()
        try:
            received = list(peer.read())
            if peer.reader.identity is not None and self._is_known(peer):
                found += [(peer.reader.identity, data) for data in received]
        except ProtocolError:
            peer.gone = True
        if peer.gone:
            self._drop(peer)
        else:
            self._flush(peer)

    def _is_known(self, peer: _Peer) -> bool:
        """True if the peer may connect; if so, register its name."""
        name = peer.reader.identity or b""
        known = self._by_name.get(name)
        if known is None and self._expected(name):
            self._silent.remove(peer.sock.fileno())
            known = self._by_name[name] = peer
        if known is not peer:
            peer.gone = True
        return known is peer

    def _flush(self, peer: _Peer) -> None:
        peer.flush()
        if not peer.gone and peer.sock.fileno() in self._peers:
            wanted = select.EPOLLIN | (select.EPOLLOUT if peer.unsent else 0)
            self._epoll.modify(peer.sock, wanted)

    def _accepted(self) -> socket.socket | None:
        try:
            return self._listener.accept()[0]
        except OSError:
            return None

    def _admit(self, now: float, sock: socket.socket) -> None:
        if descriptor_limits.free() < self._reserve and (oldest := self._silent.oldest()) is not None:
            self._drop(self._peers[oldest])  # silent peers are closed first
        pid = same_user(sock)
        if pid is None or descriptor_limits.free() < self._reserve:
            sock.close()
            return
        sock.setblocking(False)
        peer = self._peers[sock.fileno()] = _Peer(sock)
        self._silent.add(sock.fileno(), pid, now)
        self._epoll.register(sock, select.EPOLLIN)
        self._flush(peer)

    def _drop(self, peer: _Peer) -> None:
        fd = peer.sock.fileno()
        if self._peers.pop(fd, None) is None:
            return
        self._silent.remove(fd)
        if peer.reader.identity is not None and self._by_name.get(peer.reader.identity) is peer:
            del self._by_name[peer.reader.identity]
        self._epoll.unregister(fd)
        peer.sock.close()
