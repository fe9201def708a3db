"""A web server forks four workers of a program that made a proxy: one copy of the model serves them all."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from onnx_dl.transport.rendezvous import HostEntry
from tests.supervisor.test_capacity import MB, weighty
from tests.support.sharing import belonging, own_runtime
from tests.support.waiting import DEADLINE, allowed, eventually
from tests.support.webserver import get, gunicorn, listens

pytestmark = pytest.mark.slow

WORKERS = 4
SIZE = 64
"""MB of the model's weights."""

APP = """
import json, os
import numpy as np
import onnx_dl

proxy = onnx_dl.InferenceSessionProxy(os.environ["MODEL"], providers=["CPUExecutionProvider"])


def app(environ, start_response):
    value = float(environ["QUERY_STRING"])
    y = proxy.run(None, {"x": np.full((1, 1024), value, np.float32)})[0]
    status, = onnx_dl.default_host().snapshot().models
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps([os.getpid(), float(y[0, 0]), status.pid]).encode()]
"""


@pytest.fixture(autouse=True)
def runtime(nothing_is_left_behind: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with own_runtime(monkeypatch) as folder:
        yield folder


def ask(path: Path, value: int) -> tuple[int, float, int]:
    """Who answered, what, and which worker of ours computed it."""
    pid, result, worker = json.loads(get(path, value))
    return pid, result, worker


def pss(pid: int) -> int:
    return psutil.Process(pid).memory_full_info().pss


@pytest.fixture
def server(runtime: Path, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    model = weighty(tmp_path / "large.onnx", SIZE, 3)
    options = ["--preload", "--workers", str(WORKERS)]
    with gunicorn(runtime / "web", tmp_path, APP, options, ONNX_DL_HOST="web", MODEL=str(model)) as process:
        yield process


def test_four_workers_and_one_copy(server: subprocess.Popen[bytes], runtime: Path) -> None:
    eventually(lambda: listens(runtime / "web"), "gunicorn listens", 4 * DEADLINE)
    answers: dict[int, set[int]] = {}

    def all_have_answered() -> bool:
        assert server.poll() is None
        pid, result, worker = ask(runtime / "web", 2)
        assert result == 1024 * 3 * 2
        answers.setdefault(pid, set()).add(worker)
        return len(answers) == WORKERS

    eventually(all_have_answered, "each of gunicorn's workers answers", 4 * DEADLINE)
    (model_pid,) = set.union(*answers.values())
    holder = HostEntry("web").holder()
    assert holder is not None
    ours = [p for p in belonging(runtime) if p.pid not in answers and p.pid != server.pid]
    with_model = [p.pid for p in ours if pss(p.pid) > SIZE * MB]
    assert with_model == [model_pid]
    shared = pss(model_pid)
    applications = sum(map(pss, answers))
    total = sum(pss(process.pid) for process in ours)
    print(f"\nPSS: the one copy {shared >> 20} MB, four would take {WORKERS * shared >> 20} MB;")
    print(f"all of ours together {total >> 20} MB, gunicorn's workers {applications >> 20} MB")
    # No application has weights of its own, and all processes of ours together take less than two copies.
    assert all(pss(pid) < SIZE * MB for pid in answers)
    assert total < 2 * shared < WORKERS * SIZE * MB
    server.send_signal(signal.SIGTERM)
    assert server.wait(allowed(2 * DEADLINE)) == 0
    eventually(lambda: {p.pid for p in belonging(runtime)} & set(answers) == set(), "gunicorn's workers end")
    eventually(lambda: not psutil.pid_exists(model_pid), "the model unloads with its last user")
