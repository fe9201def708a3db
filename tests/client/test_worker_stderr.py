"""What workers write on stderr goes to the stderr that the application has at that moment, or to its log."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from onnx_dl import ConfigError, InferenceSessionProxy, ModelHost, WorkerDied
from onnx_dl.client import worker_output
from tests.support.slow import identity_model, spin_model
from tests.support.waiting import DEADLINE, eventually, worker_pid

CPU = ["CPUExecutionProvider"]
LOADED, FAILED = b"[W:onnxruntime:", b"[E:onnxruntime:"
FEED = {"x": np.zeros(4, np.float32), "shape": np.array([3])}


def chatty_model() -> bytes:
    """y = reshape(x, shape).  onnxruntime warns of an unused initializer when it is loaded, and writes an
    error when a run fails."""
    infos = [
        helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (
            ("x", TensorProto.FLOAT, ["n"]),
            ("shape", TensorProto.INT64, ["k"]),
            ("y", TensorProto.FLOAT, None),
        )
    ]
    node = helper.make_node("Reshape", ["x", "shape"], ["y"])
    unused = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    graph = helper.make_graph([node], "chatty", infos[:2], infos[2:], [unused])
    model = helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])
    blob: bytes = model.SerializeToString()
    return blob


def fail(proxy: InferenceSessionProxy) -> None:
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail):
        proxy.run(None, FEED)


@contextlib.contextmanager
def redirected(path: Path | str) -> Iterator[None]:
    """Descriptor 2 leads to this file meanwhile, as in a notebook or a quiet wrapper."""
    kept = os.dup(2)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 2)
    os.close(fd)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers wait for what was written before, however slow the machine is."""
    monkeypatch.setattr(worker_output, "_PATIENCE", DEADLINE)


@pytest.fixture
def proxy(host: ModelHost) -> Iterator[InferenceSessionProxy]:
    host.start()
    with InferenceSessionProxy(chatty_model(), providers=CPU, host=host) as proxy:
        yield proxy


@pytest.mark.usefixtures("patient")
def test_a_redirection_around_the_load(
    proxy: InferenceSessionProxy, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = tmp_path / "said"
    with redirected(said):
        proxy.load()
        assert said.read_bytes().count(LOADED) == 1  # when load() returns
    seen = []
    fail(proxy)
    eventually(lambda: seen.append(capfd.readouterr().err) or FAILED.decode() in "".join(seen), "it is told")
    assert LOADED.decode() not in "".join(seen)
    assert FAILED not in said.read_bytes()


@pytest.mark.usefixtures("patient")
def test_a_quiet_load(proxy: InferenceSessionProxy, capfd: pytest.CaptureFixture[str]) -> None:
    with redirected(os.devnull):
        proxy.load()
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("patient")
def test_a_load_that_fails(host: ModelHost, capfd: pytest.CaptureFixture[str]) -> None:
    """In its own words, once, when the caller hears of it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 0
    broken = InferenceSessionProxy(chatty_model()[:-40], options, providers=CPU, host=host)
    with pytest.raises(Exception, match=r"(?i)protobuf parsing failed"):
        broken.load()
    del broken
    assert "onnxruntime" in capfd.readouterr().err


@pytest.mark.usefixtures("patient")
def test_a_crash(host: ModelHost, tmp_path: Path) -> None:
    said = tmp_path / "said"
    proxy = InferenceSessionProxy(spin_model(), providers=CPU, host=host)
    feed = {"x": np.zeros((64, 64), np.float32), "n": np.array(1 << 40)}
    threading.Timer(0.0, crash, [host]).start()
    with redirected(said), pytest.raises(WorkerDied) as caught:
        proxy.run(None, feed)
    del proxy
    assert b"Fatal Python error: Segmentation fault" in said.read_bytes()
    assert "Fatal Python error: Segmentation fault" in caught.value.stderr


def crash(host: ModelHost) -> None:
    """Once a call is under way."""
    eventually(lambda: any(status.busy for status in host.snapshot().models), "a call")
    os.kill(worker_pid(host), signal.SIGSEGV)


# --- the log -----------------------------------------------------------------------------------------------


def test_the_log(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.DEBUG, "onnx_dl.worker")
    with ModelHost(worker_stderr="log") as host, host.events() as events:
        proxy = InferenceSessionProxy(chatty_model(), providers=CPU, host=host)
        fail(proxy)
        name, pid = host.snapshot().models[0].model, worker_pid(host)
        proxy.unload()
        del proxy, events
    found = [record for record in caplog.records if record.name == "onnx_dl.worker"]
    assert [(record.levelno, marked(record)) for record in found] == [
        (logging.WARNING, LOADED),
        (logging.ERROR, FAILED),
    ]
    assert {(record.onnx_dl_model, record.onnx_dl_pid) for record in found} == {(name, pid)}  # type: ignore[attr-defined]
    assert not any("\x1b" in record.getMessage() for record in found)
    assert capfd.readouterr().err == ""


def marked(record: logging.LogRecord) -> bytes | None:
    return next((mark for mark in (LOADED, FAILED) if mark.decode() in record.getMessage()), None)


class Curious(logging.Handler):
    """Uses a model in each record's place."""

    def __init__(self, proxy: InferenceSessionProxy) -> None:
        super().__init__()
        self.proxy = proxy
        self.found: list[Any] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(self.proxy.run(None, {"x": np.ones(2, np.float32)})[0].tolist())


def test_a_handler_that_uses_a_model() -> None:
    with ModelHost(worker_stderr="log") as host:
        handler = Curious(InferenceSessionProxy(identity_model(), providers=CPU, host=host))
        worker_output.logger.addHandler(handler)
        try:
            proxy = InferenceSessionProxy(chatty_model(), providers=CPU, host=host)
            fail(proxy)
            eventually(lambda: len(handler.found) >= 2, "both lines are handled")
        finally:
            worker_output.logger.removeHandler(handler)
            handler.close()
        assert handler.found[:2] == [[1.0, 1.0]] * 2


def test_neither() -> None:
    with pytest.raises(ConfigError, match='neither "inherit" nor "log"'):
        ModelHost(worker_stderr="nowhere")


# --- programs ----------------------------------------------------------------------------------------------

HEAD = """
import os, sys, warnings
warnings.simplefilter("ignore")
import numpy as np
from onnx_dl import InferenceSessionProxy, default_host
from tests.client.test_worker_stderr import FEED, chatty_model
default_host().start()
proxy = InferenceSessionProxy(chatty_model(), providers=["CPUExecutionProvider"])
def fail():
    try:
        proxy.run(None, FEED)
    except Exception as error:
        print(type(error).__name__, flush=True)
"""


def run(code: str, **how: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HEAD + code]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, check=False, **how)


def test_a_pipe_that_nobody_reads() -> None:
    """Neither a caller nor the program's end waits for it."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(write_end, bytes(1 << 16)):
            pass
    os.set_blocking(write_end, True)
    try:
        done = run("for _ in range(20): fail()", stderr=write_end)
    finally:
        os.close(read_end)
        os.close(write_end)
    assert (done.returncode, done.stdout) == (0, "Fail\n" * 20)


def test_a_reader_that_is_gone() -> None:
    """The program has taken SIGPIPE's default back: a write of its own would end it."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    code = "import signal; signal.signal(signal.SIGPIPE, signal.SIG_DFL); fail()"
    try:
        done = run(code, stderr=write_end)
    finally:
        os.close(write_end)
    assert (done.returncode, done.stdout) == (0, "Fail\n")


def test_closed_by_the_program() -> None:
    """A descriptor of ours may have the number then; nothing is written into it."""
    done = run("os.close(2); fail(); proxy.unload(); fail()", stderr=subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Fail\nFail\n", "")


def test_closed_from_the_beginning() -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", HEAD + "fail()"],
        stdout=subprocess.PIPE, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "Fail\n")


def test_an_application_that_forks(tmp_path: Path) -> None:
    """Each process has a host of its own, and its own stderr."""
    code = f"""
fail()
if (pid := os.fork()) == 0:
    os.dup2(os.open({str(tmp_path / "child")!r}, os.O_WRONLY | os.O_CREAT), 2)
    fail()
    default_host().close()
    os._exit(0)
os.waitpid(pid, 0)
"""
    done = run(code, stderr=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (0, "Fail\nFail\n")
    for said in (done.stderr.encode(), (tmp_path / "child").read_bytes()):
        assert (said.count(LOADED), said.count(FAILED)) == (1, 1)
