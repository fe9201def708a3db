"""One proxy's claim to its model, from the first use to the end of the proxy."""

from __future__ import annotations

import itertools

from onnx_dl.client.connection import Connection
from onnx_dl.core.terms import Terms
from onnx_dl.protocol import control as m

_ids = itertools.count(1)


class Lease:
    """Terms of the claim, and the worker that was granted on them."""

    def __init__(self, terms: Terms) -> None:
        self.id = next(_ids)
        self.terms = terms
        self.granted: m.Granted | None = None
        self.closed = False
        self.has_load_output = False
        """Whether the prints and warnings of the load were repeated for this proxy."""

    def send_ttl(self, connection: Connection) -> None:
        """Tells the supervisor the TTL that is in force from now on."""
        connection.send(m.SetTtl(proxy=self.id, ttl=self.terms.ttl))

    def release(self, connection: Connection) -> None:
        """Gives up the worker until the next use."""
        self.granted = None
        connection.send(m.Release(proxy=self.id))
