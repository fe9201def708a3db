"""The applications that a supervisor serves: who they are, whether they live, and the memory they hand over.

Covers their lifelines.  What they ask for on the control socket is :mod:`onnx_dl.supervisor.loop`'s.  Used by
the supervisor's one thread only.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Container, Iterator
from typing import Final

from onnx_dl.errors import ProtocolError
from onnx_dl.protocol import codec, control
from onnx_dl.supervisor.boundary import boundary
from onnx_dl.supervisor.processes.worker_processes import RESERVE
from onnx_dl.system import descriptor_limits
from onnx_dl.transport import sockets
from onnx_dl.transport.handshakes import Handshakes
from onnx_dl.transport.sockets import Channel

_COST: Final = 3
"""Descriptors of one client: its lifeline, its process, its control connection."""
_MOST: Final = 64
"""Connections of one process; each of its hosts has one."""


class Client:
    """One application process."""

    def __init__(self, lifeline: Channel) -> None:
        self.lifeline = lifeline
        self.identity: bytes | None = None
        self.blobs: dict[int, tuple[str, int]] = {}
        """Memory that models are loaded from: name and memfd."""
        self.is_short = False
        """It handed over memory for which there was no descriptor."""
        self.pid = lifeline.peer_pid()
        self.pidfd: int | None = None
        # A child that the application forked may keep the lifeline open; the pidfd says when itself is gone.
        with contextlib.suppress(OSError):
            self.pidfd = os.pidfd_open(self.pid)

    def sources(self) -> list[int]:
        return [self.lifeline.fileno(), *([] if self.pidfd is None else [self.pidfd])]

    def keep_blob(self, number: int, name: str, fd: int) -> None:
        """Kept until the client drops it or is gone."""
        self.drop_blob(number)
        if descriptor_limits.free() < RESERVE:
            self.is_short = True
            os.close(fd)
        else:
            self.blobs[number] = name, fd

    def drop_blob(self, number: int) -> None:
        if (blob := self.blobs.pop(number, None)) is not None:
            os.close(blob[1])

    def close(self) -> None:
        self.lifeline.close()
        for number in list(self.blobs):
            self.drop_blob(number)
        if self.pidfd is not None:
            os.close(self.pidfd)


class Clients:
    """All applications that are connected; those that were let in have an identity."""

    def __init__(
        self,
        address: str,
        greet: Callable[[control.ClientHello], codec.Message | None],
        on_gone: Callable[[bytes], None],
    ) -> None:
        """``greet``: the answer to who says hello: Welcome lets it in; None is no answer at all.
        ``on_gone``: told of the identity of one that was let in."""
        self._door = Handshakes(address, RESERVE // 2, _refuse)
        self._greet = greet
        self._on_gone = on_gone
        self._clients: list[Client] = []

    def sources(self) -> list[int]:
        """Descriptors to poll, for :meth:`handle`."""
        return [self._door.fileno(), *(fd for client in self._clients for fd in client.sources())]

    def next_deadline(self) -> float | None:
        """When :meth:`on_tick` has something to do; None: not before something happens."""
        return self._door.next_deadline()

    def on_tick(self, now: float) -> None:
        """Time has passed: those are closed that say nothing."""
        self._door.on_tick(now)

    def handle(self, ready: Container[object], now: float) -> None:
        """Takes in what came on these descriptors."""
        for client in list(self._clients):
            if client.pidfd in ready or client.lifeline.fileno() in ready:
                self._hear(client, gone=client.pidfd in ready)
        if self._door.fileno() in ready:
            for channel in self._door.spoken(now):
                client = Client(channel)
                self._clients.append(client)
                self._hear(client, gone=False)

    def identities(self) -> Iterator[bytes]:
        """Of those that were let in."""
        return (client.identity for client in self._clients if client.identity is not None)

    def known(self, identity: bytes) -> Client | None:
        """The one of this identity, with all that it has said on its lifeline heard; None: it is gone, or
        never was."""
        client = self._of(identity)
        if client is not None:
            self._hear(client, gone=False)
        return client if client in self._clients else None

    def blobs(self) -> dict[str, int]:
        """Descriptors of all memory that they have handed over, by name."""
        return dict(blob for client in self._clients for blob in client.blobs.values())

    def drop(self, identity: bytes) -> None:
        """Something went wrong with this one: it must go."""
        if (client := self._of(identity)) is not None:
            self._part(client)

    def close(self) -> None:
        self._door.close()
        for client in self._clients:
            client.close()

    def _of(self, identity: bytes) -> Client | None:
        return next((client for client in self._clients if client.identity == identity), None)

    def _hear(self, client: Client, *, gone: bool) -> None:
        """All that a client has said on its lifeline, and whether it is still there."""
        with boundary(f"the client of process {client.pid}", lambda error: self._part(client)):
            while client in self._clients:
                try:
                    received = client.lifeline.receive(0)
                except TimeoutError:
                    break
                except OSError as error:
                    if error.errno != errno.EMFILE:
                        raise
                    client.is_short = True
                    continue
                if received is None or not self._obey(client, *received):
                    gone = True
                    break
            if gone:
                self._part(client)

    def _part(self, client: Client) -> None:
        if client in self._clients:
            self._clients.remove(client)
            client.close()
            if client.identity is not None:
                self._on_gone(client.identity)

    def _obey(self, client: Client, data: memoryview, fds: list[int]) -> bool:
        """Follows one message; false if the client must go."""
        try:
            message = control.on_lifeline(data)
        except ProtocolError:
            message = None
        if isinstance(message, control.Blob) and client.identity is not None and len(fds) == 1:
            client.keep_blob(message.number, message.name, fds[0])
            return True
        sockets.close_all(fds)
        # Once: who says hello again and again, and reads no answer, would have us wait.
        is_hello = isinstance(message, control.ClientHello) and client.identity is None
        return is_hello and self._welcome(client, message)

    def _welcome(self, client: Client, hello: control.ClientHello) -> bool:
        answer = self._greet(hello)
        if isinstance(answer, control.Welcome) and (refusal := self._refusal(client, hello)):
            answer = control.Refused(reason=refusal)
        if answer is not None:
            client.lifeline.send(codec.encode(answer))
        if not isinstance(answer, control.Welcome):
            return False
        client.identity = hello.client
        return True

    def _refusal(self, client: Client, hello: control.ClientHello) -> str | None:
        if self._of(hello.client) is not None:
            return "another client has this name"
        if client.pid and sum(other.pid == client.pid for other in self._clients) > _MOST:
            return f"process {client.pid} has {_MOST} connections already"
        if descriptor_limits.free() < _COST + RESERVE:
            return str(descriptor_limits.exhausted("A client"))
        return None


def _refuse(channel: Channel, reason: str) -> None:
    channel.send(codec.encode(control.Refused(reason=reason)))
