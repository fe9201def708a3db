"""The host's page, fetched in time or not at all."""

from __future__ import annotations

import asyncio
import http.server
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from onnx_dl.server.metrics import host_text
from tests.support.waiting import DEADLINE, allowed


def fetch(address: str | None, accept: str, timeout: float = 10.0) -> str:
    return asyncio.run(host_text.fetch(address, accept, timeout))


class _Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = f"{self.path} {self.headers['Accept']} é".encode()
        self.send_response(200 if self.headers["Accept"] != "refuse" else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    with http.server.HTTPServer(("127.0.0.1", 0), _Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_page_is_fetched_in_the_scrapers_format(address: str) -> None:
    assert fetch(address, "some/format") == "/metrics some/format é"
    assert fetch(address.replace("127.0.0.1", "0.0.0.0"), "a") == "/metrics a é"


def test_a_header_cannot_be_smuggled(address: str) -> None:
    assert fetch(address, "a\r\nX: y") == ""


def test_a_refusal_is_no_page(address: str) -> None:
    assert fetch(address, "refuse") == ""


@pytest.mark.parametrize("wrong", [None, "", "127.0.0.1", "nowhere", "127.0.0.1:1", "127.0.0.1:x", "[::"])
def test_no_endpoint_no_page(wrong: str | None) -> None:
    assert fetch(wrong, "") == ""


def test_a_page_that_does_not_come_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        assert fetch(f"127.0.0.1:{silent.getsockname()[1]}", "", 0.1) == ""
        assert time.monotonic() - began < allowed(DEADLINE)


def test_a_page_that_comes_a_byte_at_a_time_is_not_waited_for() -> None:
    ended = threading.Event()

    def drip(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            try:
                while not ended.wait(0.02):
                    connection.sendall(b"H")
            except OSError:
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=drip, args=(listener,))
        thread.start()
        began = time.monotonic()
        try:
            assert fetch(f"127.0.0.1:{listener.getsockname()[1]}", "", 0.3) == ""
            assert time.monotonic() - began < allowed(DEADLINE)
        finally:
            ended.set()
            thread.join()
