"""What a process makes its own at its start, and how it knows another one."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from onnx_dl.system import process_setup

SAY = """
import os, signal, sys
from onnx_dl.system import process_setup as surroundings
surroundings.set_up_process()
say = os.fdopen(int(sys.argv[1]), "w")
dispositions = {n.name: signal.getsignal(n) for n in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP)}
blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
numbers = [stream.fileno() for stream in (sys.stdin, sys.stdout, sys.stderr)]
streams = [os.fstat(fd) is not None for fd in range(3)], numbers
print({k: getattr(v, "name", v) for k, v in dispositions.items()}, blocked, *streams, file=say)
"""


def told_under(prepare: str) -> str:
    """What a process says of itself whose parent has done this before it started it."""
    read_end, write_end = os.pipe()
    code = (
        f"import os, signal, sys\n{prepare}\n"
        f"os.set_inheritable({write_end}, True)\n"
        f"os.execv(sys.executable, [sys.executable, '-c', {SAY!r}, '{write_end}'])"
    )
    try:
        with subprocess.Popen([sys.executable, "-c", code], pass_fds=[write_end]) as process:
            assert process.wait(60) == 0
        os.close(write_end)
        write_end = -1
        return os.read(read_end, 4096).decode().strip()
    finally:
        os.close(read_end)
        if write_end >= 0:
            os.close(write_end)


PLAIN = "{'SIGCHLD': 'SIG_DFL', 'SIGTERM': 'SIG_DFL', 'SIGHUP': 'SIG_DFL'} set() [True, True, True] [0, 1, 2]"


@pytest.mark.parametrize(
    "prepare",
    [
        "",
        "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())",
        "[signal.signal(n, signal.SIG_IGN) for n in (signal.SIGCHLD, signal.SIGTERM)]",
        "os.close(0); os.close(1); os.close(2)",
        "os.close(2)",
    ],
)
def test_whatever_is_inherited_it_begins_alike(prepare: str) -> None:
    assert told_under(prepare) == PLAIN


def test_nohup_is_kept() -> None:
    told = told_under("signal.signal(signal.SIGHUP, signal.SIG_IGN)")
    assert told == PLAIN.replace("'SIGHUP': 'SIG_DFL'", "'SIGHUP': 'SIG_IGN'")


def test_closed_streams_are_filled_and_nothing_else_is_touched() -> None:
    code = (
        "import os; from onnx_dl.system import process_setup as surroundings; os.close(0); os.close(2); "
        "surroundings.fill_standard_streams(); "
        "os.write(1, ' '.join([os.readlink(f'/proc/self/fd/{fd}') for fd in (0, 2)]).encode()); "
        "assert len(os.listdir('/proc/self/fd')) == 4"  # one is the listing's
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=60, check=True)
    assert done.stdout == b"/dev/null /dev/null"


# --- where modules are -------------------------------------------------------------------------------------


def test_the_search_path_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "lib", "/usr/lib/../lib", Path("/opt/x"), None])
    assert process_setup.search_path() == [str(tmp_path), str(tmp_path / "lib"), "/usr/lib", "/opt/x"]


def test_a_removed_folder_leads_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(sys, "path", ["", "lib", "/usr/lib"])
    assert process_setup.search_path() == ["/usr/lib"]
    monkeypatch.chdir(tmp_path)


# --- which process it is -----------------------------------------------------------------------------------


def test_a_process_is_watched() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        started = process_setup.start_time(process.pid)
        assert started is not None and started != process_setup.start_time(1)
        fd = process_setup.watch_process(process.pid, started)
        assert fd is not None
        assert not select.select([fd], [], [], 0)[0]
        process.send_signal(signal.SIGKILL)
        assert select.select([fd], [], [], 60)[0]
        os.close(fd)
    with pytest.raises(ProcessLookupError):
        process_setup.watch_process(process.pid, started)


def test_another_process_with_the_same_number_is_not_taken_for_it() -> None:
    with pytest.raises(ProcessLookupError):
        process_setup.watch_process(os.getpid(), 1)
    assert process_setup.start_time(2**22 + 1) is None
