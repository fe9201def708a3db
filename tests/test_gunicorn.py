"""A web server forks four workers of a program that made a proxy: one copy of the model serves them all."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from onnx_dl.rendezvous import Place
from tests.sharing import belonging, own_runtime
from tests.test_capacity import MB, weighty
from tests.waiting import DEADLINE, eventually

pytestmark = pytest.mark.slow

make_settings = pytest.importorskip("gunicorn.config").make_settings

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


class Request(http.client.HTTPConnection):
    """Over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=4 * DEADLINE)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def ask(path: Path, value: int) -> tuple[int, float, int]:
    """Who answered, what, and which worker of ours computed it."""
    request = Request(path)
    try:
        request.request("GET", f"/?{value}")
        response = request.getresponse()
        body = response.read()
        assert response.status == 200, body
        pid, result, worker = json.loads(body)
        return pid, result, worker
    finally:
        request.close()


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


def pss(pid: int) -> int:
    return psutil.Process(pid).memory_full_info().pss


@pytest.fixture
def server(runtime: Path, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    (tmp_path / "web.py").write_text(APP)
    model = weighty(tmp_path / "large.onnx", SIZE, 3)
    command = [sys.executable, "-m", "gunicorn", "--preload", "--workers", str(WORKERS)]
    if any("control_socket" in name for name in make_settings()):  # newer ones put it into the user's folder
        command.append("--no-control-socket")
    command += [
        "--bind",
        f"unix:{runtime}/web",
        "--graceful-timeout",
        "5",
        "--log-level",
        "warning",
        "web:app",
    ]
    environment = os.environ | {"ONNX_DL_HOST": "web", "MODEL": model}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment)
    yield process
    if process.poll() is None:
        process.terminate()
        process.wait(2 * DEADLINE)


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
    holder = Place("web").holder()
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
    assert server.wait(2 * DEADLINE) == 0
    eventually(lambda: {p.pid for p in belonging(runtime)} & set(answers) == set(), "gunicorn's workers end")
    eventually(lambda: not psutil.pid_exists(model_pid), "the model unloads with its last user")
