"""The control socket: messages between the supervisor, its workers and its clients."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Final

from onnx_dl.protocol import codec, control
from onnx_dl.supervisor.clients import Client, Clients
from onnx_dl.supervisor.outlet import MOST_UNREAD, Relay
from onnx_dl.supervisor.processes.worker_processes import RESERVE
from onnx_dl.transport.router import Router

_LINGER: Final = 0.5
"""Seconds that peers have to take the last messages when the socket is closed."""


class Control:
    """Sends messages, and hands each one that arrives to the handler of its sender."""

    def __init__(self, address: str, clients: Clients, stderr: Relay, *, is_shared: bool) -> None:
        """``stderr``: text that goes to the application of a private supervisor, in order with messages."""
        self.router = Router(address, RESERVE // 2, self._is_expected)
        self.stderr = stderr
        self._clients = clients
        self._is_shared = is_shared
        self._workers: dict[bytes, int] = {}
        """Worker ids by routing id."""
        self._identities: dict[int, bytes] = {}
        """Routing ids by worker id."""

    def attach(
        self, on_worker: Callable[[int, bytes], None], on_client: Callable[[Client, bytes], None]
    ) -> None:
        """Sets the handlers of messages from workers and from clients; before the first :meth:`receive`."""
        self._on_worker, self._on_client = on_worker, on_client

    def receive(self) -> None:
        """Handles every message that has arrived."""
        for identity, data in self.router.receive(time.monotonic()):
            if (worker_id := self._workers.get(identity)) is not None:
                self._on_worker(worker_id, data)
            # known() reads the client's lifeline, which may have something earlier: a model's bytes, for one.
            elif client := self._clients.known(identity):
                self._on_client(client, data)

    def send_to_client(self, identity: bytes, message: codec.Message) -> None:
        self.pass_on_stderr()  # what was written before the message is sent before it
        self.router.send(identity, codec.encode(message))

    def send_to_worker(self, worker_id: int, message: codec.Message) -> None:
        self.router.send(self._identities[worker_id], codec.encode(message))

    def pass_on_stderr(self) -> None:
        """Passes on what this process and its workers have written since the last time."""
        self.stderr.pour(self._send_to_application)

    def add_worker(self, worker_id: int) -> bytes:
        """Expects a new worker; returns its routing id."""
        identity = self._identities[worker_id] = secrets.token_bytes(16)
        self._workers[identity] = worker_id
        return identity

    def rename_worker(self, old: int, new: int) -> None:
        """Takes the connection of one worker as that of another from now on."""
        self.forget_worker(new)
        identity = self._identities[new] = self._identities.pop(old)
        self._workers[identity] = new

    def expects(self, worker_id: int) -> bool:
        return worker_id in self._identities

    def forget_worker(self, worker_id: int) -> None:
        identity = self._identities.pop(worker_id)
        self._workers.pop(identity, None)
        self.router.forget(identity)

    def close(self) -> None:
        self.router.close(_LINGER)

    def _is_expected(self, identity: bytes) -> bool:
        return identity in self._workers or self._clients.known(identity) is not None

    def _send_to_application(self, wrote: control.Wrote) -> bool:
        """Sends it to the application of a private supervisor; false: there is none, or it does not read."""
        identity = None if self._is_shared else next(self._clients.identities(), None)
        unread = None if identity is None else self.router.unread(identity)
        if identity is None or unread is None or unread > MOST_UNREAD:
            return False
        self.router.send(identity, codec.encode(wrote))
        return True
