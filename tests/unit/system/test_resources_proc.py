"""What is found out without /proc, and what is said where it is needed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest

from onnx_dl import PlatformError
from onnx_dl.system import resources

ASKED = """
import os, sys, threading
from onnx_dl.system import resources
def gone(path):
    raise FileNotFoundError(path)
if {blind}:
    os.listdir = gone
print(resources.has_one_thread())
threading.Thread(target=sys.stdin.read, daemon=True).start()
print(resources.has_one_thread())
"""


@pytest.mark.parametrize("blind", [False, True])
def test_whether_there_is_one_thread(blind: bool) -> None:
    """By a look, and by asking the kernel, which a sandbox may forbid: then nobody forks."""
    asked = subprocess.Popen(
        [sys.executable, "-c", ASKED.format(blind=blind)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert asked.stdout is not None and asked.stdin is not None
    with asked.stdin, asked.stdout:
        first, second = asked.stdout.readline().split() + asked.stdout.readline().split()
    asked.wait()
    assert second == b"False" and (first == b"True" or blind)


@pytest.fixture(params=[False, True], ids=["looks", "blind"])
def blind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def gone(path: str) -> str:
        raise FileNotFoundError(path)

    if request.param:
        monkeypatch.setattr(os, "readlink", gone)
    yield


@pytest.mark.usefixtures("blind")
def test_what_is_an_eventfd() -> None:
    eventfd = os.eventfd(3)
    assert resources.is_eventfd(eventfd) and os.eventfd_read(eventfd) == 3
    os.close(eventfd)
    one, two = socket.socketpair()
    poll, pipe, process = os.memfd_create("x"), os.pipe(), os.pidfd_open(os.getpid())
    import select

    epoll = select.epoll()
    with one, two, tempfile.TemporaryFile() as file:
        for fd in (one.fileno(), poll, *pipe, process, epoll.fileno(), file.fileno()):
            assert not resources.is_eventfd(fd)
        one.setblocking(False)
        with pytest.raises(BlockingIOError):
            two.setblocking(False), two.recv(1)  # nothing was written to it
    epoll.close()
    for fd in (poll, *pipe, process):
        os.close(fd)
    assert not resources.is_eventfd(eventfd)


def test_what_is_missing() -> None:
    assert resources.is_proc_mounted()
    error = resources.proc_missing("memory_limit")
    assert isinstance(error, PlatformError) and "mount -t proc" in str(error)
