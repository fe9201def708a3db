"""Packages that were written without us, unmodified: the same results, bit for bit, from models in workers.

The programs are in :mod:`tests.support.packages`; what is not installed is skipped.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

PROGRAMS = Path(__file__).parents[1] / "support" / "packages"
PACKAGES = {
    "listening": ("silero_vad", 1),
    "transcribing": ("faster_whisper", 1),
    "guessing": ("magika", 1),
    "reading": ("rapidocr_onnxruntime", 3),
    "reading_again": ("rapidocr", 3),
    "quantizing": ("sympy", 5),  # which onnxruntime's tools want
    "pickling": ("onnxruntime", 2),  # with providers that were named, and with onnxruntime's own
}
"""For each program, which package it uses and how many models that loads."""


def told(*command: str, cwd: Path = PROGRAMS) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return line


@functools.cache
def plain(program: str) -> dict[str, Any]:
    """What it prints without us."""
    package, _ = PACKAGES[program]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    result = told(f"{program}.py")
    assert "in workers" not in result
    return result


def check(program: str, result: dict[str, Any]) -> None:
    expected = plain(program)
    assert result["digest"] == expected["digest"], (result["result"], expected["result"])
    assert result["in process"] == []
    assert result["in workers"] == PACKAGES[program][1]


@pytest.mark.parametrize("program", PACKAGES)
def test_under_onnx_dl_run(program: str) -> None:
    plain(program)
    check(program, told("-m", "onnx_dl.cli", "run", "--ttl", "60", f"{program}.py"))


@pytest.mark.parametrize("program", PACKAGES)
def test_patched_after_it_imported_onnxruntime(program: str) -> None:
    plain(program)
    check(program, told(f"{program}.py", "--patch"))


def test_as_a_module_with_low_latency() -> None:
    check("pickling", told("-m", "onnx_dl.cli", "run", "--latency", "low", "-m", "pickling"))


def test_a_model_that_is_to_stay_is_told_of() -> None:
    expected = plain("pickling")
    result = told("-m", "onnx_dl.cli", "run", "--set", "digits*:in_process=1", "pickling.py")
    assert (result["digest"], result["in workers"]) == (expected["digest"], 0)
    # Each session that was made: itself, unpickled, and copied twice.
    assert [line.partition(" (")[0].rpartition("/")[2] for line in result["in process"]] == [
        "digits.onnx: in-process, because its settings say so"
    ] * 4
    assert all("pickling.py:" in line for line in result["in process"])


WHERE = """
import json, os, sys
print(json.dumps({"argv": sys.argv, "path": sys.path[0], "file": __file__, "name": __name__}))
"""


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(()),
        pytest.param(("-P",)),
    ],
    ids=["plain", "safe path"],
)
def test_what_a_program_sees_of_itself(before: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "where.py").write_text(WHERE)
    assert told(*before, "-m", "onnx_dl.cli", "run", "where.py", "a", "--", "-m", cwd=tmp_path) == told(
        *before, "where.py", "a", "--", "-m", cwd=tmp_path
    )


def test_an_error_of_ours_that_the_program_lets_pass(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("import onnx_dl\n\nraise onnx_dl.WorkerDied('the model is gone')\n")
    done = subprocess.run(
        [sys.executable, "-m", "onnx_dl.cli", "run", "fails.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "fails.py" in done.stderr


def test_integers_print_as_without_us() -> None:
    assert "dtype=int64" in plain("pickling")["result"]
    result = told("pickling.py", "--patch")
    assert result["result"] == plain("pickling")["result"]
