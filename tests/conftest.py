"""Fixtures: a host for each test, and the count of what it left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import psutil
import pytest

# Where a test imports onnxruntime, it must not start its telemetry thread and open its database.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
# Tests neither read nor fill the user's cache.
os.environ["ONNX_DL_CACHE"] = "off"
# Tests start thousands of processes: if Python may not keep its bytecode, each compiles the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

from onnx_dl import InferenceSessionProxy, ModelHost
from tests.support.slow import identity_model
from tests.support.waiting import DEADLINE, allowed, eventually, is_process

# Here, too; pytest keeps what it compiles for the next of its processes.
sys.dont_write_bytecode = False

# Programs that tests start begin as from a terminal, also where tests run under nohup or in the background.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Has each later ``gc.collect()`` skip what was collected.

    These are half a million objects: a quarter of a second, each time that a test looks for what it left.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Gives the collector back what was frozen: plugins that end now ask it who refers to what."""
    gc.unfreeze()


def _belongings() -> dict[str, set[object]]:
    """What this process has of what a test must not leave: threads, descriptors, children, shared memory."""
    fds = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # the descriptor of the listing itself
            continue
        if not target.startswith("/dev/nvidia"):  # CUDA's driver keeps these until the process ends
            fds[fd] = target
    return {
        "threads": {t.name for t in threading.enumerate() if t.name.startswith("onnx-dl")},
        "descriptors": set(fds.items()),
        "children": _children(),
        # Other programs come and go there, too; these are the names that Python or we would give.
        "shared memory": {name for name in os.listdir("/dev/shm") if "onnx" in name or "psm_" in name},
    }


def _children() -> set[object]:
    """Process ids of all descendants but templates and standby workers, which a host has or has not.

    If a test leaves one of these, it leaves a host, too, and that counts.
    """
    found: set[object] = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if not (is_process(process, "template") or is_process(process, "standby")):
                found.add(process.pid)
    return found


def _left(before: dict[str, set[object]]) -> dict[str, set[object]]:
    after = _belongings()
    return {kind: after[kind] - before[kind] for kind in after if after[kind] - before[kind]}


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test ends by counting: processes, threads, descriptors, shared memory."""
    before = _belongings()
    yield
    request.node.funcargs.clear()  # pytest would hold on to proxies, and these to their connection
    deadline = time.monotonic() + allowed(DEADLINE)
    while gc.collect() >= 0 and (left := _left(before)):
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.002)


@pytest.fixture
def host(nothing_is_left_behind: None) -> Iterator[ModelHost]:
    """A host of the test's own, closed at its end."""
    with ModelHost() as host:
        yield host


@pytest.fixture(scope="module")
def module_host() -> Iterator[ModelHost]:
    """The host of a file's tests.  It runs before they count what they leave: each of them has its own
    sessions."""
    with ModelHost() as host:
        _use(host)
        eventually(lambda: not host.snapshot().models, "the end of the model")
        yield host


def _use(host: ModelHost) -> None:
    """So that it has all that it keeps."""
    InferenceSessionProxy(identity_model(), host=host).run(None, {"x": np.zeros(1, np.float32)})
