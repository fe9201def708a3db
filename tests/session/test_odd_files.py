"""Files that are no models: the application stays free, and the load says what is wrong."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest

from onnx_dl import InferenceSessionProxy, LoadTimeout, ModelHost
from tests.unit.workers.load_cache.test_store import nested

CPU = ["CPUExecutionProvider"]


def zeros(path: Path) -> None:
    path.write_bytes(bytes(32 << 20))


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(3 << 30)


def deep(path: Path) -> None:
    path.write_bytes(nested(300))


def numbers(path: Path) -> None:
    path.write_bytes(b"\x08\x00" * (1 << 20))


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    path.symlink_to("gone")


def folder(path: Path) -> None:
    path.mkdir()


def empty(path: Path) -> None:
    path.touch()


def told(open_model: Callable[[], object]) -> tuple[str, str]:
    """How it is refused."""
    with pytest.raises(Exception, match="ONNXRuntimeError") as refused:
        open_model()
    return type(refused.value).__name__, str(refused.value)


@pytest.mark.parametrize("make", [zeros, sparse, deep, numbers, loop, dangling, folder, empty])
def test_it_is_refused_in_onnxruntimes_words_and_soon(
    host: ModelHost, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "m.onnx"
    make(path)
    expected = told(lambda: onnxruntime.InferenceSession(path, providers=CPU))
    began = time.process_time()
    assert told(lambda: InferenceSessionProxy(path, providers=CPU, host=host, eager=True)) == expected
    assert time.process_time() - began < 2, "the application has looked through all of it"


@pytest.mark.parametrize("name", ["file/m.onnx", "x" * 300 + ".onnx", "y/" * 3000 + "m.onnx"])
def test_paths_that_cannot_be_looked_at(host: ModelHost, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    path = f"{tmp_path}/{name}"
    expected = told(lambda: onnxruntime.InferenceSession(path, providers=CPU))
    assert told(lambda: InferenceSessionProxy(path, host=host)) == expected


def test_a_fifo_does_not_hang_the_application(host: ModelHost, tmp_path: Path) -> None:
    """Its worker waits for somebody who writes, as onnxruntime would; everybody else goes on."""
    os.mkfifo(tmp_path / "fifo.onnx")
    proxy = InferenceSessionProxy(tmp_path / "fifo.onnx", host=host)
    began = time.process_time()
    with pytest.raises(LoadTimeout):
        proxy.load(timeout=0.5)
    assert time.process_time() - began < 2
