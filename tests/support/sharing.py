"""Shared hosts of a test's own, and processes that use them."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from onnx_dl.client import host_registry
from onnx_dl.transport import running_hosts
from onnx_dl.transport.rendezvous import HostEntry
from tests.support.waiting import DEADLINE, allowed, eventually


@contextlib.contextmanager
def own_runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which nobody else's hosts are; in the end nothing of them is left."""
    folder = Path(tempfile.mkdtemp(prefix="odl"))
    monkeypatch.setenv("ONNX_DL_RUNTIME_DIR", str(folder))
    try:
        yield folder
    finally:
        while _children:  # of a test that failed
            _children.pop().kill()
        for host in list(host_registry._shared.values()):
            host.close()
        host_registry._shared.clear()
        for seen in running_hosts.running():
            end(seen.pid)
        try:
            eventually(lambda: not belonging(folder), f"the end of what used {folder}")
        finally:
            for process in belonging(folder):
                process.kill()
            shutil.rmtree(folder)


def belonging(folder: Path) -> list[psutil.Process]:
    """Processes that were started with this runtime folder: hosts, templates, workers, applications."""
    found = []
    wanted = f"ONNX_DL_RUNTIME_DIR={folder}".encode()
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            # A zombie, which its parent may be slow to reap, has no environment left.
            if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(psutil.Process(pid))
    return found


def end(pid: int | None) -> None:
    """SIGTERM, and SIGKILL to one that does not heed it."""
    if pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(fd, signal.SIGTERM)
            if not select.select([fd], [], [], allowed(DEADLINE / 2))[0]:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
        finally:
            os.close(fd)


class Forked:
    """A forked child that computes something and says what it was."""

    def __init__(self, work: Callable[[], Any]) -> None:
        read, write = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 warns of fork beside threads
            self.pid = os.fork()
        if self.pid == 0:
            _answer(write, work)
        os.close(write)
        self._read = read
        self._there = True
        _children.append(self)

    def result(self, timeout: float = 4 * DEADLINE) -> Any:
        """What ``work`` returned; an exception as text.  Waits for the child's end."""
        said = b""
        deadline = time.monotonic() + allowed(timeout)
        poll = select.poll()
        poll.register(self._read)
        while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            if not (data := os.read(self._read, 1 << 16)):
                break
            said += data
        else:
            self.kill()
            raise AssertionError(f"child {self.pid} hangs")
        self._wait()
        return json.loads(said)

    def kill(self) -> None:
        if self._there:
            os.kill(self.pid, signal.SIGKILL)
            self._wait()

    def _wait(self) -> None:
        self._there = False
        os.close(self._read)
        os.waitpid(self.pid, 0)


_children: list[Forked] = []


def _answer(write: int, work: Callable[[], Any]) -> None:
    try:
        try:
            answer = work()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(write, json.dumps(answer).encode())
    finally:
        os._exit(0)


def command(*arguments: str) -> list[str]:
    """The command ``onnx-dl``."""
    return [sys.executable, "-m", "onnx_dl.cli", *arguments]


class Kept:
    """``onnx-dl supervise``, as a service manager runs it."""

    def __init__(self, name: str = "default") -> None:
        self._command = command("supervise", "--host", name)
        self._place = HostEntry(name)
        self.start()

    def start(self) -> None:
        """Returns when it can be reached."""
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert f"pid {self.process.pid};" in self.process.stdout.readline()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit status."""
        self.process.send_signal(number)
        self.process.communicate(timeout=allowed(2 * DEADLINE))
        return self.process.returncode
