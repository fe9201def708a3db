"""New versions under traffic of a server with two processes.

The clients are the standard library's: Triton's leave descriptors behind in each thread.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from tests.support.serving import Serving, serving
from tests.support.small import plus
from tests.support.waiting import DEADLINE, allowed, eventually

Result = tuple[str, float]
CALL = {"inputs": [{"name": "x", "shape": [2], "datatype": "FP32", "data": [1.0, 2.0]}]}


def put(root: Path, version: int, added: float) -> None:
    """A version by a rename, as a careful copier puts it there."""
    folder = root / "model" / str(version)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = root / "model" / ".unfinished"
    unfinished.write_bytes(plus(added))
    os.replace(unfinished, folder / "model.onnx")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    put(tmp_path, 1, 1.0)
    return tmp_path


class Client:
    """One client, with a new connection now and then, so that it comes to both processes."""

    def __init__(self, server: Serving) -> None:
        self._address = server.http
        self._connection = self._connect()
        self._count = itertools.count(1)

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._address, timeout=allowed(DEADLINE))

    def post(self, path: str, body: object) -> tuple[int, str]:
        """Status and text of an answer."""
        if next(self._count) % 20 == 0:
            self._connection.close()
            self._connection = self._connect()
        self._connection.request("POST", path, json.dumps(body))
        answer = self._connection.getresponse()
        return answer.status, answer.read().decode()

    def infer(self) -> Result:
        """The version that ran, and what it added."""
        status, text = self.post("/v2/models/model/infer", CALL)
        assert status == 200, text
        found = json.loads(text)
        return found["model_version"], found["outputs"][0]["data"][0] - 1.0

    def load(self) -> tuple[int, str]:
        return self.post("/v2/repository/models/model/load", {})

    def close(self) -> None:
        self._connection.close()


class Traffic:
    """Clients that call all the time, each in its own thread."""

    def __init__(self, server: Serving) -> None:
        self._server = server
        self._stop = threading.Event()
        self.last: dict[int, Result] = {}
        self.results: set[Result] = set()
        self.errors: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=[number]) for number in range(4)]

    def _run(self, number: int) -> None:
        client = Client(self._server)
        while not self._stop.is_set():
            try:
                self.last[number] = client.infer()
                self.results.add(self.last[number])
            except BaseException as error:
                self.errors.append(error)
                break
        client.close()

    def await_all(self, wanted: Result) -> None:
        """Returns when all clients get this."""
        all_wanted = [wanted] * len(self._threads)
        eventually(lambda: self.errors or list(self.last.values()) == all_wanted, f"{wanted} for all")
        assert not self.errors, self.errors[0]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(allowed(DEADLINE))


def test_versions_come_and_go_and_no_request_fails(root: Path) -> None:
    options = ("--model-control", "poll", "--poll-every", "0.2", "--processes", "2")
    with serving("--repository", root, *options) as server, Traffic(server) as traffic:
        traffic.await_all(("1", 1.0))
        for version in range(2, 6):
            put(root, version, version)
            traffic.await_all((str(version), float(version)))
            shutil.rmtree(root / "model" / str(version - 1))
            put(root, version, version + 0.5)
            traffic.await_all((str(version), version + 0.5))
        assert len(traffic.results) == 9


def test_a_reload_by_a_client_under_traffic(root: Path) -> None:
    options = ("--model-control", "explicit", "--load-model", "*", "--processes", "2")
    with serving("--repository", root, *options) as server, Traffic(server) as traffic:
        client = Client(server)
        traffic.await_all(("1", 1.0))
        for added in (2.0, 3.0, 4.0):
            put(root, 1, added)
            assert client.load() == (200, "")
            traffic.await_all(("1", added))
        (root / "model" / "1" / "model.onnx").write_bytes(b"no model")
        status, text = client.load()
        assert status == 503
        assert "failed to load 'model', " in text
        traffic.await_all(("1", 4.0))
        client.close()
