"""Sockets of both kinds: making, naming and tearing down; knows nothing of what messages mean.

Two kinds.  ZeroMQ carries calls and control.  A Unix socket of type SEQPACKET (a :class:`Channel`) carries
what ZeroMQ cannot: descriptors, and the certainty of EOF when the other process is gone.  All addresses are
abstract names (:func:`onnx_dl.transport.addresses.fresh_address`), open to the same user only: ZeroMQ filters by user id,
and :func:`accept` checks the peer's credentials.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from collections.abc import Iterable, Sequence
from typing import Final

import zmq

from onnx_dl.concurrency import primitives, spawning, waits
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.errors import ProtocolError
from onnx_dl.system import descriptor_limits
from onnx_dl.system.owned_descriptors import Descriptor
from onnx_dl.transport.raw_socket import Face

LONGEST: Final = 64 << 10
"""Bytes in one message of a Channel; much more does not fit a Unix socket's buffer everywhere."""

MOST_DESCRIPTORS: Final = 128
"""In one message; Linux allows 253."""

_FULL: Final = 0.005
"""Seconds until a listener whose queue was full is tried again."""

BACKLOG: Final = 4096
"""Connections that may wait to be accepted, as far as the system lets them; others are refused at once."""
_FDS_SPACE: Final = socket.CMSG_SPACE(MOST_DESCRIPTORS * struct.calcsize("i"))
_ZMQ_NEEDS: Final = 12
"""Descriptors of a context with its first socket, and of what others may take meanwhile."""
_ZMQ_THREADS: Final = 3
"""Of a context, which has two, and of what others may take meanwhile."""
_PEERCRED: Final = struct.Struct("3i")
# Plain ints: to combine the enum's members costs 5 µs each time.
_CLOEXEC: Final = int(socket.MSG_CMSG_CLOEXEC)
_TRUNCATED: Final = int(socket.MSG_CTRUNC)
_NO_SIGNAL: Final = int(socket.MSG_NOSIGNAL)
_AT_ONCE: Final = int(socket.MSG_DONTWAIT)
"""An application may have given SIGPIPE back its default, which would end it when a worker is gone."""
Context = zmq.Context[zmq.Socket[bytes]]
Socket = zmq.Socket[bytes]

_IPC_FILTER_UID: Final = 59  # zmq.h: ZMQ_IPC_FILTER_UID; pyzmq has no name for it in its typed options


class Channel:
    """A connected SEQPACKET socket: whole messages, descriptors beside them, EOF when the peer is gone."""

    def __init__(self, sock: socket.socket) -> None:
        self._descriptor = Descriptor(sock.fileno())
        self._sock = Face(sock)
        self._buffer = bytearray(LONGEST)
        self._view = memoryview(self._buffer)

    def __del__(self) -> None:
        # One that nobody holds: Ctrl-C came between two steps.
        if hasattr(self, "_sock"):
            self.close()

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        a, b = primitives.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(a), cls(b)

    @classmethod
    def from_fd(cls, fd: int) -> Channel:
        """Takes over a descriptor that was inherited."""
        sock = primitives.socket(fileno=fd)
        sock.set_inheritable(False)
        return cls(sock)

    @classmethod
    def connect(cls, address: str, deadline: Deadline) -> Channel:
        """Connects to a listener of the same user.

        Raises:
            DeadlinePassed: the listener's queue stayed full.
            OSError: nobody listens at ``address``, or it cannot be reached.
        """
        return cls(connected(socket.SOCK_SEQPACKET, address, deadline))

    def send(self, data: bytes, fds: tuple[int, ...] = ()) -> bool:
        """Sends one message with duplicates of ``fds``; false if the peer is gone, or the program closed this
        end."""
        if not self.is_ours():
            return False
        try:
            if fds:
                socket.send_fds(self._sock, [data], list(fds), _NO_SIGNAL)
            else:
                self._sock.send(data, _NO_SIGNAL)
        except ConnectionError:
            return False
        return True

    def post(self, data: bytes, fds: Sequence[int] = ()) -> bool:
        """Like :meth:`send`, but never waits: a peer that has no room for the message counts as gone."""
        if not self.is_ours():
            return False
        try:
            if fds:
                socket.send_fds(self._sock, [data], fds, _NO_SIGNAL | _AT_ONCE)
            else:
                self._sock.send(data, _NO_SIGNAL | _AT_ONCE)
        except (ConnectionError, BlockingIOError):
            return False
        return True

    def take(self) -> tuple[memoryview, list[int]] | None:
        """Like :meth:`receive`, but a message must be there: does not wait.

        Raises:
            BlockingIOError: there is none.
            OSError: descriptors came, and this process may have no more.
        """
        return self._receive(_AT_ONCE)

    def receive(self, timeout: float | None = None) -> tuple[memoryview, list[int]] | None:
        """One message and its descriptors, which the caller closes; None at EOF.

        The message is valid until the next one is received.

        Raises:
            OSError: descriptors came, and this process may have no more.
            TimeoutError: nothing came within ``timeout`` seconds; 0 does not wait, None waits for ever.
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
        """Whether a small message can be sent without waiting, within ``timeout`` seconds."""
        return self._poll(select.POLLOUT, timeout)

    def readable(self, timeout: float = 0.0) -> bool:
        """Whether a message or EOF is there within ``timeout`` seconds."""
        return self._poll(select.POLLIN, timeout)

    def _poll(self, event: int, timeout: float) -> bool:
        """True at once if this end is closed: neither to send nor to receive would wait then."""
        with contextlib.suppress(ValueError):  # another thread closed it since the look
            if self.is_ours():
                return waits.ready(self.fileno(), event, timeout)
        return True

    def is_dead(self) -> bool:
        """Whether the peer is gone and all its messages are read; does not wait."""
        try:
            return not (self.is_ours() and self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return False
        except OSError:
            return True

    def is_ours(self) -> bool:
        """Whether the program has not closed the descriptor: another file may have its number by now."""
        return self._descriptor.holds()

    @property
    def is_lost(self) -> bool:
        """Whether the program closed the descriptor, and not :meth:`close`."""
        return self._descriptor.is_lost

    def peer_pid(self) -> int:
        return _credentials(self._sock)[0]

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        """May be called twice."""
        self._sock.detach()  # Python's object would close the number, whoever has it
        self._descriptor.close()


def connected(kind: int, address: str, deadline: Deadline) -> socket.socket:
    """A Unix socket that is connected to a listener of the same user.

    Raises:
        DeadlinePassed: the listener's queue stayed full.
        OSError: nobody listens at ``address``, or it cannot be reached.
    """
    sock = primitives.socket(socket.AF_UNIX, kind)
    try:
        sock.setblocking(False)  # else connect() waits without a bound where the queue is full
        while error := sock.connect_ex(f"\0{address}"):
            if error != errno.EAGAIN:
                raise OSError(error, os.strerror(error))
            deadline.check("a listener whose queue is full")
            waits.pause(deadline.step(_FULL) or 0.0)
        sock.setblocking(True)
        _check_user(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def _fds_of(level: int, kind: int, data: bytes) -> list[int]:
    """The descriptors in one control message."""
    if (level, kind) != (socket.SOL_SOCKET, socket.SCM_RIGHTS):
        return []
    return [fd for (fd,) in struct.iter_unpack("i", data[: len(data) - len(data) % 4])]


def close_all(fds: Iterable[int]) -> None:
    """Closes descriptors that came and are of no use."""
    for fd in fds:
        primitives.close(fd)


def _credentials(sock: socket.socket) -> tuple[int, int, int]:
    pid, uid, gid = _PEERCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
    return pid, uid, gid


def _check_user(sock: socket.socket) -> None:
    uid = _credentials(sock)[1]
    if uid != os.getuid():
        raise ProtocolError(f"The process at the other end belongs to user {uid}, not to {os.getuid()}.")


def is_ours(sock: socket.socket) -> int | None:
    """The process at the other end, if it belongs to the same user."""
    try:
        _check_user(sock)
    except ProtocolError:
        return None
    return _credentials(sock)[0]


class Listener:
    """Accepts Channels of the same user at an abstract address."""

    def __init__(self, address: str) -> None:
        self._sock = primitives.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.bind(f"\0{address}")
        self._sock.listen(BACKLOG)
        self._sock.setblocking(False)

    def accept(self) -> Channel | None:
        """A new peer; None if there is none, or it is of another user."""
        try:
            sock, _ = self._sock.accept()
        except OSError:
            return None
        try:
            _check_user(sock)
        except ProtocolError:
            sock.close()
            return None
        sock.setblocking(True)
        return Channel(sock)

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()


def resolve(host: str) -> tuple[int, str]:
    """The family of a host's first TCP address, and the address, to listen at.

    Raises:
        OSError: nobody knows the host.
    """
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = found[0]
    return family, str(address[0])


class Waker:
    """Wakes a poll() in another thread; ``wake`` may be called from anywhere, finalizers included."""

    def __init__(self) -> None:
        self._descriptor = Descriptor(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))

    def is_ours(self) -> bool:
        """Whether the program has not closed the descriptor."""
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


def context() -> Context:
    """A ZeroMQ context; never shared across fork.

    Raises:
        DescriptorsExhausted: this process may have too few more of them.
        ProcessesExhausted: there are no threads for it, without which libzmq ends the process.
    """
    check_descriptors("A ZeroMQ context")
    spawning.check(_ZMQ_THREADS, "A connection to the supervisor")
    return zmq.Context()


def check_descriptors(what: str) -> None:
    """Raises where there are too few: libzmq ends the process where it finds none, in ``epoll_create`` and in
    ``accept``; a connection that lacks one half way says less of why."""
    if descriptor_limits.free() < _ZMQ_NEEDS:
        raise descriptor_limits.exhausted(what)


def _socket(ctx: Context, kind: int) -> Socket:
    sock = ctx.socket(kind)
    sock.linger = 0
    sock.sndhwm = sock.rcvhwm = 0  # control is sparse and must not be dropped; calls are one at a time
    return sock


def dealer(ctx: Context, address: str, identity: bytes) -> Socket:
    """A DEALER socket connected to a ROUTER under a routing id of its own."""
    sock = _socket(ctx, zmq.DEALER)
    sock.routing_id = identity
    sock.connect(f"ipc://@{address}")
    return sock


def pair_listener(ctx: Context, address: str) -> Socket:
    """A bound PAIR socket.  Bind before the peer connects: a connect that comes first costs 100 ms.

    Raises:
        DescriptorsExhausted: this process may have too few more of them.
    """
    check_descriptors("A lane over ZeroMQ")
    sock = _socket(ctx, zmq.PAIR)
    sock.setsockopt(_IPC_FILTER_UID, os.getuid())
    sock.bind(f"ipc://@{address}")
    return sock


def pair(ctx: Context, address: str) -> Socket:
    """A connected PAIR socket.  What was sent before it is closed is delivered, within half a second."""
    sock = _socket(ctx, zmq.PAIR)
    sock.linger = 500
    sock.connect(f"ipc://@{address}")
    return sock


def readable(fds: Iterable[int], timeout: float | None) -> set[int]:
    """Those of these descriptors that are readable within ``timeout`` seconds; None: waits for ever."""
    poll = primitives.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll(waits.milliseconds(timeout))}


def sleep(poll: select.poll, timeout: float | None) -> list[int]:
    """Until one of its descriptors is ready, for so many seconds at most; None: for as long as it takes.

    Returns those that are ready.
    """
    return [fd for fd, _ in poll.poll(waits.milliseconds(timeout))]


def wait(poller: zmq.Poller, timeout: float | None) -> dict[object, int]:
    """Sockets and descriptors that are ready within ``timeout`` seconds; all of them if None."""
    return dict(poller.poll(waits.milliseconds(timeout)))
