"""The grpcio server: its address, its limits, and its end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
from typing import Final

import grpc

from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.server.grpc.bounds import Arrivals
from onnx_dl.server.grpc.health import MOST_WATCHERS, HealthService
from onnx_dl.server.grpc.messages import HEALTH, INFERENCE
from onnx_dl.server.grpc.service import CALLS, MOST_INFERENCES, MOST_LOOKS, MOST_OTHERS, InferenceService
from onnx_dl.server.grpc.stream import MOST_STREAMS, Streams
from onnx_dl.server.grpc.upkeep import Upkeep
from onnx_dl.server.interfaces import Server

_LARGEST: Final = 0x7FFFFFFF
"""Bytes of a message of gRPC."""
_THREADS: Final = MOST_INFERENCES + MOST_OTHERS + MOST_LOOKS + MOST_STREAMS + MOST_WATCHERS + 64
"""So many that no call waits for a thread: places are refused, not waited for.  A thread starts when all
others are taken."""
_CLOSE_TIMEOUT: Final = 5.0
"""Seconds until cancelled calls have ended."""


class GrpcListener:
    """Serves the protocol on one address.  Its methods may be called by any thread but the loop's: they wait
    for handlers, and handlers may wait for the loop."""

    def __init__(self, server: Server, loop: asyncio.AbstractEventLoop) -> None:
        self._max_body = min(server.options.max_body, _LARGEST)
        arrivals = Arrivals()
        self._upkeep = Upkeep(loop, arrivals)
        self._service = InferenceService(server, loop, arrivals)
        self._streams = Streams(self._service)
        self._health = HealthService(server, arrivals)
        self._threads = concurrent.futures.ThreadPoolExecutor(_THREADS, "grpc call")
        self._grpc: grpc.Server | None = None

    def start(
        self, address: str, credentials: grpc.ServerCredentials | None = None, *, reuse_port: bool = False
    ) -> str:
        """Listens.  Returns the actual "host:port".  Raises OSError if the address cannot be had."""
        server = grpc.server(
            self._threads,
            handlers=self._handlers(),
            options=_options(self._max_body, reuse_port=reuse_port),
            maximum_concurrent_rpcs=_THREADS,
        )
        try:
            if credentials is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, credentials)
        except RuntimeError as error:
            server.start()  # one that never ran keeps its descriptors
            server.stop(0).wait(_CLOSE_TIMEOUT)
            raise OSError(f"cannot listen on {address}: {error}") from error
        self._grpc = server
        server.start()
        return f"{address.rpartition(':')[0]}:{port}"

    def drain(self, deadline: Deadline) -> None:
        """Refuses new calls, and returns when those that had begun have ended, at the deadline at the latest:
        then they are cancelled."""
        if self._grpc is None:
            return
        left = deadline.left()
        ended = self._grpc.stop(_CLOSE_TIMEOUT if left is None else left)
        self._health.drain()
        self._streams.drain()
        ended.wait(left)
        self.close()

    def close(self) -> None:
        """Cancels all calls, and returns when they have ended.  Idempotent."""
        self._upkeep.close()
        self._streams.close()
        if self._grpc is not None:
            self._grpc.stop(0).wait(_CLOSE_TIMEOUT)
            self._grpc = None
        self._threads.shutdown(wait=False)

    def _handlers(self) -> list[grpc.GenericRpcHandler]:
        """Handlers of both services, on bytes.

        Calls with one message are handled as streams of one: so the right is asked for before the message is
        read.
        """
        inference = {
            name: grpc.stream_unary_rpc_method_handler(functools.partial(self._service.call, name))
            for name in CALLS
        }
        inference["ModelInfer"] = grpc.stream_unary_rpc_method_handler(self._service.infer)
        inference["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(self._streams.answer)
        health = {
            "Check": grpc.stream_unary_rpc_method_handler(self._health.check),
            "Watch": grpc.stream_stream_rpc_method_handler(self._health.watch),
        }
        return [
            grpc.method_handlers_generic_handler(INFERENCE, inference),
            grpc.method_handlers_generic_handler(HEALTH, health),
        ]


def _options(max_body: int, *, reuse_port: bool) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", int(reuse_port)),
        ("grpc.max_receive_message_length", max_body),  # also of what a compressed message becomes
        ("grpc.max_send_message_length", _LARGEST),
        ("grpc.max_metadata_size", 64 << 10),
        ("grpc.absolute_max_metadata_size", 64 << 10),
        ("grpc.max_concurrent_streams", 256),  # of one connection
        ("grpc.max_allowed_incoming_connections", 1024),
        # Of TLS and HTTP/2.  By default two minutes, in which half a handshake keeps one of these places.
        ("grpc.server_handshake_timeout_ms", 10_000),
        # A client that has gone without a word is noticed.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # Clients may look after us as often.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.max_connection_idle_ms", 3_600_000),
    ]
