"""Programs that use models at odd moments: in the middle of what they do with models, and in forked children.

``ONNX_DL_TEST_INTERRUPTIONS`` and ``ONNX_DL_TEST_FORKS`` are how many of them, ``ONNX_DL_TEST_SEED`` which.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from onnx_dl import InferenceSessionProxy, ModelEvent, ModelHost, ReentrantUse
from tests.support.sharing import own_runtime
from tests.support.slow import identity_model
from tests.support.waiting import DEADLINE, allowed

pytestmark = pytest.mark.slow

INTERRUPTIONS = int(os.environ.get("ONNX_DL_TEST_INTERRUPTIONS", "60"))
FORKS = int(os.environ.get("ONNX_DL_TEST_FORKS", "50"))
SEED = os.environ.get("ONNX_DL_TEST_SEED", "1")
ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> str:
    """What a program of the tests prints."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["step", "signal", "del", "weak", "fork"])
def test_a_program_that_interrupts_itself(kind: str) -> None:
    run("tests.support.interrupted", kind, SEED, INTERRUPTIONS // 20 if kind == "fork" else INTERRUPTIONS)


@pytest.mark.slow
@pytest.mark.timeout(120 + 2 * FORKS)
def test_children_of_a_program_whose_threads_use_models(monkeypatch: pytest.MonkeyPatch) -> None:
    with own_runtime(monkeypatch):
        assert f"{FORKS} children, 0 failed, 0 wrong" in run("tests.support.forks", FORKS, SEED)


def test_unloading_a_model_in_its_own_block(host: ModelHost) -> None:
    proxy = InferenceSessionProxy(identity_model(), host=host)
    with proxy.session():
        with pytest.raises(ReentrantUse, match="unload"):
            proxy.unload()
        assert proxy.is_loaded
    assert proxy.unload()


def test_a_callback_of_events_uses_the_model_and_closes_the_host(host: ModelHost) -> None:
    proxy = InferenceSessionProxy(identity_model(), host=host)
    done: list[object] = []
    loaded, ended = threading.Event(), threading.Event()

    def callback(event: ModelEvent) -> None:
        if event.type == "ready":
            assert loaded.wait(allowed(DEADLINE))
            done.append(proxy.unload())
            host.close()
            ended.set()

    host.on_event(callback)
    proxy.load()
    loaded.set()
    assert ended.wait(allowed(DEADLINE)) and done == [True]


def test_a_callback_waits_for_a_call_that_it_makes(host: ModelHost) -> None:
    proxy = InferenceSessionProxy(identity_model(), host=host)
    feed = {"x": np.ones(4, np.float32)}
    inner, outer = threading.Event(), threading.Event()

    def callback(*_: object) -> None:
        proxy.run_async(None, feed, lambda *_: inner.set(), None)
        if inner.wait(allowed(DEADLINE)):
            outer.set()

    proxy.run_async(None, feed, callback, None)
    assert outer.wait(allowed(2 * DEADLINE))


AT_EXIT = """
import atexit, gc, onnx_dl
from tests.support.slow import identity_model
import numpy as np
x = np.ones(4, np.float32)
def use(when):
    try:
        print(when, proxy.run(None, {"x": x})[0].sum(), flush=True)
    except onnx_dl.OnnxDLError as error:
        print(when, type(error).__name__, flush=True)
class Kept:
    def __del__(self):
        use("del")
atexit.register(use, "last")
proxy = onnx_dl.InferenceSessionProxy(identity_model())
atexit.register(use, "first")
kept = Kept(); kept.me = kept
use("before")
"""


def test_the_end_of_the_interpreter() -> None:
    """Before the host is closed there is a result, afterwards an error."""
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    *some, last = done.stdout.splitlines()
    assert some == ["before 4.0", "first 4.0", "last SupervisorError"]
    assert last == "del SupervisorError"
    assert done.stderr == ""


def test_a_signal_handler_while_the_host_starts() -> None:
    assert "'results'" in run("tests.support.interrupted", "signal", SEED, 20)
