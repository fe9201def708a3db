"""``grpc.health.v1.Health``, for load balancers and Kubernetes.

The empty name and that of the protocol's service are the server as a whole; there are no other services.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Final

import grpc
from google.protobuf.message import DecodeError

from onnx_dl.server.grpc import refusals
from onnx_dl.server.grpc.bounds import Arrivals, Places
from onnx_dl.server.grpc.messages import INFERENCE, Message, message
from onnx_dl.server.interfaces import Server
from onnx_dl.server.v2.failures import RequestFailure, cancelled, invalid, not_found, unavailable

MOST_WATCHERS: Final = 128
"""Each has a thread, which sleeps."""
_MOST_CHECKS: Final = 64
_ARRIVES: Final = 10.0
_LOOK_EVERY: Final = 0.25
"""Seconds between two looks of a watcher at the server's state."""
_Request: Final = message("grpc.health.v1.HealthCheckRequest")
_Response: Final = message("grpc.health.v1.HealthCheckResponse")


class HealthService:
    """Answers in the threads of a grpcio server."""

    def __init__(self, server: Server, arrivals: Arrivals) -> None:
        self._server = server
        self._arrivals = arrivals
        self._checks = Places(_MOST_CHECKS, "health checks")
        self._watchers = Places(MOST_WATCHERS, "watchers of the health")
        self._is_ending = threading.Event()

    def check(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        try:
            request = self._admitted(self._checks, messages, context, lambda: None)
            if (status := self._status(request.service)) is None:
                raise not_found(f"there is no service '{request.service}'")
            return _encoded(status)
        except RequestFailure as failure:
            refused = failure
        return refusals.refuse(context, refused)

    def watch(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """The state now, and each time that it has changed."""
        over = threading.Event()
        try:
            request = self._admitted(self._watchers, messages, context, over.set)
            known = ""
            while not over.is_set():
                is_ending = self._is_ending.is_set()
                status = self._status(request.service) or "SERVICE_UNKNOWN"
                if status != known:
                    yield _encoded(status)
                    known = status
                if is_ending:  # the watcher has heard it; the call must not keep the server
                    raise unavailable("the server drains")
                over.wait(_LOOK_EVERY)
            return
        except RequestFailure as failure:
            refused = failure
        refusals.refuse(context, refused)

    def drain(self) -> None:
        """Tells the watchers that the server does not serve any more, and ends them."""
        self._is_ending.set()

    def _status(self, service: str) -> str | None:
        """Name of the status; None: there is no such service."""
        if service not in ("", INFERENCE):
            return None
        is_serving = self._server.is_ready and not (self._server.is_draining or self._is_ending.is_set())
        return "SERVING" if is_serving else "NOT_SERVING"

    def _admitted(
        self,
        places: Places,
        messages: Iterator[bytes],
        context: grpc.ServicerContext,
        over: Callable[[], None],
    ) -> Message:
        """The request, if there is a place for the call.  ``over`` is called when the call has ended."""
        place = self._arrivals.take(places)

        def ended() -> None:
            place.give_back()
            over()

        if not context.add_callback(ended):
            ended()
            raise cancelled()
        try:
            return _Request.FromString(self._arrivals.first(messages, context, place, _ARRIVES))
        except DecodeError as error:
            raise invalid(f"the message is not a HealthCheckRequest: {error}") from error


def _encoded(status: str) -> bytes:
    encoded: bytes = _Response(status=status).SerializeToString()
    return encoded
