"""Unix sockets.  Does not know what messages mean.

A Unix socket of type SEQPACKET (a :class:`Channel`) has what ZeroMQ (:mod:`onnx_dl.transport.zeromq`) lacks:
descriptors, and a reliable EOF when the other process is gone.  All addresses are abstract names
(:func:`fresh_address`), open to the same user only: ZeroMQ filters by user id, and :class:`Listener` checks
the peer's credentials.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import select
import socket
import struct
from collections.abc import Iterable, Sequence
from typing import Final

from onnx_dl import linux_only
from onnx_dl.concurrency import forking, primitives, waits
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.errors import ProtocolError
from onnx_dl.system import descriptor_limits
from onnx_dl.system.owned_descriptors import Descriptor

LONGEST: Final = 64 << 10
"""Bytes in one message of a Channel; much longer ones do not fit a Unix socket's buffer everywhere."""

MOST_DESCRIPTORS: Final = 128
"""Descriptors in one message; Linux allows 253."""

_FULL: Final = 0.005
"""Seconds until a listener with a full queue is tried again."""

BACKLOG: Final = 4096
"""Connections that may wait to be accepted, within the system's limit; others are refused at once."""
_FDS_SPACE: Final = linux_only.function(socket, "CMSG_SPACE", int)(MOST_DESCRIPTORS * struct.calcsize("i"))
_ZMQ_NEEDS: Final = 12
"""Descriptors of a context with its first socket, and a reserve for other threads."""
_PEERCRED: Final = struct.Struct("3i")
# Plain ints: combining members of the enum costs 5 µs each time.
_CLOEXEC: Final = linux_only.flags(socket, "MSG_CMSG_CLOEXEC")
_TRUNCATED: Final = linux_only.flags(socket, "MSG_CTRUNC")
_NO_SIGNAL: Final = linux_only.flags(socket, "MSG_NOSIGNAL")
"""An application may have restored the default of SIGPIPE, which would end it when a worker is gone."""
_AT_ONCE: Final = linux_only.flags(socket, "MSG_DONTWAIT")


class BorrowedSocket(primitives.socket):
    """Methods of a socket that a :class:`Descriptor` closes.  No warning of an unclosed socket where the
    garbage collector finds both in one cycle."""

    def __init__(self, sock: socket.socket) -> None:
        """Takes over the descriptor of ``sock``, which has none afterwards.  Waits have no timeout, whatever
        the program has set by ``socket.setdefaulttimeout``."""
        super().__init__(sock.family, sock.type, sock.proto, sock.fileno())
        sock.detach()
        self.setblocking(True)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it was never made
            self.detach()


class Channel:
    """A connected SEQPACKET socket: whole messages with descriptors, and EOF when the peer is gone."""

    def __init__(self, sock: socket.socket, descriptor: Descriptor | None = None) -> None:
        """Takes over ``sock``, or what :func:`connected` has returned."""
        self._descriptor = descriptor or Descriptor(sock.fileno())
        self._sock = sock if isinstance(sock, BorrowedSocket) else BorrowedSocket(sock)
        self._buffer = bytearray(LONGEST)
        self._view = memoryview(self._buffer)

    def __del__(self) -> None:
        # Not closed before if Ctrl-C came between two steps.
        if hasattr(self, "_sock"):
            self.close()

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        a, b = primitives.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(a), cls(b)

    @classmethod
    def from_fd(cls, fd: int) -> Channel:
        """Take ownership of an inherited descriptor."""
        sock = primitives.socket(fileno=fd)
        sock.set_inheritable(False)
        return cls(sock)

    @classmethod
    def connect(cls, address: str, deadline: Deadline) -> Channel:
        """Connect to a listener of the same user.  Raises like :func:`connected`."""
        return cls(*connected(socket.SOCK_SEQPACKET, address, deadline))

    def send(self, data: bytes, fds: Sequence[int] = ()) -> bool:
        """Send one message with duplicates of ``fds``; false if the peer is gone, or the program has closed
        this end."""
        try:
            return self._send(data, fds, _NO_SIGNAL)
        except ConnectionError:
            return False

    def post(self, data: bytes, fds: Sequence[int] = ()) -> bool:
        """Like :meth:`send`, but does not wait: a peer without room for the message counts as gone."""
        try:
            return self._send(data, fds, _NO_SIGNAL | _AT_ONCE)
        except (ConnectionError, BlockingIOError):
            return False

    def _send(self, data: bytes, fds: Sequence[int], flags: int) -> bool:
        if not self.is_ours():
            return False
        if fds:
            socket.send_fds(self._sock, [data], fds, flags)
        else:
            self._sock.send(data, flags)
        return True

    def take(self) -> tuple[memoryview, list[int]] | None:
        """Like :meth:`receive`, but does not wait; raises BlockingIOError if there is no message."""
        return self._receive(_AT_ONCE)

    def receive(self, timeout: float | None = None) -> tuple[memoryview, list[int]] | None:
        """Receive one message and its descriptors, which the caller closes; None at EOF.

        The message is valid until the next one is received.

        Raises:
            OSError: the message has descriptors, and this process may have no more.
            TimeoutError: no message came within ``timeout`` seconds; 0 does not wait, None waits for ever.
        """
        if timeout is not None and not self.readable(timeout):
            raise TimeoutError("the peer sent nothing in time")
        return self._receive(0)

    def _receive(self, how: int) -> tuple[memoryview, list[int]] | None:
        if not self.is_ours():
            return None
        try:
            size, control, flags, _address = self._sock.recvmsg_into([self._view], _FDS_SPACE, _CLOEXEC | how)
        except ConnectionResetError:
            return None
        fds = [fd for message in control for fd in _fds_of(*message)] if control else []
        if flags & _TRUNCATED:
            close_all(fds)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return (self._view[:size], fds) if size or fds else None

    def writable(self, timeout: float) -> bool:
        """True if a small message can be sent without waiting, within ``timeout`` seconds."""
        return self._poll(select.POLLOUT, timeout)

    def readable(self, timeout: float = 0.0) -> bool:
        """True if a message or EOF arrives within ``timeout`` seconds."""
        return self._poll(select.POLLIN, timeout)

    def _poll(self, event: int, timeout: float) -> bool:
        """True at once if this end is closed: then neither sending nor receiving waits."""
        with contextlib.suppress(ValueError):  # another thread closed it after the check
            if self.is_ours():
                return waits.ready(self.fileno(), event, timeout)
        return True

    def is_dead(self) -> bool:
        """True if the peer is gone and all its messages are read.  Does not wait."""
        try:
            return not (self.is_ours() and self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return False
        except OSError:
            return True

    def is_ours(self) -> bool:
        """True if the descriptor is still open.  If the program closed it, another file may have its
        number."""
        return self._descriptor.holds()

    @property
    def is_lost(self) -> bool:
        """True if the program closed the descriptor, instead of :meth:`close`."""
        return self._descriptor.is_lost

    def peer_pid(self) -> int:
        return _credentials(self._sock)[0]

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        """May be called twice."""
        self._sock.detach()  # Python's object would close the number, even if it is now that of another file
        self._descriptor.close()


def same_secret(sent: str, secret: str) -> bool:
    """True if a peer knows the secret.  Takes the same time for a good guess as for a bad one.  Compares
    bytes: Python refuses text that is not ASCII, and a peer may send any text."""
    return secrets.compare_digest(sent.encode(errors="replace"), secret.encode())


def fresh_address(role: str) -> str:
    """Return a new, unique name for a Unix socket in Linux's abstract namespace.

    An abstract name disappears with its owner, however that dies, so no file is ever left behind.  It has no
    file permissions: a listener checks the peer's user id and asks for a secret.
    """
    return f"onnx-dl/{os.getuid()}/{role}/{secrets.token_hex(16)}"


def connected(kind: int, address: str, deadline: Deadline) -> tuple[BorrowedSocket, Descriptor]:
    """Return a Unix socket of type ``kind`` that is connected to a listener of the same user, and its
    descriptor.

    Raises:
        DeadlinePassed: the listener's queue stayed full.
        OSError: there is no listener at ``address``, or it cannot be reached.
    """
    # A child that another thread forks before the descriptor has an owner would keep it open: the peer would
    # not see that we close it, and would serve us for as long as the child lives.
    with forking.still():
        raw = primitives.socket(socket.AF_UNIX, kind)
        descriptor = Descriptor(raw.fileno())
        sock = BorrowedSocket(raw)
    try:
        sock.setblocking(False)  # else connect() waits for ever if the queue is full
        while error := sock.connect_ex(f"\0{address}"):
            if error != errno.EAGAIN:
                raise OSError(error, os.strerror(error))
            deadline.check("a listener whose queue is full")
            waits.pause(deadline.step(_FULL) or 0.0)
        sock.setblocking(True)
        _check_user(sock)
    except BaseException:
        sock.detach()
        descriptor.close()
        raise
    return sock, descriptor


def _fds_of(level: int, kind: int, data: bytes) -> list[int]:
    """Return the descriptors in one control message."""
    if (level, kind) != (socket.SOL_SOCKET, socket.SCM_RIGHTS):
        return []
    return [fd for (fd,) in struct.iter_unpack("i", data[: len(data) - len(data) % 4])]


def close_all(fds: Iterable[int]) -> None:
    """Close received descriptors that are not needed."""
    for fd in fds:
        primitives.close(fd)


def _credentials(sock: socket.socket) -> tuple[int, int]:
    """Return process id and user id of the other end."""
    pid, uid, _gid = _PEERCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
    return pid, uid


def _check_user(sock: socket.socket) -> None:
    uid = _credentials(sock)[1]
    if uid != os.getuid():
        raise ProtocolError(f"The process at the other end belongs to user {uid}, not to {os.getuid()}.")


def same_user(sock: socket.socket) -> int | None:
    """Return the process id of the other end; None if it belongs to another user."""
    pid, uid = _credentials(sock)
    return pid if uid == os.getuid() else None


class Listener:
    """Accepts Channels of the same user at an abstract address."""

    def __init__(self, address: str) -> None:
        self._sock = primitives.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.bind(f"\0{address}")
        self._sock.listen(BACKLOG)
        self._sock.setblocking(False)

    def accept(self) -> Channel | None:
        """Accept a connection; None if there is none, or its peer belongs to another user."""
        try:
            sock, _ = self._sock.accept()
        except OSError:
            return None
        if same_user(sock) is None:
            sock.close()
            return None
        sock.setblocking(True)
        return Channel(sock)

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()


def resolve(host: str) -> tuple[int, str]:
    """Return the family and text of a host's first TCP address, to listen at; raises OSError if unknown."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = found[0]
    return family, str(address[0])


class Waker:
    """Wakes a poll() in another thread.  ``wake`` may be called anywhere, also in finalizers."""

    def __init__(self) -> None:
        self._descriptor = Descriptor(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))

    def is_ours(self) -> bool:
        """True if the descriptor is open: the program may have closed it."""
        return self._descriptor.holds()

    def wake(self) -> None:
        if self._descriptor.holds():
            os.eventfd_write(self._descriptor.number, 1)

    def clear(self) -> None:
        if self._descriptor.holds():
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._descriptor.number)

    def fileno(self) -> int:
        """-1 in a forked child."""
        return self._descriptor.number


def check_descriptors(what: str) -> None:
    """Raise DescriptorsExhausted if too few are left.  libzmq ends the process if it finds none, in
    ``epoll_create`` and ``accept``.  And a connection that fails half way has a less clear error."""
    if descriptor_limits.free() < _ZMQ_NEEDS:
        raise descriptor_limits.exhausted(what)


def readable(fds: Iterable[int], timeout: float | None) -> set[int]:
    """Return which descriptors are readable within ``timeout`` seconds; None waits for ever."""
    poll = primitives.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return set(sleep(poll, timeout))


def sleep(poll: select.poll, timeout: float | None) -> list[int]:
    """Return which descriptors of ``poll`` are ready within ``timeout`` seconds; None waits for ever."""
    return [fd for fd, _ in poll.poll(waits.milliseconds(timeout))]
