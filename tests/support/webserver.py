"""gunicorn with a small application, and requests to it over a Unix socket."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.waiting import DEADLINE, allowed

make_settings = pytest.importorskip("gunicorn.config").make_settings


class Request(http.client.HTTPConnection):
    """Over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=allowed(4 * DEADLINE))
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def get(path: Path, query: object) -> bytes:
    """The body of the answer."""
    with contextlib.closing(Request(path)) as request:
        request.request("GET", f"/?{query}")
        response = request.getresponse()
        body = response.read()
        assert response.status == 200, body
        return body


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@contextlib.contextmanager
def gunicorn(
    path: Path, folder: Path, app: str, options: list[str], **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Serves ``app``, the text of a module, at a socket of this path; ``folder``: where it works."""
    (folder / "web.py").write_text(app)
    command = [sys.executable, "-m", "gunicorn", *options]
    if any("control_socket" in name for name in make_settings()):  # newer ones put it into the user's folder
        command.append("--no-control-socket")
    command += ["--bind", f"unix:{path}", "--graceful-timeout", "5", "--log-level", "warning", "web:app"]
    process = subprocess.Popen(command, cwd=folder, env=os.environ | environment)
    yield process
    if process.poll() is None:
        process.terminate()
        process.wait(allowed(2 * DEADLINE))
