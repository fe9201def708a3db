"""Programs that tests run as processes of their own, with a model that returns what it is given."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Final

from tests.support.waiting import DEADLINE, allowed, eventually

HEAD: Final = """
import gc, os, sys, signal, threading, warnings
warnings.simplefilter("ignore")  # Python 3.12 warns of fork beside threads
import numpy as np
from onnx_dl import InferenceSessionProxy, default_host
from tests.support.slow import identity_model
proxy = InferenceSessionProxy(identity_model(), providers=["CPUExecutionProvider"])
x = np.arange(1 << 18, dtype=np.float32)  # 1 MB: results of it lie in shared memory
run = lambda x: proxy.run(None, {"x": x})[0]
"""

PATIENCE: Final = 120.0
"""Seconds that a program may take."""


class Hung(AssertionError):
    """A program, or a process that it has left, did not end."""


def program(code: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs it behind :data:`HEAD`; it must end by itself, well, and without a word on stderr.

    ``environment``: instead of this process's.  Its processes must end, too.  Raises :class:`Hung`.
    """
    done = ended([sys.executable, "-c", HEAD + code], environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr + done.stdout
    return done


def ended(
    command: list[str], environment: dict[str, str] | None = None, patience: float = PATIENCE
) -> subprocess.CompletedProcess[str]:
    """Runs a program of Python until it and all processes that have its output have ended.

    Its output goes to files: with pipes, one could not tell a program that hangs from one that has left a
    process, and could not read the stacks of either.

    Raises:
        Hung: one of them did not end within ``patience`` seconds.  They are killed, and the error has the
            stacks of the program's threads.
    """
    command = [command[0], "-X", "faulthandler", *command[1:]]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with subprocess.Popen(command, stdout=out, stderr=err, env=environment) as process:
            try:
                process.wait(allowed(patience))
            except subprocess.TimeoutExpired:
                threads = _threads([process.pid, *_users(out, err)])
                _abort(process)
                _kill(_users(out, err))
                raise Hung("\n".join(["A program did not end.", threads, _text(err), _text(out)])) from None
            except BaseException:
                process.kill()
                raise
        try:
            eventually(lambda: not _users(out, err), "the end of its processes", min(patience, DEADLINE))
        except AssertionError:
            left = _threads(_users(out, err))
            _kill(_users(out, err))
            raise Hung("\n".join(["A program has left processes.", left, _text(err), _text(out)])) from None
        return subprocess.CompletedProcess(command, process.returncode, _text(out), _text(err))


def _abort(process: subprocess.Popen[bytes]) -> None:
    """Kills a program; Python first writes the stacks of its threads to stderr, if it is still there to."""
    for number in signal.SIGABRT, signal.SIGKILL:
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(DEADLINE)


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _threads(pids: Iterable[int]) -> str:
    """What each thread of these processes waits for in the kernel."""
    lines = []
    for pid in dict.fromkeys(pids):
        process = Path(f"/proc/{pid}")
        lines.append(f"{pid} {_read(process / 'cmdline')[-200:]}")
        with contextlib.suppress(OSError):
            for thread in (process / "task").iterdir():
                words = [_read(thread / name) for name in ("comm", "wchan", "syscall")]
                lines.append(f"    {thread.name}: {' '.join(words)}")
    return "\n".join(lines)


def _users(*files: IO[bytes]) -> list[int]:
    """Processes that write their output into one of these files."""
    ours = [os.fstat(file.fileno()) for file in files]
    found: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        for number in 1, 2:
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                its = os.stat(process / "fd" / str(number))
                if any(os.path.samestat(its, each) for each in ours):
                    found.append(int(process.name))
    return found


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").replace("\0", " ").strip()
    return "?"


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="backslashreplace")
