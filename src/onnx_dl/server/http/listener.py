"""The HTTP listener: accepts connections, and ends them."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import Final

from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.core.parsing import parse_address
from onnx_dl.server.http.connection import HttpConnection
from onnx_dl.server.http.connections import Connections
from onnx_dl.server.http.handler import Handler
from onnx_dl.server.http.limits import HttpLimits
from onnx_dl.server.http.routes import application
from onnx_dl.server.interfaces import Server

_BACKLOG: Final = 1024
_CLOSING: Final = 2.0
"""Seconds for connections that were cut to end."""


class HttpListener:
    """Serves a :class:`~onnx_dl.server.interfaces.Server` over HTTP at one address."""

    def __init__(self, server: Server, limits: HttpLimits | None = None) -> None:
        self._server = server
        self._limits = limits or HttpLimits()
        self._listening: asyncio.Server | None = None
        self._connections: Connections | None = None

    async def start(
        self,
        address: str,
        ssl_context: ssl.SSLContext | None = None,
        *,
        metrics_only: bool = False,
        reuse_port: bool = False,
    ) -> str:
        """Listen at ``address``; return the actual one.  Both are "host:port".

        ``metrics_only``: only ``/metrics`` is served.  ``reuse_port``: other processes listen there, too.

        Raises:
            ConfigError: ``address`` is not an address.
            OSError: it cannot be listened at.
        """
        host, port = parse_address(address)
        loop = asyncio.get_running_loop()
        connections = self._connections = Connections(self._limits, loop)
        handler = Handler(self._server, application(self._server), metrics_only=metrics_only)
        self._listening = await loop.create_server(
            lambda: HttpConnection(handler, connections),
            host,
            port,
            ssl=ssl_context,
            backlog=_BACKLOG,
            reuse_port=reuse_port or None,
            ssl_handshake_timeout=None if ssl_context is None else self._limits.head,
        )
        host, port = self._listening.sockets[0].getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def drain(self, deadline: Deadline) -> None:
        """Accept no more, finish what was begun, and cut at the deadline what is left."""
        if self._listening is not None:
            self._listening.close()
        if self._connections is not None:
            self._connections.drain()
            with contextlib.suppress(TimeoutError):
                await self._connections.wait_until_none(deadline.left())
        await self.close()

    async def close(self) -> None:
        """End everything now."""
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        if (connections := self._connections) is not None:
            connections.cut()
            with contextlib.suppress(TimeoutError):
                await connections.wait_until_none(_CLOSING)
            connections.close()
            self._connections = None  # perhaps again: a drain may end at the same time
