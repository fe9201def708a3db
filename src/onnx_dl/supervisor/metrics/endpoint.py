"""Serves the supervisor's metrics over HTTP, in threads of its own.

A request waits in a queue until the loop, woken through :meth:`MetricsEndpoint.fileno`, answers it with plain
figures.  They are formatted and sent here, so a slow scraper does not block the loop.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.server
import os
import queue
import select
import socketserver
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Final

from onnx_dl.concurrency import spawning
from onnx_dl.core.parsing import parse_address
from onnx_dl.errors import SupervisorStartError
from onnx_dl.supervisor.metrics import families
from onnx_dl.supervisor.metrics.connections import MOST, ScrapeConnections, is_allowed_host
from onnx_dl.supervisor.metrics.counters import Figures
from onnx_dl.transport import sockets
from onnx_dl.transport.sockets import Waker

_TIMEOUT: Final = 5.0
"""Seconds for a request to arrive, for the loop to answer, and for the scraper to take the answer."""
_MISDIRECTED: Final = (
    b"Ask for this page by an IP address, as localhost, or by the name that is in ONNX_DL_METRICS. "
    b"Other names are refused, because a page in a browser could give itself the address of this one.\n"
)

Ask = Callable[[], Figures]
_Request = Any
"""A connection.  Only onnx_dl.transport may name the type: a socket."""


class MetricsEndpoint:
    """A listener, and the requests that wait for the loop."""

    def __init__(self, address: str, timeout: float = _TIMEOUT) -> None:
        """Listens at ``address``, "host:port"; port 0: a free one.

        Raises:
            ConfigError: (a ValueError) the address is not valid.
            SupervisorStartError: the system refuses to listen there.
        """
        self._timeout = timeout
        self._waiting: queue.SimpleQueue[concurrent.futures.Future[Figures]] = queue.SimpleQueue()
        self._waker, self._stop = Waker(), Waker()
        host, port = parse_address(address)
        try:
            self._server = _Server(host, port, self._ask, timeout)
        except OSError as error:
            raise SupervisorStartError(
                f"Metrics cannot be served at {address} ({error.strerror}). Use another address, such as "
                "127.0.0.1:9465, or stop the process that listens there. With port 0 the system chooses a "
                "port; snapshot() reports it."
            ) from error
        self._thread = threading.Thread(target=self._serve, name="onnx-dl-metrics", daemon=True)
        spawning.start(self._thread, "The page of metrics")

    @property
    def address(self) -> str:
        """Address with the actual port."""
        host, port = map(str, self._server.server_address[:2])
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def fileno(self) -> int:
        """Descriptor that is readable when a request waits."""
        return self._waker.fileno()

    def answer(self, measure: Ask) -> None:
        """Answers all waiting requests with one measurement, in the loop's thread."""
        self._waker.clear()
        if waiting := [future for future in self._take() if future.set_running_or_notify_cancel()]:
            figures = measure()
            for future in waiting:
                future.set_result(figures)

    def close(self) -> None:
        """Stops listening; cancels waiting requests."""
        self._stop.wake()
        self._thread.join(self._timeout)
        self._server.server_close()
        for future in self._take():
            future.cancel()

    def _take(self) -> list[concurrent.futures.Future[Figures]]:
        return [self._waiting.get_nowait() for _ in range(self._waiting.qsize())]

    def _ask(self) -> Figures:
        future: concurrent.futures.Future[Figures] = concurrent.futures.Future()
        self._waiting.put(future)
        self._waker.wake()
        try:
            return future.result(self._timeout)
        finally:
            future.cancel()

    def _serve(self) -> None:
        poll = select.poll()
        for source in (self._server, self._stop):
            poll.register(source, select.POLLIN)
        ready: dict[int, int] = {}
        while self._stop.fileno() not in ready:
            if self._server.fileno() in ready:
                self._server.handle_request()
            self._server.cut_off()
            ready = dict(poll.poll(self._server.milliseconds()))


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """One thread per connection.  Not http.server's class, which asks the name service for its own name."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = MOST
    timeout = 0  # handle_request() is called when a connection waits

    def __init__(self, host: str, port: int, ask: Ask, timeout: float) -> None:
        self.ask = ask
        self.request_timeout = timeout
        self.scrapers = ScrapeConnections(timeout)
        self.names = frozenset({"localhost", host.lower().rstrip("."), os.uname().nodename.lower()})
        self.address_family, address = sockets.resolve(host)
        super().__init__((address, port), _Handler)

    def get_request(self) -> tuple[_Request, object]:
        try:
            return super().get_request()
        except OSError:
            time.sleep(0.1)  # out of descriptors: the connection waits on, and would be polled at once
            raise

    def verify_request(self, request: _Request, client_address: object) -> bool:
        is_accepted, slowest = self.scrapers.accept(request, time.monotonic())
        if slowest is not None:
            _cut(slowest)
        return is_accepted

    def cut_off(self) -> None:
        """Closes overdue connections."""
        for request in self.scrapers.overdue(time.monotonic()):
            _cut(request)

    def milliseconds(self) -> float | None:
        """Milliseconds until a connection is overdue; None: there is none."""
        deadline = self.scrapers.next_deadline()
        return None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000 + 1

    def shutdown_request(self, request: _Request) -> None:
        self.scrapers.on_closed(request)
        super().shutdown_request(request)

    def handle_error(self, request: _Request, client_address: object) -> None:
        if not isinstance(sys.exception(), OSError):  # the peer went away or was too slow
            super().handle_error(request, client_address)


def _cut(request: _Request) -> None:
    """Shuts a connection down in both directions; its thread, which may wait for data, then reads EOF."""
    with contextlib.suppress(OSError):
        request.shutdown(2)  # SHUT_RDWR


class _Handler(http.server.BaseHTTPRequestHandler):
    """One request; the connection is closed after it."""

    server: _Server

    def setup(self) -> None:
        self.request.settimeout(self.server.request_timeout)
        super().setup()

    def do_GET(self) -> None:
        self.server.scrapers.on_request(self.request, time.monotonic())
        if not is_allowed_host(self.headers.get("Host"), self.server.names):
            self._send(HTTPStatus.MISDIRECTED_REQUEST, _MISDIRECTED)
            return
        match urllib.parse.urlsplit(self.path).path:
            case "/" | "/metrics":
                self._send_metrics()
            case "/healthz":
                self._send(HTTPStatus.OK, b"ok\n")
            case _:
                self._send(HTTPStatus.NOT_FOUND, b"/metrics and /healthz are here.\n")

    def _send_metrics(self) -> None:
        try:
            figures = self.server.ask()
        except (TimeoutError, concurrent.futures.CancelledError):
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, b"The supervisor is busy or ends; ask again.\n")
        else:
            self._send(HTTPStatus.OK, *families.render(figures, self.headers.get("Accept", "")))

    def _send(self, status: HTTPStatus, body: bytes, content_type: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Suppresses the per-request log line."""
