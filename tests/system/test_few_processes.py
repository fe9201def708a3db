"""A user who may have few processes and threads: the first use works, or one sentence says what to raise.

The limit does not count for root, and counts all processes of a user; so these are run by a user of their
own, which only root can do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Final

import psutil
import pytest

from tests.support.waiting import eventually

pytestmark = pytest.mark.slow

_CHOSEN: Final = os.environ.get("ONNX_DL_TEST_LIMITS", "1 4 6 8 12")
"""Limits to try; by hand, ``$(seq 40)``."""
_ENOUGH: Final = 12
HEAD: Final = """
import sys, threading
import numpy as np, psutil, resource
from onnx_dl import InferenceSessionProxy, ModelHost, OnnxDLError, ProcessesExhausted
from tests.support.small import plus
from tests.support.waiting import template_of, with_standby
x = np.ones(1000, np.float32)
def opened(host, constant=1.0):
    # One thread, wherever this runs.
    from onnxruntime import SessionOptions
    options = SessionOptions()
    options.intra_op_num_threads = 1
    return InferenceSessionProxy(plus(constant), options, ["CPUExecutionProvider"], host=host)
"""


class _User:
    """Somebody who has no processes but those of one test."""

    def __init__(self) -> None:
        self.id = 70_000 + os.getpid() % 10_000
        self._argv = ["setpriv", f"--reuid={self.id}", f"--regid={self.id}", "--clear-groups"]
        # The interpreter may lie in a folder of root's alone.
        self._argv += ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]

    def run(self, limit: int, code: str) -> subprocess.CompletedProcess[str]:
        argv = [*self._argv, "prlimit", f"--nproc={limit}", sys.executable, "-c", code]
        # numpy's threads in the program itself are none of ours.
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, env=environment)

    def has_nothing(self) -> bool:
        for process in psutil.process_iter(["uids"]):
            if process.info["uids"] is not None and process.info["uids"].real == self.id:
                return False
        return True


@pytest.fixture
def user() -> _User:
    if os.getuid() != 0 or not (shutil.which("setpriv") and shutil.which("prlimit")):
        pytest.skip("only root can run programs as somebody else, by setpriv(1) and prlimit(1)")
    user = _User()
    if (done := user.run(100, "import onnxruntime")).returncode:
        pytest.skip(f"nobody else can be had: {done.stderr.strip()}")
    return user


@pytest.mark.parametrize("limit", [int(limit) for limit in _CHOSEN.split()])
def test_the_first_use(user: _User, limit: int) -> None:
    done = user.run(
        limit,
        HEAD
        + """
try:
    with ModelHost() as host:
        assert opened(host).run(None, {"x": x})[0][0] == 2
        print("works")
except OnnxDLError as error:
    print(error)
except RuntimeError as error:  # onnxruntime's own
    print(error, *error.__notes__)
""",
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout == "works\n" or "ulimit -u" in done.stdout, done.stdout
    assert done.stdout == "works\n" or limit < _ENOUGH, done.stdout
    eventually(user.has_nothing, "the end of all processes")


def test_what_comes_later_fails_alone(user: _User) -> None:
    """A call beside others, and the next model.  What is loaded goes on; where there is more again, so does
    all else."""
    done = user.run(
        60,
        HEAD
        + """
def let(pid, count):
    hard = resource.prlimit(pid, resource.RLIMIT_NPROC)[1]
    resource.prlimit(pid, resource.RLIMIT_NPROC, (count, hard))
def refused(act):
    try:
        act()
    except OnnxDLError as error:
        assert "ulimit -u" in str(error), error
        return type(error).__name__
with ModelHost() as host:
    one = opened(host)
    assert one.run(None, {"x": x})[0][0] == 2
    snapshot = host.snapshot()
    worker, model = snapshot.models[0].pid, one._handle.model()
    children = with_standby(snapshot.supervisor_pid).children
    template = template_of(host)
    call = model.prepare(one._handle.lease, lambda lane: None)  # the one that there is
    let(worker, 1)
    print(refused(lambda: one.run(None, {"x": x})))
    let(worker, 60)  # the lane may be closed when it is idle for a while
    call.release()
    assert one.run(None, {"x": x})[0][0] == 2
    let(template.pid, 1)
    for standby in children():  # a load would have its process
        if "standby" in " ".join(standby.cmdline()):
            standby.kill()
    print(refused(lambda: opened(host, 2.0).run(None, {"x": x})))
    assert one.run(None, {"x": x})[0][0] == 2
    let(template.pid, 60)
    assert opened(host, 2.0).run(None, {"x": x})[0][0] == 3
    call = model.prepare(one._handle.lease, lambda lane: None)
    assert one.run(None, {"x": x})[0][0] == 2
    call.release()
""",
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.split() == ["ProcessesExhausted", "WorkerDied"]
    eventually(user.has_nothing, "the end of all processes")
