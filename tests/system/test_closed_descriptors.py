"""A program that closes all descriptors, and opens files of its own that get our numbers."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.support.programs import program
from tests.support.waiting import eventually

pytestmark = pytest.mark.slow

OWN = """
import socket, tempfile
def files(n=60):
    "Of every kind that we have, too; the second of a pair is not looked at."
    opened = []
    for i in range(n):
        file, path = tempfile.mkstemp()
        os.unlink(path)
        os.write(file, b"0123456789")
        os.lseek(file, 0, 0)
        opened += [file, os.eventfd(0, os.EFD_NONBLOCK), *os.pipe2(os.O_NONBLOCK)]
        one, two = socket.socketpair()
        one.setblocking(False), two.setblocking(False)
        opened += [one.detach(), two.detach()]
    return [(fd, os.fstat(fd).st_ino, os.readlink(f"/proc/self/fd/{fd}")) for fd in opened]
def untouched(opened):
    for fd, inode, path in opened:
        assert (os.fstat(fd).st_ino, os.readlink(f"/proc/self/fd/{fd}")) == (inode, path), fd
        if path.startswith("/"):
            assert os.fstat(fd).st_size == 10 and os.lseek(fd, 0, 1) == 0, path
        else:
            try:
                data = os.read(fd, 8)
            except (BlockingIOError, OSError):  # nothing was written to it; or it is a writing end
                continue
            raise AssertionError(f"{path}: {data}")
"""

CLOSE = {
    "all": "os.closerange(3, 4096)",
    "the first": "os.closerange(3, 12)",
    "one by one": "[os.close(int(fd)) for fd in os.listdir('/proc/self/fd')[:-1] if int(fd) > 2]",
}


@pytest.mark.parametrize("way", CLOSE)
def test_files_of_the_program_are_not_touched(way: str) -> None:
    done = program(
        OWN
        + f"""
held = run(x)
print(default_host().snapshot().supervisor_pid, flush=True)
{CLOSE[way]}
own = files()
assert (run(x) == x).all() and (run(x + 1) == x + 1).all()
assert (held == x).all()
del held
untouched(own)
proxy.unload()
assert (run(x) == x).all()
print(default_host().snapshot().supervisor_pid)
proxy.close()
default_host().close()
del proxy, run
gc.collect()
untouched(own)
"""
    )
    for pid in map(int, done.stdout.split()):
        eventually(lambda pid=pid: not psutil.pid_exists(pid), "the end of a supervisor")


def test_a_few_at_a_time() -> None:
    program(
        OWN
        + """
for low in range(3, 24, 3):
    os.closerange(low, low + 3)
    own = files(2)
    assert (run(x + low) == x + low).all(), low
    untouched(own)
default_host().close()
untouched(own)
"""
    )


def test_a_program_that_ends_at_once() -> None:
    done = program(
        "run(x)\nprint(default_host().snapshot().supervisor_pid, flush=True)\nos.closerange(3, 4096)"
    )
    eventually(lambda: not psutil.pid_exists(int(done.stdout)), "the end of the supervisor")


def test_results_of_run_async() -> None:
    program(
        """
import queue
results = queue.Queue()
call = lambda: proxy.run_async(None, {"x": x}, lambda result, _, error: results.put((result, error)), None)
call()
assert (results.get(timeout=60)[0][0] == x).all()
os.closerange(3, 4096)
call()
assert (results.get(timeout=60)[0][0] == x).all()
"""
    )


DAEMON = """
def become_daemon(done):
    "As programs do that know no library for it; ``done``: a file for what it has to say."
    if os.fork():
        return False
    os.setsid()
    if os.fork():
        os._exit(0)
    os.closerange(0, 4096)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1), os.dup2(null, 2)
    return True
def daemon(done):
    own = files(20)
    try:
        assert (run(x + 1) == x + 1).all()
        if held is not None:
            assert (held == x).all()
        globals().update(held=None)
        gc.collect()
        untouched(own)
        default_host().close()
        untouched(own)
        said = "well"
    except BaseException as error:
        said = repr(error)
    with open(done + "~", "w") as file:
        file.write(said)
    os.rename(done + "~", done)
    os._exit(0)
"""


@pytest.mark.parametrize("used", [True, False], ids=["used before", "made before"])
def test_a_daemon(used: bool, tmp_path: Path) -> None:
    said = tmp_path / "said"
    program(
        OWN
        + DAEMON
        + f"""
held = run(x) if {used} else None
if become_daemon({str(said)!r}):
    daemon({str(said)!r})
if held is not None:
    assert (run(x) == x).all() and (held == x).all()
"""
    )
    eventually(said.exists, "a word of the daemon", 60)
    assert said.read_text() == "well"
