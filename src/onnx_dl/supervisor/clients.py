"""Clients of a supervisor: application processes, their lifelines, and the memory that they hand over.

Used by the supervisor's one thread only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from collections.abc import Callable, Container, Iterator
from typing import Final

from onnx_dl.errors import ProtocolError
from onnx_dl.protocol import codec, control
from onnx_dl.supervisor.boundary import boundary
from onnx_dl.supervisor.lifetime import Lifetime
from onnx_dl.supervisor.policy.scheduler import Scheduler
from onnx_dl.supervisor.processes.worker_processes import RESERVE
from onnx_dl.system import descriptor_limits, installation
from onnx_dl.transport import sockets
from onnx_dl.transport.handshakes import Handshakes
from onnx_dl.transport.sockets import Channel, same_secret

_COST: Final = 3
"""Descriptors of one client: its lifeline, its process, its control connection."""
_MOST: Final = 64
"""Connections of one process; each of its hosts has one."""


class Client:
    """One application process."""

    def __init__(self, lifeline: Channel) -> None:
        self.lifeline = lifeline
        self.identity: bytes | None = None
        """Routing id on the control socket; None until it is accepted."""
        self.blobs: dict[int, tuple[str, int]] = {}
        """Memory that models are loaded from: name and memfd, by the client's number for it."""
        self.is_short = False
        """True if it handed over memory for which there was no descriptor."""
        self.pid = lifeline.peer_pid()
        self.pidfd: int | None = None
        # A child that the application forked may keep the lifeline open; the pidfd shows its own end.
        with contextlib.suppress(OSError):
            self.pidfd = os.pidfd_open(self.pid)

    def sources(self) -> list[int]:
        return [self.lifeline.fileno(), *([] if self.pidfd is None else [self.pidfd])]

    def keep_blob(self, number: int, name: str, fd: int) -> None:
        """Keeps a memfd until the client drops it or is gone."""
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


@dataclasses.dataclass
class Greeter:
    """Accepts new clients by secret and protocol version."""

    secret: str
    scheduler: Scheduler
    lifetime: Lifetime
    is_shared: bool

    def greet(self, hello: control.ClientHello) -> control.Welcome | control.Refused | None:
        """The answer to a new client; None: none, because a closing host accepts no new clients.  The client
        then finds the next host."""
        if self.scheduler.shutdown.closing:
            return None
        if not same_secret(hello.secret, self.secret):
            return control.Refused(reason="the secret is wrong")
        if hello.version != codec.PROTOCOL_VERSION:
            return control.Refused(
                reason=f"the supervisor speaks protocol version {codec.PROTOCOL_VERSION}, the client "
                f"{hello.version}: run the same version of onnx-dl on both sides"
            )
        self.lifetime.on_client()
        return control.Welcome(build=installation.build() if self.is_shared else "")


class Clients:
    """All connected applications; those that were accepted have an identity."""

    def __init__(
        self,
        address: str,
        greet: Callable[[control.ClientHello], control.Welcome | control.Refused | None],
        on_gone: Callable[[bytes], None],
    ) -> None:
        """``greet``: see :meth:`Greeter.greet`.  ``on_gone``: called with the identity of an accepted client
        that has gone."""
        self._door = Handshakes(address, RESERVE // 2, _refuse)
        self._greet = greet
        self._on_gone = on_gone
        self._clients: list[Client] = []

    def sources(self) -> list[int]:
        """Descriptors to poll, for :meth:`handle`."""
        return [self._door.fileno(), *(fd for client in self._clients for fd in client.sources())]

    def next_deadline(self) -> float | None:
        """Time when :meth:`on_tick` has something to do; None: not before something happens."""
        return self._door.next_deadline()

    def on_tick(self, now: float) -> None:
        """Closes new connections that have said nothing for too long."""
        self._door.on_tick(now)

    def handle(self, ready: Container[object], now: float) -> None:
        """Handles what has arrived on these descriptors."""
        for client in list(self._clients):
            if client.pidfd in ready or client.lifeline.fileno() in ready:
                self._receive(client, gone=client.pidfd in ready)
        if self._door.fileno() in ready:
            for channel in self._door.ready(now):
                client = Client(channel)
                self._clients.append(client)
                self._receive(client, gone=False)

    def identities(self) -> Iterator[bytes]:
        """Identities of the accepted clients."""
        return (client.identity for client in self._clients if client.identity is not None)

    def known(self, identity: bytes) -> Client | None:
        """The client of this identity, after everything on its lifeline was handled; None: there is none."""
        client = self._of(identity)
        if client is not None:
            self._receive(client, gone=False)
        return client if client in self._clients else None

    def blobs(self) -> dict[str, int]:
        """Descriptors of all memory that clients have handed over, by name."""
        return dict(blob for client in self._clients for blob in client.blobs.values())

    def drop(self, identity: bytes) -> None:
        """Ends the connection of a client, because of an error."""
        if (client := self._of(identity)) is not None:
            self._remove(client)

    def close(self) -> None:
        self._door.close()
        for client in self._clients:
            client.close()

    def _of(self, identity: bytes) -> Client | None:
        return next((client for client in self._clients if client.identity == identity), None)

    def _receive(self, client: Client, *, gone: bool) -> None:
        """Handles everything on a client's lifeline, and its end."""
        with boundary(f"the client of process {client.pid}", lambda error: self._remove(client)):
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
                if received is None or not self._handle_message(client, *received):
                    gone = True
                    break
            if gone:
                self._remove(client)

    def _remove(self, client: Client) -> None:
        if client in self._clients:
            self._clients.remove(client)
            client.close()
            if client.identity is not None:
                self._on_gone(client.identity)

    def _handle_message(self, client: Client, data: memoryview, fds: list[int]) -> bool:
        """Handles one message; false: the connection must end."""
        try:
            message = control.on_lifeline(data)
        except ProtocolError:
            message = None
        if isinstance(message, control.Blob) and client.identity is not None and len(fds) == 1:
            client.keep_blob(message.number, message.name, fds[0])
            return True
        sockets.close_all(fds)
        # Once per client: one that repeats it, and reads no answer, would make the supervisor wait.
        is_hello = isinstance(message, control.ClientHello) and client.identity is None
        return is_hello and self._accept(client, message)

    def _accept(self, client: Client, hello: control.ClientHello) -> bool:
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
