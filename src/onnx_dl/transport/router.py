"""The supervisor's control socket: what ZeroMQ calls a ROUTER, without libzmq.

Its peers are libzmq's DEALERs.  libzmq itself ends the process when ``accept`` finds no descriptor
(``ipc_listener.cpp``, also in 4.3.5), and whoever connects takes one; and it would keep what is sent to a
client that never reads, without a bound.  Here both are decisions.  Used by one thread.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Final

from onnx_dl.errors import ProtocolError
from onnx_dl.system import descriptor_limits, process_setup
from onnx_dl.transport import zmtp
from onnx_dl.transport.handshakes import Silence
from onnx_dl.transport.sockets import BACKLOG, is_ours

MOST_UNREAD: Final = 64 << 20
"""Bytes that wait for a peer to read; one that lets more wait is not to be waited for."""
_CHUNK: Final = 1 << 18
_AT_ONCE: Final = 1 << 20
"""Bytes that are read from one peer before the others have their turn."""
_BATCH: Final = 64


class _Peer:
    """One connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.reader = zmtp.Reader()
        self.unsent = bytearray(zmtp.GREETING + zmtp.ready(Socket_Type=b"ROUTER", Identity=b""))
        self.gone = False

    def flush(self) -> None:
        """Sends what it takes now."""
        try:
            while self.unsent:
                sent = self.sock.send(memoryview(self.unsent)[:_CHUNK], socket.MSG_NOSIGNAL)
                del self.unsent[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self.gone = True
            self.unsent.clear()

    def read(self) -> Iterator[bytes]:
        """The messages that have come.

        Raises:
            ProtocolError: it does not speak the protocol.
        """
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
    """Listens at an abstract address.  Messages are routed by the names that peers give themselves."""

    def __init__(self, address: str, reserve: int, expected: Callable[[bytes], bool]) -> None:
        """
        Args:
            reserve: descriptors that stay free; with fewer, who connects is sent away, and comes again.
            expected: whether a peer of this name may be here; others are sent away.

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
        self._spare: int | None = process_setup.nothing()
        """Given up for a moment to accept, and send away, when there is no other descriptor."""
        self._peers: dict[int, _Peer] = {}
        self._by_name: dict[bytes, _Peer] = {}
        self._silence = Silence()

    def fileno(self) -> int:
        """Readable when :meth:`receive` has something to do."""
        return self._epoll.fileno()

    def receive(self, now: float) -> list[tuple[bytes, bytes]]:
        """What has come: who says it, and what."""
        found: list[tuple[bytes, bytes]] = []
        for fd, events in self._epoll.poll(0):
            if fd == self._listener.fileno():
                self._accept(now)
            elif (peer := self._peers.get(fd)) is not None:
                self._attend(peer, events, found)
        return found

    def send(self, name: bytes, data: bytes) -> None:
        """Sends it as far as the peer takes it, and the rest when it does.  Nobody of this name is there: it
        is dropped.

        Raises:
            BufferError: the peer does not read.
        """
        peer = self._by_name.get(name)
        if peer is None:
            return
        if len(peer.unsent) + len(data) > MOST_UNREAD + zmtp.LONGEST_READY and peer.unsent:
            raise BufferError(f"A peer has left {len(peer.unsent)} bytes unread.")
        peer.unsent += zmtp.frame(data)
        self._flush(peer)

    def unread(self, name: bytes) -> int | None:
        """Bytes that wait for this peer to read; None: nobody of this name is there."""
        peer = self._by_name.get(name)
        return None if peer is None else len(peer.unsent)

    def forget(self, name: bytes) -> None:
        """The peer of this name is gone, or to go."""
        if (peer := self._by_name.get(name)) is not None:
            self._drop(peer)

    def next_deadline(self) -> float | None:
        """When :meth:`on_tick` has something to do."""
        return self._silence.next_deadline()

    def on_tick(self, now: float) -> None:
        """Closes connections that say nothing."""
        for fd in self._silence.overdue(now):
            self._drop(self._peers[fd])

    def close(self, linger: float) -> None:
        """Ends all connections, when all is sent or after so many seconds."""
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
        if self._spare is not None:
            os.close(self._spare)

    # --- connections --------------------------------------------------------------------------------------

    def _attend(self, peer: _Peer, events: int, found: list[tuple[bytes, bytes]]) -> None:
        if events & select.EPOLLOUT:
            peer.flush()
        try:
            heard = list(peer.read())
            if peer.reader.identity is not None and self._is_known(peer):
                found += [(peer.reader.identity, data) for data in heard]
        except ProtocolError:  # nobody that we know
            peer.gone = True
        if peer.gone:
            self._drop(peer)
        else:
            self._flush(peer)

    def _is_known(self, peer: _Peer) -> bool:
        """Whether it may be here; if so, it is known by its name from now on."""
        name = peer.reader.identity or b""
        known = self._by_name.get(name)
        if known is None and self._expected(name):
            self._silence.left(peer.sock.fileno())
            known = self._by_name[name] = peer
        if known is not peer:
            peer.gone = True
        return known is peer

    def _flush(self, peer: _Peer) -> None:
        peer.flush()
        if not peer.gone and peer.sock.fileno() in self._peers:
            wanted = select.EPOLLIN | (select.EPOLLOUT if peer.unsent else 0)
            self._epoll.modify(peer.sock, wanted)

    def _accept(self, now: float) -> None:
        count = 0
        while count < _BATCH and (sock := self._accepted()) is not None:
            count += 1
            self._let_in(sock, now)
        if not count and not descriptor_limits.free() and self._spare is not None:
            os.close(self._spare)
            self._spare = None
            if (sock := self._accepted()) is not None:
                sock.close()
        if self._spare is None:
            with contextlib.suppress(OSError):
                self._spare = process_setup.nothing()

    def _accepted(self) -> socket.socket | None:
        try:
            return self._listener.accept()[0]
        except OSError:
            return None

    def _let_in(self, sock: socket.socket, now: float) -> None:
        if descriptor_limits.free() < self._reserve and (oldest := self._silence.oldest()) is not None:
            self._drop(self._peers[oldest])  # who says nothing makes way
        pid = is_ours(sock)
        if pid is None or descriptor_limits.free() < self._reserve:
            sock.close()
            return
        sock.setblocking(False)
        peer = self._peers[sock.fileno()] = _Peer(sock)
        self._silence.came(sock.fileno(), pid, now)
        self._epoll.register(sock, select.EPOLLIN)
        self._flush(peer)

    def _drop(self, peer: _Peer) -> None:
        fd = peer.sock.fileno()
        if self._peers.pop(fd, None) is None:
            return
        self._silence.left(fd)
        if peer.reader.identity is not None and self._by_name.get(peer.reader.identity) is peer:
            del self._by_name[peer.reader.identity]
        self._epoll.unregister(fd)
        peer.sock.close()
