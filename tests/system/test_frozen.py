"""Programs that PyInstaller made, in a folder and in one file: real processes, and what they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from onnx_dl.transport.rendezvous import HostEntry
from tests.support.sharing import belonging, end, own_runtime
from tests.support.small import plus
from tests.support.waiting import DEADLINE, eventually

pytestmark = pytest.mark.slow

pytest.importorskip("PyInstaller")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of both programs; PyInstaller works for a quarter of a minute on them."""
    folder = tmp_path_factory.mktemp("frozen")
    build = [sys.executable, "-m", "PyInstaller", "--log-level", "ERROR", "--distpath", "dist"]
    done = subprocess.run(
        [*build, "--workpath", "work", str(ROOT / "tests/support/frozen/application.spec")],
        cwd=folder,
        # To compress as well as it can would take half of the time.
        env=os.environ
        | {"PYINSTALLER_CONFIG_DIR": str(folder / "config"), "PYINSTALLER_ZLIB_COMPRESSION_LEVEL": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


class Program:
    """One of the two, with a folder for what it unpacks."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path = path
        self.unpacked = folder / "unpacked"
        self.unpacked.mkdir()
        self.model = folder / "model.onnx"
        self.model.write_bytes(plus(3.0))

    def start(self, mode: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.path, mode, self.model],
            env=os.environ | {"TMPDIR": str(self.unpacked)} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def says(self, mode: str, **environment: str) -> tuple[Any, str]:
        """What it returns, and its stderr; it begins once, and leaves nothing unpacked but for a host."""
        with self.start(mode, **environment) as process:
            try:
                out, err = process.communicate(timeout=60)
            finally:
                process.kill()
        assert out.startswith("begins\n") and out.count("begins") == 1, out + err
        return json.loads(out.splitlines()[1]), quiet(err)

    def folders(self) -> list[str]:
        return os.listdir(self.unpacked)


def quiet(err: str) -> str:
    """Without what onnxruntime's GPU build says where its library for CUDA was left out."""
    return "".join(line for line in err.splitlines(True) if "provider bridge" not in line)


@pytest.fixture
def runtime(nothing_is_left_behind: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with own_runtime(monkeypatch) as folder:
        yield folder


@pytest.fixture(params=["application-folder/application-folder", "application-file"])
def program(request: pytest.FixtureRequest, built: Path, runtime: Path, tmp_path: Path) -> Program:
    return Program(built / request.param, tmp_path)


def test_loads_models_and_outlives_a_crash(program: Program) -> None:
    assert program.says("private") == ([5.0] * 5, "")
    assert not program.folders()


def test_without_freeze_support_nothing_starts(program: Program, runtime: Path) -> None:
    (kind, said), err = program.says("forgets")
    assert (kind, err) == ("SupervisorStartError", "")
    assert "onnx_dl.freeze_support()" in said and "first statement" in said
    assert not belonging(runtime) and not program.folders()


def test_children_of_multiprocessing_have_models_too(program: Program) -> None:
    """multiprocessing's freeze_support() does not return in them."""
    assert program.says("spawns") == (5.0, "")
    assert not program.folders()


def test_threads_before_freeze_support(program: Program) -> None:
    result, err = program.says("programs", A_THREAD="1")
    assert result[0] == 5.0
    assert err.count("starts threads before it calls onnx_dl.freeze_support()") == 1


def test_an_interpreter_that_was_chosen(program: Program) -> None:
    path = os.pathsep.join(str(ROOT / folder) for folder in ("src", ""))
    (result, programs), err = program.says("programs", ONNX_DL_PYTHON=sys.executable, PYTHONPATH=path)
    assert (result, err) == (5.0, "")
    assert programs == [os.path.realpath(sys.executable)] * 2


def test_all_ends_with_a_program_that_is_killed(program: Program, runtime: Path) -> None:
    process = program.start("waits")
    assert process.stdout is not None and process.stdout.readline() == "begins\n"
    result, pid = json.loads(process.stdout.readline())
    assert result == 5.0
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not belonging(runtime), "the end of all processes", 3.0)
    assert quiet(process.communicate()[1]) == ""
    assert not program.folders()


def test_a_shared_host_outlives_the_program(program: Program, runtime: Path) -> None:
    """And what it was unpacked into."""
    in_one_file = program.path.name == "application-file"
    (result, pid), err = program.says("shared")
    assert (result, err) == (5.0, "")
    assert len(program.folders()) == in_one_file
    assert program.says("shared") == ([5.0, pid], "")
    assert len(program.folders()) == in_one_file
    assert HostEntry("frozen").holder() == pid
    for child in psutil.Process(pid).children():
        child.kill()  # the next template comes from the host's own folder
    assert program.says("shared") == ([5.0, pid], "")
    end(pid)
    eventually(lambda: not belonging(runtime) and not program.folders(), "the end of the host", DEADLINE)
