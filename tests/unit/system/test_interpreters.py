"""Which Python our processes run in: candidates and names, pure; what is found in a program of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from onnx_dl.system.interpreters import Facts, candidates, is_python

BASE = Facts("/usr/bin/python3.12", "/usr/bin/python3.12", "/usr", "/usr", "/usr", (3, 12))
VENV = BASE._replace(executable="/v/bin/python", prefix="/v", exec_prefix="/v")


def test_its_own_comes_first() -> None:
    assert next(candidates(VENV)) == "/v/bin/python"


@pytest.mark.parametrize("executable", ["", None])
def test_a_virtual_environment_stays_one(executable: str | None) -> None:
    found = list(candidates(VENV._replace(executable=executable)))
    assert found[:4] == ["/v/bin/python3.12", "/v/bin/python3", "/v/bin/python", "/usr/bin/python3.12"]


def test_without_any_executable() -> None:
    found = list(candidates(BASE._replace(executable="", base_executable=None)))
    assert found[:3] == ["/usr/bin/python3.12", "/usr/bin/python3", "/usr/bin/python"]


@pytest.mark.parametrize(
    ("path", "leads_to", "is_one"),
    [
        ("/usr/bin/python3.12", None, True),
        ("/usr/bin/python3.12-dbg", None, True),
        ("/usr/bin/python3", "/usr/bin/python3.12", True),
        ("/usr/bin/python3", "/usr/bin/python3.13", False),
        ("/usr/bin/python3.1", None, False),
        ("/usr/bin/python2", None, False),
        ("/v/bin/python", "/opt/other/bin/python", True),
        ("/opt/bin/tool-python", "/usr/bin/python3.12", True),
        ("/usr/bin/git", None, False),
        ("/usr/bin/uwsgi", None, False),
        ("python3.12", None, False),
        ("", None, False),
    ],
)
def test_names(path: str, leads_to: str | None, is_one: bool) -> None:
    assert is_python(path, (3, 12), lambda _: leads_to or path) is is_one


def told(code: str) -> str:
    head = "import sys; from onnx_dl.system import interpreters; "
    done = subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


@pytest.mark.parametrize("executable", ["''", "None", "'/bin/true'", "'/usr/bin/git'"])
def test_the_one_that_runs_this_is_found(executable: str) -> None:
    code = f"sys.executable = {executable}; print(interpreters.find())"
    found = told(code).strip()
    ask = [found, "-c", "import sys; print(sys.prefix, sys.version_info[:2])"]
    said = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=60).stdout
    assert said == f"{sys.prefix} {sys.version_info[:2]}\n"


def test_nowhere_is_one() -> None:
    code = (
        "sys.executable = ''; sys._base_executable = '/usr/bin/git'; "
        "sys.prefix = sys.exec_prefix = sys.base_prefix = '/nowhere'; interpreters.find()"
    )
    assert "set ONNX_DL_PYTHON to the path of one" in told(code)
