"""``onnx-dl serve`` with one process: what it prints, its models, how it ends, what its host survives."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from onnx_dl.demo.assets import load_samples, model_path
from tests.support.serving import Serving, serving
from tests.support.sharing import belonging
from tests.support.slow import RUNS, spin_model
from tests.support.waiting import DEADLINE, allowed, eventually, is_process

SECONDS, FOR_EVER = 60_000, 1 << 40
"""Turns of a loop, of which each takes some 20 µs."""
DIGITS = str(model_path("digits"))


@pytest.fixture(scope="module")
def demo() -> Iterator[Serving]:
    with serving("--demo", "--metrics", "127.0.0.1:0") as server:
        yield server


class Answer:
    """Status and JSON of an answer; status 0: there was none."""

    def __init__(self, status: int, body: bytes) -> None:
        self.status = status
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(server: Serving, path: str, body: Any = None, timeout: float = DEADLINE) -> Answer:
    """One request on a connection of its own: POST if it has a body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{server.url}{path}", data)
    try:
        with urllib.request.urlopen(request, timeout=allowed(timeout)) as answer:
            return Answer(answer.status, answer.read())
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.read())
    except OSError:
        return Answer(0, b"")


def rows(name: str, count: int = 1) -> dict[str, Any]:
    """A request with samples of a model of the demo."""
    samples = load_samples()[name]
    given = samples.inputs[:count]
    tensor = {"name": samples.input_name, "shape": given.shape, "datatype": "FP32", "data": given.tolist()}
    return {"inputs": [tensor]}


def in_metrics(server: Serving, pattern: str) -> bool:
    """Whether a line is on the page, which lacks those of a host that is late."""
    return bool(re.search(pattern, ask(server, "/metrics").body.decode(), re.MULTILINE))


def infer(server: Serving, name: str, body: Any = None) -> Answer:
    return ask(server, f"/v2/models/{name}/infer", body or rows(name))


def host_pid(server: Serving) -> int | None:
    """The supervisor of the server's own host."""
    found = [process.pid for process in belonging(server.runtime) if is_process(process, "supervisor")]
    return found[0] if found else None


# --- what it prints and serves ----------------------------------------------------------------------------


def test_the_addresses_come_first_and_ready_last(demo: Serving) -> None:
    lines = [line for line in demo.output().splitlines() if not line.startswith("onnx-dl:")]
    assert re.fullmatch(r"HTTP: http://127\.0\.0\.1:\d+", lines[0])
    assert re.fullmatch(r"gRPC: 127\.0\.0\.1:\d+", lines[1])
    assert re.fullmatch(r"metrics: http://127\.0\.0\.1:\d+/metrics", lines[2])
    assert lines[-1] == "ready"


def test_the_three_commands_of_the_demo_work(demo: Serving) -> None:
    commands = re.findall(r"^  (\S.+)$", demo.output(), re.MULTILINE)
    environ = {**os.environ, "ONNX_DL_RUNTIME_DIR": str(demo.runtime)}
    said = [
        subprocess.run(
            ["bash", "-c", command], env=environ, capture_output=True, text=True, timeout=allowed(DEADLINE)
        )
        for command in commands
    ]
    assert [done.returncode for done in said] == [0, 0, 0], said
    is_ready, inferred, shown = (done.stdout for done in said)
    assert is_ready.startswith("HTTP/1.1 200 ")
    (score,) = json.loads(inferred)["outputs"][0]["data"]
    assert score == pytest.approx(float(load_samples()["diabetes"].targets[0]), abs=100)
    assert "diabetes.onnx" in shown


def test_every_model_of_the_demo_is_served(demo: Serving) -> None:
    """Wine's map of probabilities is no tensor: it is left out, and that is told."""
    assert infer(demo, "digits").json["outputs"][0]["data"] == [int(load_samples()["digits"].targets[0])]
    answer = infer(demo, "wine").json
    assert answer["outputs"][0]["data"] == [str(load_samples()["wine"].targets[0])]
    (told,) = re.findall(r"'output_probability' is a sequence.*", demo.output())
    assert told.endswith("; this output is left out")
    assert infer(demo, "nobody", rows("digits")).status == 404


def test_extensions_are_those_of_the_options(demo: Serving) -> None:
    found = set(ask(demo, "/v2").json["extensions"])
    assert {"statistics", "model_configuration", "binary_tensor_data"} <= found
    assert not found & {"system_shared_memory", "model_repository", "trace", "logging"}


def test_the_state_of_a_model(demo: Serving) -> None:
    infer(demo, "digits")
    state = ask(demo, "/v2/onnx_dl/models/digits").json
    assert (state["name"], state["version"], state["state"], state["ttl"]) == ("digits", "1", "ready", 300.0)
    assert state["memory"] > 0 and psutil.pid_exists(state["pid"]) and state["loads"] >= 1


def test_metrics_have_the_servers_and_the_hosts_families(demo: Serving) -> None:
    before = ask(demo, "/metrics").body.decode()
    infer(demo, "digits")
    after = ask(demo, "/metrics").body.decode()

    def count(text: str) -> float:
        (found,) = re.findall(r'^nv_inference_request_success{model="digits",version="1"} (\S+)$', text, re.M)
        return float(found)

    assert count(after) == count(before) + 1
    assert re.search(r"^onnx_dl_\w+", after, re.MULTILINE)


def test_metrics_as_prometheus_asks_for_them(demo: Serving) -> None:
    """In OpenMetrics, with the host's families, which come from another process."""
    accept = (
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
        "text/plain;version=1.0.0;q=0.4,*/*;q=0.2"
    )
    request = urllib.request.Request(f"{demo.url}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=allowed(DEADLINE)) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
        families = {each.name for each in text_string_to_metric_families(answer.read().decode())}
    assert {"nv_inference_request_success", "onnx_dl_loads"} <= families


def test_the_address_of_metrics_serves_nothing_else(demo: Serving) -> None:
    (address,) = re.findall(r"^metrics: (\S+)/metrics$", demo.output(), re.MULTILINE)
    with urllib.request.urlopen(f"{address}/metrics", timeout=allowed(DEADLINE)) as page:
        assert b"nv_inference_request_success" in page.read()
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"{address}/v2/models/digits", timeout=allowed(DEADLINE))
    caught.value.close()
    assert caught.value.code == 404


def test_the_servers_process_has_no_onnxruntime(demo: Serving) -> None:
    infer(demo, "digits")
    assert "onnxruntime" not in Path(f"/proc/{demo.pid}/maps").read_text()


def test_other_forms_of_addresses() -> None:
    with serving("--model", f"digits={DIGITS}", "--http", "[::1]:0", "--grpc", "localhost:0") as server:
        assert re.fullmatch(r"\[::1\]:\d+", server.http)
        assert infer(server, "digits").status == 200
        grpcclient = pytest.importorskip("tritonclient.grpc")
        with grpcclient.InferenceServerClient(server.grpc) as client:
            assert client.is_server_ready()


# --- how it does not start --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taken() -> Iterator[str]:
    """An address at which somebody listens."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as a server of several processes does
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield f"127.0.0.1:{sock.getsockname()[1]}"


@pytest.mark.parametrize("which", ["http", "grpc", "metrics"])
def test_an_address_that_is_taken(which: str, taken: str) -> None:
    with serving("--demo", f"--{which}", taken, "--processes", "2", ready=False) as server:
        assert server.process.wait(allowed(DEADLINE)) == 1
        assert f"cannot listen at {taken}" in server.output()
        assert "Traceback" not in server.output()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--demo", "--http", "0.0.0.0:0"], "--insecure"),
        (["--demo", "--token-file", "/nowhere/tokens"], "/nowhere/tokens"),
        (["--demo", "--memory-limit", "much"], "much"),
    ],
)
def test_options_with_which_it_does_not_start(words: list[str], reason: str) -> None:
    with serving(*words, ready=False) as server:
        assert server.process.wait(allowed(DEADLINE)) == 1
        assert reason in server.output() and "Traceback" not in server.output()


def test_without_the_extra_it_says_what_to_install() -> None:
    hidden = (
        "import sys; sys.modules['httptools'] = None; from onnx_dl.cli.main import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", hidden, "serve", "--demo"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and 'pip install "onnx-dl[serve]"' in done.stderr


# --- models of a host.toml --------------------------------------------------------------------------------


def test_a_host_file_names_models_limits_and_options(tmp_path: Path) -> None:
    file = tmp_path / "host.toml"
    file.write_text(
        f"""
memory_limit = "700MB"
[serve]
http = "127.0.0.1:1"
server_name = "triton"
grpc = "off"
[models.ziffern]
path = "{DIGITS}"
ttl = "7m"
eager = true
"""
    )
    with serving("--config", file, "--grpc", "off") as server:
        assert "gRPC:" not in server.output()
        assert ask(server, "/v2").json["name"] == "triton"
        assert infer(server, "ziffern", rows("digits")).status == 200
        state = ask(server, "/v2/onnx_dl/models/ziffern").json
        assert (state["state"], state["ttl"], state["loads"]) == ("ready", 420.0, 1)  # that of the host
        eventually(lambda: in_metrics(server, r"^onnx_dl_memory_limit_bytes 7e\+08$"), "the host's limit")
        server.end(signal.SIGKILL)  # a host that holds a model itself ends, too


def test_the_command_lines_limit_is_the_hosts(tmp_path: Path) -> None:
    file = tmp_path / "host.toml"
    file.write_text('memory_limit = "700MB"\n')
    with serving("--demo", "--config", file, "--memory-limit", "600MB") as server:
        eventually(lambda: in_metrics(server, r"^onnx_dl_memory_limit_bytes 6e\+08$"), "the host's limit")


# --- how it ends ------------------------------------------------------------------------------------------


def turns(count: int) -> dict[str, Any]:
    """A request that runs for so many turns."""
    x = {"name": "x", "shape": [64, 64], "datatype": "FP32", "data": [0.0] * 4096}
    n = {"name": "n", "shape": [], "datatype": "INT64", "data": [count]}
    return {"inputs": [x, n]}


class Slow:
    """A request that runs for so many turns, in a thread."""

    def __init__(self, server: Serving, count: int, *, loads: bool = True) -> None:
        """``loads``: the model is loaded before, by a short request."""
        if loads:
            assert Slow(server, 1, loads=False).wait().status == 200
        self.answer: Answer | None = None
        self._thread = threading.Thread(target=self._ask, args=(server, turns(count)))
        self._thread.start()
        eventually(lambda: pending(server) or self.answer is not None, "a request that runs")

    def _ask(self, server: Serving, body: Any) -> None:
        self.answer = ask(server, "/v2/models/slow/infer", body, 4 * DEADLINE)

    def wait(self) -> Answer:
        self._thread.join(allowed(4 * DEADLINE))
        assert self.answer is not None
        return self.answer


def pending(server: Serving) -> bool:
    return in_metrics(server, r"^nv_inference_pending_request_count{[^}]*slow[^}]*} [1-9]")


def test_a_drain_finishes_what_runs_and_refuses_what_comes(slow: Path) -> None:
    with serving("--model", f"slow={slow}") as server:
        kept = socket.create_connection(tuple(server.http.split(":")), allowed(DEADLINE))
        running = Slow(server, SECONDS)
        server.process.send_signal(signal.SIGTERM)
        refused = status_in_drain(kept)
        assert refused in (b"503", b""), refused
        assert running.wait().status == 200
        assert server.process.wait(allowed(DEADLINE)) == 0
        kept.close()


def status_in_drain(kept: socket.socket) -> bytes:
    """The status of a request on a connection that was there before the drain; empty: it was closed."""
    until = time.monotonic() + allowed(DEADLINE)
    while time.monotonic() < until:
        try:
            kept.sendall(b"GET /v2 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            said = kept.recv(4096)
        except OSError:
            return b""
        status = said[9:12]
        if status != b"200":
            return status
    raise AssertionError("it goes on as before")


def test_what_runs_too_long_is_cut_off(slow: Path) -> None:
    with serving("--model", f"slow={slow}", "--drain-timeout", "500ms") as server:
        running = Slow(server, FOR_EVER)
        assert server.end(signal.SIGHUP, DEADLINE) == 0
        assert running.wait().status != 200


def test_a_second_signal_ends_it_at_once(slow: Path) -> None:
    with serving("--model", f"slow={slow}", "--processes", "2") as server:
        running = Slow(server, FOR_EVER)
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: ask(server, "/v2/health/ready").status != 200, "the drain")
        assert server.end(signal.SIGINT, DEADLINE) == 1
        assert running.wait().status != 200


def test_a_signal_during_the_start(slow: Path) -> None:
    with serving("--model", f"slow={slow}", ready=False) as server:
        eventually(lambda: host_pid(server) or server.process.poll() is not None, "a host")
        assert server.end(signal.SIGINT) == 0, server.output()


def test_a_killed_server_leaves_nothing(slow: Path) -> None:
    with serving("--model", f"slow={slow}") as server:
        running = Slow(server, FOR_EVER)
        server.process.kill()
        server.process.wait()
        assert running.wait().status == 0
    # serving() has waited until host, template and worker were gone.


# --- when its host dies -----------------------------------------------------------------------------------


def test_the_next_request_after_the_hosts_death_works(slow: Path) -> None:
    with serving("--model", f"slow={slow}", "--model", f"digits={DIGITS}") as server:
        assert infer(server, "digits").status == 200
        first = host_pid(server)
        assert first is not None
        running = Slow(server, FOR_EVER)
        worker = psutil.Process(ask(server, "/v2/onnx_dl/models/slow").json["pid"])
        before = worker.cpu_times().user
        # What its worker has not begun is made at the next host.
        eventually(lambda: worker.cpu_times().user > before + RUNS, "the run")
        os.kill(first, signal.SIGKILL)
        assert running.wait().status == 500
        eventually(lambda: host_pid(server) not in (None, first), "the next host")
        assert infer(server, "digits").status == 200
        eventually(lambda: ask(server, "/v2/health/ready").status == 200, "a server that is ready")


def test_a_named_host_stays(demo: Serving) -> None:
    """Another server may be a client of the host of one that runs; that server ends without it."""
    (name,) = re.findall(r"--host (serve-\d+)$", demo.output(), re.MULTILINE)
    env = {"ONNX_DL_RUNTIME_DIR": str(demo.runtime)}
    before = host_pid(demo)
    with serving("--model", f"mine={DIGITS}", "--host", name, env=env) as other:
        assert infer(other, "mine", rows("digits")).status == 200
        assert host_pid(demo) == before
        assert other.end() == 0
    assert host_pid(demo) == before
    assert infer(demo, "digits").status == 200


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that runs for as many turns as its input says."""
    path = tmp_path_factory.mktemp("models") / "slow.onnx"
    path.write_bytes(spin_model())
    return path
