"""``onnx-dl serve`` as users run it: a program of its own, with free ports."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.support.sharing import belonging
from tests.support.waiting import DEADLINE, allowed, eventually

_ADDRESS = r"^{}: (?:https?://)?([^/\s]+)"


class Serving:
    """A server that runs.  Addresses are ``host:port``; empty: that one is off."""

    def __init__(self, process: subprocess.Popen[bytes], runtime: Path, log: Path) -> None:
        self.process = process
        self.runtime = runtime
        """The folder of its shared host: ``ONNX_DL_RUNTIME_DIR``."""
        self._log = log

    @property
    def pid(self) -> int:
        """Process id of the first process."""
        return self.process.pid

    @property
    def http(self) -> str:
        return self._address("HTTP")

    @property
    def grpc(self) -> str:
        return self._address("gRPC")

    @property
    def metrics(self) -> str:
        return self._address("metrics")

    @property
    def url(self) -> str:
        """``http://host:port``, or with https."""
        scheme = "https" if re.search(r"^HTTP: https:", self.output(), re.MULTILINE) else "http"
        return f"{scheme}://{self.http}"

    def output(self) -> str:
        """All that it has written so far, stdout and stderr."""
        return self._log.read_text(errors="replace")

    def await_ready(self) -> None:
        """Returns when it has printed ``ready``; fails the test with its output if it ends before."""

        def is_ready() -> bool:
            return re.search(r"^ready$", self.output(), re.MULTILINE) is not None

        eventually(lambda: is_ready() or self.process.poll() is not None, "a server that is ready")
        assert is_ready(), f"the server ended with {self.process.returncode}: {self.output()}"

    def end(self, number: int = signal.SIGTERM, timeout: float = 2 * DEADLINE) -> int:
        """Sends a signal and returns the exit status."""
        self.process.send_signal(number)
        return self.process.wait(allowed(timeout))

    def _address(self, name: str) -> str:
        found = re.search(_ADDRESS.format(name), self.output(), re.MULTILINE)
        return "" if found is None else found[1]


@contextlib.contextmanager
def serving(
    *arguments: str | os.PathLike[str], env: Mapping[str, str] | None = None, ready: bool = True
) -> Iterator[Serving]:
    """Runs ``onnx-dl serve`` with these arguments, in a runtime folder of its own.

    In the end it is sent SIGTERM, must exit with 0 unless the test has ended it, and nothing of it is left.

    Args:
        arguments: of ``onnx-dl serve``; ports are free ones unless they are given.
        env: more environment variables.
        ready: wait until it is ready.
    """
    folder = Path(tempfile.mkdtemp(prefix="odl"))
    runtime, log = folder / "run", folder / "log"
    runtime.mkdir(mode=0o700)
    command = [sys.executable, "-m", "onnx_dl", "serve", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]
    environ = {**os.environ, "ONNX_DL_RUNTIME_DIR": str(runtime), **(env or {})}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, *map(os.fspath, arguments)],
            env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    server = Serving(process, runtime, log)
    try:
        if ready:
            server.await_ready()
        yield server
        if process.poll() is None:
            assert server.end() == 0, server.output()
        eventually(lambda: not belonging(runtime), f"the end of what the server started: {server.output()}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        for left in belonging(runtime):
            with contextlib.suppress(Exception):
                left.kill()
        shutil.rmtree(folder)
