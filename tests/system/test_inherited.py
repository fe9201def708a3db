"""What an application was told, or has lost, is not its host's: models load, unload, and nothing is left."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from onnx_dl.demo.assets import model_path
from tests.supervisor.test_application_death import assert_gone

pytestmark = pytest.mark.slow

USE = f"""
import json, os, resource, signal, sys, threading, time
import numpy as np, onnx_dl
feed = {{"pixels": np.zeros((1, 64), np.float32)}}
proxy = onnx_dl.InferenceSessionProxy({str(model_path("digits"))!r})
first = proxy.run(None, feed)[0].tolist()
print("what the program prints" * 100, flush=True)
unloaded = proxy.unload(timeout=60)
again = proxy.run(None, feed)[0].tolist()
(status,) = onnx_dl.default_host().snapshot().models
told = dict(
    supervisor=onnx_dl.default_host().snapshot().supervisor_pid,
    same=first == again, unloaded=unloaded,
    umask=[line.split()[1] for line in open(f"/proc/{{status.pid}}/status") if line.startswith("Umask")],
    core=resource.prlimit(status.pid, resource.RLIMIT_CORE),
    descriptors=resource.prlimit(status.pid, resource.RLIMIT_NOFILE),
)
with open(sys.argv[1], "w") as file:
    json.dump(told, file)
"""

BEFORE = {
    "nothing": "",
    "signals that are blocked": "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())",
    "SIGCHLD that is ignored": "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    "SIGCHLD whose handler reaps": """
def reap(*_):
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
signal.signal(signal.SIGCHLD, reap)""",
    "signals that are ignored": """
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)""",
    "SIGPIPE that ends it": "signal.signal(signal.SIGPIPE, signal.SIG_DFL)",
    "a folder that is removed": "import tempfile; d = tempfile.mkdtemp(); os.chdir(d); os.rmdir(d)",
    "umask and limits": "os.umask(0o027); resource.setrlimit(resource.RLIMIT_CORE, (0, 0))",
}
CLOSED = {"0, 1 and 2": "<&- >&- 2>&-", "2": "2>&-", "0 and 1": "<&- >&-", "none": ""}
ENDS = {
    "returns": "",
    "is killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "leaves": "os._exit(0)",
}


def told_by(before: str, end: str, folder: Path, closed: str = "") -> dict[str, Any]:
    """What a program says that does this first, uses a model, and ends like that."""
    said = folder / "said"
    code = f"import os, resource, signal, sys\n{before}\n{USE}\n{end}\n"
    command = ["sh", "-c", f'exec "$0" "$@" {closed}', sys.executable, "-c", code, str(said)]
    with open(folder / "out", "w") as out:
        subprocess.run(command, stdout=out, stderr=out, timeout=60, check=False)
    assert said.exists(), (folder / "out").read_text()
    told: dict[str, Any] = json.loads(said.read_text())
    return told


@pytest.mark.parametrize(
    ("before", "end"),
    # To a host, os._exit() is what SIGKILL is: no code of the program runs.  So once is enough.
    [*((before, end) for before in BEFORE for end in ("returns", "is killed")), ("nothing", "leaves")],
)
def test_what_an_application_was_told(before: str, end: str, tmp_path: Path) -> None:
    told = told_by(BEFORE[before], ENDS[end], tmp_path)
    assert_gone(told["supervisor"])
    assert told["same"] and told["unloaded"]


@pytest.mark.parametrize("end", ["returns", "is killed"])
@pytest.mark.parametrize("closed", CLOSED.values(), ids=CLOSED)
def test_standard_streams_that_are_closed(closed: str, end: str, tmp_path: Path) -> None:
    """What the program prints goes nowhere: not into a socket of ours that has got such a number."""
    told = told_by("", ENDS[end], tmp_path, closed)
    assert_gone(told["supervisor"])
    assert told["same"] and told["unloaded"]


def test_umask_and_limits_of_workers_are_the_applications(tmp_path: Path) -> None:
    """They write files for it.  Descriptors it gets as many as there may be."""
    told = told_by(BEFORE["umask and limits"], "", tmp_path)
    assert told["umask"] == ["0027"]
    assert told["core"] == [0, 0]
    soft, hard = told["descriptors"]
    assert soft == (65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536))


STARTS = """
import os, signal
from onnx_dl.client import launcher
from onnx_dl.core.settings import settings
from onnx_dl.concurrency.deadline import Deadline
process, address, secret = launcher.start(settings(), Deadline(None))
os.write(1, str(process.pid).encode())
{end}
"""


@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_an_application_that_ends_before_it_has_connected(end: str) -> None:
    """The supervisor waits for nobody."""
    done = subprocess.run(
        [sys.executable, "-c", STARTS.format(end=end)], stdout=subprocess.PIPE, timeout=60, check=False
    )
    assert_gone(int(done.stdout))


def test_an_application_that_ends_before_it_has_said_anything() -> None:
    """Its end of the pipe is closed, and there are no orders."""
    command = [sys.executable, "-c", "from onnx_dl.supervisor.main import main; main()"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
