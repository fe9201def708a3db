"""Which builds of onnxruntime harm each other, and which command mends that."""

from __future__ import annotations

import pytest

from onnx_dl.system import builds
from onnx_dl.system.builds import Build

PIP = "python -m pip"
PLAIN, GPU, OTHER = "onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"
CUDA = "CUDAExecutionProvider"
AGAIN = f"{PIP} install --force-reinstall --no-deps"


@pytest.mark.parametrize(
    ("found", "live", "asked", "words"),
    [
        ({}, "", (), ""),
        ({PLAIN: "1.31.1"}, PLAIN, (CUDA,), ""),  # onnxruntime says so itself
        ({PLAIN: "1.31.1", GPU: "1.31.1"}, PLAIN, (), ""),
        ({PLAIN: "1.31.1", GPU: "1.31.1"}, PLAIN, ("CPUExecutionProvider",), ""),
        ({PLAIN: "1.31.1", GPU: "1.31.1"}, PLAIN, (CUDA,), "does not have CUDA"),
        ({PLAIN: "1.31.1", GPU: "1.31.1"}, GPU, (CUDA,), ""),
        ({PLAIN: "1.31.1", GPU: "1.31.1"}, "", (CUDA,), ""),
        ({PLAIN: "1.32.0", GPU: "1.31.1"}, GPU, (), "their versions differ"),
        ({PLAIN: "1.31.1", GPU: "1.31.1"}, GPU, ("OpenVINOExecutionProvider",), ""),
        (
            {OTHER: "1.31.1", GPU: "1.31.1"},
            GPU,
            ("OpenVINOExecutionProvider",),
            "does not have OpenVINO",
        ),
    ],
)
def test_what_does_harm(found: dict[str, str], live: str, asked: tuple[str, ...], words: str) -> None:
    said = builds.clash(PIP, found, Build(live, found.get(live, "")), asked)
    assert words in said and bool(said) == bool(words)


@pytest.mark.parametrize(
    ("found", "asked", "command"),
    [
        ({}, (), f'{PIP} install "onnxruntime>={builds.FLOOR}"'),
        ({PLAIN: "1.31.1"}, (), f"{AGAIN} onnxruntime==1.31.1"),
        ({GPU: "1.31.1"}, (), f"{AGAIN} onnxruntime-gpu==1.31.1"),
        ({PLAIN: "1.31.1", GPU: "1.31.1"}, (CUDA,), f"{AGAIN} onnxruntime-gpu==1.31.1"),
        (
            {PLAIN: "1.32.0", GPU: "1.31.1"},
            (),
            f"{AGAIN} onnxruntime==1.31.1 && {AGAIN} onnxruntime-gpu==1.31.1",
        ),
        (
            {OTHER: "1.24.1", GPU: "1.31.1"},
            ("OpenVINOExecutionProvider",),
            f"{PIP} uninstall -y onnxruntime-gpu && {AGAIN} onnxruntime-openvino==1.24.1",
        ),
    ],
)
def test_the_command(found: dict[str, str], asked: tuple[str, ...], command: str) -> None:
    assert builds.repair(PIP, found, asked) == command


@pytest.mark.parametrize(
    ("version", "old"),
    [
        ("1.22.1", True),
        ("1.23.1", True),
        ("1.23.2", False),
        ("1.24.0rc1", False),
        ("2.0", False),
        ("", False),
        ("1.9", True),
    ],
)
def test_the_floor(version: str, old: bool) -> None:
    assert builds.is_too_old(version) == old


def test_without_any() -> None:
    assert "onnxruntime-gpu" in builds.missing(PIP, "linux", "x86_64")
    assert "onnxruntime-gpu" not in builds.missing(PIP, "linux", "aarch64")
    assert builds.missing("uv pip", "linux", "aarch64").count("uv pip install") == 1
