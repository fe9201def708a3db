"""One process of a server put together: what both protocols see, and the sockets that they listen at."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.core.version import __version__
from onnx_dl.errors import OnnxDLError
from onnx_dl.host.model_host import ModelHost
from onnx_dl.server.auth import tls
from onnx_dl.server.grpc.listener import GrpcListener
from onnx_dl.server.http.listener import HttpListener
from onnx_dl.server.inference.executor import Executor
from onnx_dl.server.inference.limits import Limits
from onnx_dl.server.inference.statistics import Statistics
from onnx_dl.server.interfaces import Access, Control, Inference, Models, Server
from onnx_dl.server.options import ServeOptions
from onnx_dl.server.repository.models import ModelTable
from onnx_dl.server.shm.regions import Regions

_LOOK_EVERY: Final = 0.5
"""Seconds between two looks at the connection to the host."""
_ALWAYS: Final = ("binary_tensor_data", "model_configuration", "statistics")


def extensions_of(options: ServeOptions) -> list[str]:
    """Extensions whose every call works with these options."""
    found = list(_ALWAYS)
    if options.model_control == "explicit":
        found.append("model_repository")
    if options.client_shm != "off":
        found.append("system_shared_memory")
    return found


class Front:
    """One process of a server: a ``Server`` of both protocols, and the parts that it is made of.

    ``control`` is set before the first request.  ``table`` is ``models``, with what replaces it.
    """

    control: Control

    def __init__(self, options: ServeOptions, host: ModelHost, limits: Limits, rights: Access) -> None:
        self.options = options
        self.host = host
        self.limits = limits
        self.access: Access = rights
        self.version = __version__
        self.table = ModelTable(host, takes_any=options.model_control == "none")
        self.models: Models = self.table
        self.regions = Regions(options.client_shm)
        self.statistics = Statistics()
        self._executor = Executor(self.models, self.regions, self.statistics, limits, host, options.max_body)
        self.inference: Inference = self._executor
        self.is_draining = False

    def close(self) -> None:
        """Closes proxies, and ends threads that wait for work: the process would wait for their loads."""
        self._executor.close()
        self.table.close()

    @property
    def extensions(self) -> Sequence[str]:
        return extensions_of(self.options)

    @property
    def is_ready(self) -> bool:
        """The host answers and the table is ready."""
        return self.models.table.is_ready and is_connected(self.host)


def is_connected(host: ModelHost) -> bool:
    """True if there is a connection to the host.  Waits for nothing."""
    connection = host.link.connection
    return connection is not None and connection.usable


async def keep_host(host: ModelHost) -> None:
    """Finds or starts the next host whenever the present one has died, until cancelled.

    A server that is not ready gets no requests, so that it must not wait for one to start the host.
    """
    while True:
        await asyncio.sleep(_LOOK_EVERY)
        if not is_connected(host):
            with contextlib.suppress(OnnxDLError):  # told by the requests that need it; tried again
                await asyncio.to_thread(host.start)


class Addresses(NamedTuple):
    """Actual addresses, "host:port"; empty: not served."""

    http: str = ""
    grpc: str = ""
    metrics: str = ""


class Listeners:
    """The sockets of one process."""

    def __init__(self) -> None:
        self._http: list[HttpListener] = []
        self._grpc: list[GrpcListener] = []

    async def start(self, server: Server, wanted: Addresses, *, reuse_port: bool) -> Addresses:
        """Listens at these addresses and returns the actual ones.

        Raises:
            OSError: an address cannot be had.
            AccessError: a certificate is not valid.
        """
        options = server.options
        context = tls.server_context(options)
        http = grpc = metrics = ""
        if wanted.http:
            self._http.append(listener := HttpListener(server))
            http = await listener.start(wanted.http, context, reuse_port=reuse_port)
        if wanted.metrics:
            self._http.append(listener := HttpListener(server))
            metrics = await listener.start(wanted.metrics, context, metrics_only=True)
        if wanted.grpc:
            calls = GrpcListener(server, asyncio.get_running_loop())
            self._grpc.append(calls)
            credentials = tls.grpc_credentials(options)
            grpc = await asyncio.to_thread(calls.start, wanted.grpc, credentials, reuse_port=reuse_port)
        return Addresses(http, grpc, metrics)

    async def drain(self, deadline: Deadline) -> None:
        """Refuses new requests, and returns when those that had begun have ended, or at the deadline."""
        await asyncio.gather(
            *(listener.drain(deadline) for listener in self._http),
            *(asyncio.to_thread(calls.drain, deadline) for calls in self._grpc),
        )

    async def close(self) -> None:
        """Closes all connections.  May be called twice."""
        for listener in self._http:
            await listener.close()
        for calls in self._grpc:
            await asyncio.to_thread(calls.close)


@contextlib.contextmanager
def background(*work: asyncio.Task[None]) -> Iterator[None]:
    """Cancels tasks at the end of the block."""
    try:
        yield
    finally:
        for task in work:
            task.cancel()
