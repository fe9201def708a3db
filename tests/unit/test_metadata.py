"""What the package says of itself, in one voice."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import onnx_dl
from onnx_dl import builds

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def test_the_version_is_that_of_the_distribution() -> None:
    assert importlib.metadata.version("onnx-dl") == onnx_dl.__version__


def test_onnxruntime_is_an_extra() -> None:
    assert not [one for one in PROJECT["dependencies"] if "onnxruntime" in one]
    bringing = {name for name, wanted in EXTRAS.items() if any("onnxruntime" in one for one in wanted)}
    assert bringing == {"gpu", "cpu"}


def test_the_floor_is_written_once_more_in_the_code() -> None:
    floors = re.findall(r"onnxruntime(?:-gpu)?>=([\d.]+)", " ".join([*EXTRAS["gpu"], *EXTRAS["cpu"]]))
    assert set(floors) == {builds.FLOOR} and len(floors) == 3
    assert f"onnxruntime {builds.FLOOR} or newer" in (ROOT / "README.md").read_text()


def test_commands_of_the_readme() -> None:
    commands = re.findall(r"^python -m pip install .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands == [
        'python -m pip install -e ".[gpu]" && onnx-dl demo',
        'python -m pip install -e ".[gpu,test]" && python -m pytest',
    ]
