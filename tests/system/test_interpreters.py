"""Programs whose ``sys.executable`` is no interpreter, as where Python is embedded."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import os, sys
sys.executable = {executable}
import numpy as np
from onnx_dl import InferenceSessionProxy, OnnxDLError, default_host
from tests.support.slow import identity_model
{more}
try:
    proxy = InferenceSessionProxy(identity_model(), providers=["CPUExecutionProvider"])
    print(proxy.run(None, {{"x": np.full(2, 3, np.float32)}})[0][0])
    worker = default_host().snapshot().models[0].pid
    print(os.readlink(f"/proc/{{worker}}/exe") == os.readlink("/proc/self/exe"))
except OnnxDLError as error:
    print(type(error).__name__, error)
"""
NOWHERE = "sys._base_executable = None; sys.prefix = sys.exec_prefix = sys.base_prefix = '/nowhere'"


def ran(executable: str, more: str = "") -> str:
    code = PROGRAM.format(executable=executable, more=more)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("executable", ["''", "None", "'/bin/true'", "'/usr/bin/git'"])
def test_a_model_runs(executable: str) -> None:
    assert ran(executable) == "3.0\nTrue\n"


def test_where_there_is_none_one_sentence_says_so() -> None:
    said = ran("'/bin/true'", NOWHERE)
    assert said.startswith("SupervisorStartError Found no interpreter of Python")
    assert "set ONNX_DL_PYTHON" in said


def test_the_one_that_the_user_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_DL_PYTHON", sys.executable)
    assert ran("'/bin/true'", NOWHERE) == "3.0\nTrue\n"
