"""One proxy's claim to its model, from the first use to the end of the proxy."""

from __future__ import annotations

import itertools

from onnx_dl.client.connection import Connection
from onnx_dl.protocol import control as m

_ids = itertools.count(1)


class Lease:
    """Terms of the claim, and the worker that was granted on them."""

    def __init__(self, ttl: float, latency: str = "normal", pin: bool = False, priority: int = 0) -> None:
        self.id = next(_ids)
        self.ttl = ttl
        self.latency = latency
        self.pin = pin
        self.priority = priority
        self.granted: m.Granted | None = None
        self.closed = False
        self.has_load_output = False
        """Whether the prints and warnings of the load were repeated for this proxy."""

    def retime(self, ttl: float, connection: Connection) -> None:
        """Changes the TTL from now on."""
        self.ttl = ttl
        connection.send(m.SetTtl(proxy=self.id, ttl=ttl))

    def release(self, connection: Connection) -> None:
        """Gives up the worker until the next use."""
        self.granted = None
        connection.send(m.Release(proxy=self.id))
