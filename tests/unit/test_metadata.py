"""What the package says of itself, in one voice."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import onnx_dl
from onnx_dl.system import builds

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


def _needed(names: set[str]) -> set[str]:
    """All that these distributions bring, of what is installed, without extras."""
    found: set[str] = set()
    while names:
        name = names.pop()
        found.add(name)
        try:
            wanted = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        names |= {_name(one) for one in wanted if "extra ==" not in one} - found
    return found


def _name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")  # type: ignore[index]


def test_tests_bring_no_onnxruntime() -> None:
    names = {_name(one) for extra in ("test", "dev") for one in EXTRAS[extra]} - {"onnx-dl"}
    assert not {name for name in _needed(names) if name.startswith("onnxruntime")}
