"""ZeroMQ sockets: the workers' control sockets, and lanes over ZeroMQ."""

from __future__ import annotations

import errno
import os
from typing import Final

import zmq

from onnx_dl.concurrency import spawning, waits
from onnx_dl.transport.sockets import check_descriptors

Context = zmq.Context[zmq.Socket[bytes]]
Socket = zmq.Socket[bytes]

_IPC_FILTER_UID: Final = 59  # ZMQ_IPC_FILTER_UID of zmq.h; not among pyzmq's typed options
_THREADS: Final = 3
"""Two threads of a context, and a reserve for other threads."""


def context() -> Context:
    """Create a ZeroMQ context; never shared across fork.

    Raises:
        DescriptorsExhausted: too few descriptors are left.
        ProcessesExhausted: no thread is left for it; then libzmq would end the process.
    """
    check_descriptors("A ZeroMQ context")
    spawning.check(_THREADS, "A connection to the supervisor")
    return zmq.Context()


def _socket(ctx: Context, kind: int) -> Socket:
    sock = ctx.socket(kind)
    sock.linger = 0
    # No limits: control messages are few and must not be dropped; a lane has one call at a time.
    sock.sndhwm = sock.rcvhwm = 0
    return sock


def dealer(ctx: Context, address: str, identity: bytes) -> Socket:
    """Return a DEALER socket with this routing id, connected to a ROUTER."""
    sock = _socket(ctx, zmq.DEALER)
    sock.routing_id = identity
    sock.connect(f"ipc://@{address}")
    return sock


def pair_listener(ctx: Context, address: str) -> Socket:
    """Return a bound PAIR socket.  Bind before the peer connects: else its connect takes 100 ms.

    Raises:
        OSError: too few descriptors are left.
        ConnectionError: the context ends.
    """
    check_descriptors("A lane over ZeroMQ")
    try:
        sock = _socket(ctx, zmq.PAIR)
        sock.setsockopt(_IPC_FILTER_UID, os.getuid())
        sock.bind(f"ipc://@{address}")
    except zmq.ZMQError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise OSError(error.errno, str(error)) from error
        raise ConnectionError(str(error)) from error
    return sock


def pair(ctx: Context, address: str) -> Socket:
    """Return a connected PAIR socket.  Messages sent before its close are delivered within half a second."""
    sock = _socket(ctx, zmq.PAIR)
    sock.linger = 500
    sock.connect(f"ipc://@{address}")
    return sock


def wait(poller: zmq.Poller, timeout: float | None) -> dict[object, int]:
    """Return which sockets and descriptors are ready within ``timeout`` seconds; None waits for ever."""
    return dict(poller.poll(waits.milliseconds(timeout)))
