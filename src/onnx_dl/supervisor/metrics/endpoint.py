"""Serves the supervisor's metrics over HTTP, in threads of its own.

What is measured belongs to the loop's thread: a request waits in a queue until the loop, woken through
:meth:`Scrape.fileno`, answers it with plain figures.  They are written as text here, so the loop waits for no
scraper, however slow.
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
from onnx_dl.supervisor.metrics.connections import MOST, Scrapers, is_meant
from onnx_dl.supervisor.metrics.counters import Facts
from onnx_dl.transport import sockets
from onnx_dl.transport.sockets import Waker

_PATIENCE: Final = 5.0
"""Seconds for a request to come, for the loop to answer, and for the scraper to take that."""
_MISDIRECTED: Final = (
    b"This page is asked for by an IP address, as localhost, or by the name that ONNX_DL_METRICS has. "
    b"Other names are refused, because a page in a browser could give itself the address of this one.\n"
)

Ask = Callable[[], Facts]


class Scrape:
    """A listener, and the questions that wait for the loop."""

    def __init__(self, address: str, patience: float = _PATIENCE) -> None:
        """Listens at ``address``, "host:port"; port 0: one that is free.

        Raises:
            ValueError: (as :class:`~onnx_dl.errors.ConfigError`) it is no address.
            SupervisorStartError: the system does not let us listen there.
        """
        self._patience = patience
        self._waiting: queue.SimpleQueue[concurrent.futures.Future[Facts]] = queue.SimpleQueue()
        self._waker, self._stop = Waker(), Waker()
        self._server = _listen(address, self._ask, patience)
        self._thread = threading.Thread(target=self._serve, name="onnx-dl-metrics", daemon=True)
        spawning.start(self._thread, "The page of metrics")

    @property
    def address(self) -> str:
        """Where it listens, with the port that it has."""
        host, port = map(str, self._server.server_address[:2])
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    # --- in the loop's thread -----------------------------------------------------------------------------

    def fileno(self) -> int:
        """Readable when somebody asks."""
        return self._waker.fileno()

    def answer(self, measure: Ask) -> None:
        """Answers all who wait, with one measurement."""
        self._waker.clear()
        if waiting := [future for future in self._take() if future.set_running_or_notify_cancel()]:
            facts = measure()
            for future in waiting:
                future.set_result(facts)

    def close(self) -> None:
        """Listens no more; who waits is sent away."""
        self._stop.wake()
        self._thread.join(self._patience)
        self._server.server_close()
        for future in self._take():
            future.cancel()

    def _take(self) -> list[concurrent.futures.Future[Facts]]:
        return [self._waiting.get_nowait() for _ in range(self._waiting.qsize())]

    # --- in other threads ---------------------------------------------------------------------------------

    def _ask(self) -> Facts:
        future: concurrent.futures.Future[Facts] = concurrent.futures.Future()
        self._waiting.put(future)
        self._waker.wake()
        try:
            return future.result(self._patience)
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


def _listen(address: str, ask: Ask, patience: float) -> _Server:
    host, port = parse_address(address)
    try:
        return _Server(host, port, ask, patience)
    except OSError as error:
        raise SupervisorStartError(
            f"Metrics cannot be served at {address} ({error.strerror}). Give another one, such as "
            "127.0.0.1:9465, or end the process that listens there. With port 0 the system chooses a port; "
            "a snapshot tells which."
        ) from error


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """One thread per connection.  Not http.server's class: that asks the name service who it is."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = MOST
    timeout = 0  # handle_request() is called when somebody is there

    def __init__(self, host: str, port: int, ask: Ask, patience: float) -> None:
        self.ask = ask
        self.patience = patience
        self.scrapers = Scrapers(patience)
        self.names = frozenset({"localhost", host.lower().rstrip("."), os.uname().nodename.lower()})
        self.address_family, address = sockets.resolve(host)
        super().__init__((address, port), _Handler)

    def get_request(self) -> tuple[Any, Any]:
        try:
            return super().get_request()
        except OSError:
            time.sleep(0.1)  # out of descriptors: who knocks goes on knocking
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        let_in, slowest = self.scrapers.came(request, time.monotonic())
        if slowest is not None:
            _cut(slowest)
        return let_in

    def cut_off(self) -> None:
        """Those whose time is up."""
        for request in self.scrapers.overdue(time.monotonic()):
            _cut(request)

    def milliseconds(self) -> float | None:
        """Until somebody's time is up; None: nobody is there."""
        deadline = self.scrapers.next_deadline()
        return None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000 + 1

    def shutdown_request(self, request: Any) -> None:
        self.scrapers.left(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # the peer went away or was too slow
            super().handle_error(request, client_address)


def _cut(request: Any) -> None:
    """Its thread, which may be waiting for it, sees the end of it."""
    with contextlib.suppress(OSError):
        request.shutdown(2)  # both ways


class _Handler(http.server.BaseHTTPRequestHandler):
    """One request; the connection is closed after it."""

    server: _Server

    def setup(self) -> None:
        self.request.settimeout(self.server.patience)
        super().setup()

    def do_GET(self) -> None:
        self.server.scrapers.has_asked(self.request, time.monotonic())
        if not is_meant(self.headers.get("Host"), self.server.names):
            self._say(HTTPStatus.MISDIRECTED_REQUEST, _MISDIRECTED)
            return
        match urllib.parse.urlsplit(self.path).path:
            case "/" | "/metrics":
                self._tell()
            case "/healthz":
                self._say(HTTPStatus.OK, b"ok\n")
            case _:
                self._say(HTTPStatus.NOT_FOUND, b"/metrics and /healthz are here.\n")

    def _tell(self) -> None:
        try:
            facts = self.server.ask()
        except (TimeoutError, concurrent.futures.CancelledError):
            self._say(HTTPStatus.SERVICE_UNAVAILABLE, b"The supervisor is busy or ends; ask again.\n")
        else:
            self._say(HTTPStatus.OK, *families.render(facts, self.headers.get("Accept", "")))

    def _say(self, status: HTTPStatus, body: bytes, content_type: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nobody wants to read of each scrape."""
