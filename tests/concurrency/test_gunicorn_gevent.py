"""gunicorn -k gevent: one worker answers other requests while models run, also with --preload."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.sharing import belonging, own_runtime
from tests.support.waiting import DEADLINE, allowed, eventually
from tests.support.webserver import get, gunicorn, listens

pytestmark = pytest.mark.slow

CALLS = 4

APP = """
import json, os
import numpy as np
import onnx_dl
from tests.support.slow import spin_model

proxy = onnx_dl.InferenceSessionProxy(spin_model(), providers=["CPUExecutionProvider"])
if os.environ["USED"]:  # before the fork, in a process that is not patched
    proxy.run(None, {"x": np.ones((64, 64), np.float32), "n": np.array(1)})


def app(environ, start_response):
    turns = int(environ["QUERY_STRING"])
    if turns:
        result = proxy.run(None, {"x": np.ones((64, 64), np.float32), "n": np.array(turns)})[0].shape
    else:
        result = ()
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps([os.getpid(), result]).encode()]
"""


def ask(path: Path, turns: int) -> tuple[int, list[int], float]:
    """Who answered, what, and when."""
    pid, result = json.loads(get(path, turns))
    return pid, result, time.monotonic()


def seconds(path: Path, turns: int) -> float:
    """How long an answer takes."""
    begun = time.monotonic()
    return ask(path, turns)[2] - begun


@pytest.fixture
def runtime(nothing_is_left_behind: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with own_runtime(monkeypatch) as folder:
        yield folder


@pytest.fixture(params=["", "--preload"])
def server(
    request: pytest.FixtureRequest, runtime: Path, tmp_path: Path
) -> Iterator[subprocess.Popen[bytes]]:
    pytest.importorskip("gevent")
    options = ["-k", "gevent", "--workers", "1", *request.param.split()]
    paths = os.pathsep.join([os.getcwd(), *sys.path])
    with gunicorn(runtime / "web", tmp_path, APP, options, USED=request.param, PYTHONPATH=paths) as process:
        yield process


def test_other_requests_are_answered_meanwhile(server: subprocess.Popen[bytes], runtime: Path) -> None:
    path = runtime / "web"
    eventually(lambda: listens(path), "gunicorn listens", 4 * DEADLINE)
    assert ask(path, 1)[1] == [64, 64]
    turns = int(2000 * 1.0 / min(seconds(path, 2000) for _ in range(3)))
    with ThreadPoolExecutor(CALLS) as threads:
        long = [threads.submit(ask, path, turns) for _ in range(CALLS)]
        quick = [ask(path, 0) for _ in range(5)]
        answers = [call.result(allowed(4 * DEADLINE)) for call in long]
    assert {pid for pid, _, _ in (*answers, *quick)} == {quick[0][0]}
    assert [result for _, result, _ in answers] == [[64, 64]] * CALLS
    assert quick[-1][2] < min(when for _, _, when in answers)
    server.terminate()
    assert server.wait(allowed(2 * DEADLINE)) == 0
    eventually(lambda: not belonging(runtime), "the end of all that it had started")
