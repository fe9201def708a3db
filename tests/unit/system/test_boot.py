"""How processes are started: arguments, environments and entries; frozen programs as if this were one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from onnx_dl import SupervisorStartError
from onnx_dl.system import boot, frozen, heap_tuning
from tests.unit.test_layers import HEAVY, loaded_by


@pytest.fixture
def in_bundle(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """This process looks like a program in one file, which has not called freeze_support()."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "_MEIPASS", "/tmp/_MEI", raising=False)
    monkeypatch.setattr(frozen, "_BORN_WITH", {"_PYI_APPLICATION_HOME_DIR": "/tmp/_MEI"})
    monkeypatch.setattr(sys, "executable", "/opt/app")
    monkeypatch.delenv("ONNX_DL_FREEZE_SUPPORT", raising=False)
    yield monkeypatch
    os.environ.pop("ONNX_DL_FREEZE_SUPPORT", None)


def test_an_ordinary_program_starts_its_interpreter() -> None:
    launch = boot.launch("template", 7, "fork", environ={"A": "b"})
    assert launch.program == sys.executable
    assert (launch.argv[:2], launch.argv[-2:]) == ([sys.executable, "-P"], ["template", '[7, "fork"]'])
    assert launch.environment == heap_tuning.put_in({"A": "b"})


def test_it_may_call_freeze_support() -> None:
    boot.freeze_support()
    assert "ONNX_DL_FREEZE_SUPPORT" not in os.environ


def test_freeze_support_imports_nothing_heavy() -> None:
    assert not loaded_by("import onnx_dl; onnx_dl.freeze_support()") & HEAVY


def test_a_frozen_program_that_does_not_call_it(in_bundle: pytest.MonkeyPatch) -> None:
    with pytest.raises(SupervisorStartError, match="first statement in the program"):
        boot.launch("supervisor")


def test_a_process_of_ours_that_runs_as_the_application(in_bundle: pytest.MonkeyPatch) -> None:
    """The program calls freeze_support() in its first process only: it must not start itself for ever."""
    boot.freeze_support()
    in_bundle.setattr(sys, "argv", ["/opt/app", boot.MARKER, "supervisor", "[]"])
    with pytest.raises(SupervisorStartError, match="before numpy and onnxruntime are imported"):
        boot.launch("supervisor")


def test_a_frozen_program_starts_itself(in_bundle: pytest.MonkeyPatch) -> None:
    boot.freeze_support()
    launch = boot.launch("template", 7, "fork", environ={"LD_LIBRARY_PATH": "/lib"})
    assert launch[:2] == ("/opt/app", ["/opt/app", boot.MARKER, "template", '[7, "fork"]'])
    assert launch.environment["LD_LIBRARY_PATH"] == "/tmp/_MEI:/lib"
    assert launch.environment["_PYI_APPLICATION_HOME_DIR"] == "/tmp/_MEI"  # it does not unpack itself


def test_what_outlives_it_has_a_folder_of_its_own(in_bundle: pytest.MonkeyPatch) -> None:
    boot.freeze_support()
    assert frozen.unpacks_itself()
    assert boot.launch("supervisor", own_folder=True).environment["PYINSTALLER_RESET_ENVIRONMENT"] == "1"


def test_another_program_is_not_this_one(in_bundle: pytest.MonkeyPatch) -> None:
    """Which this program may have started, and which does not call freeze_support()."""
    boot.freeze_support()
    in_bundle.setattr(sys, "executable", "/opt/other")
    with pytest.raises(SupervisorStartError):
        boot.launch("supervisor")


def test_an_interpreter_that_was_chosen_has_its_own_path_and_libraries(
    in_bundle: pytest.MonkeyPatch,
) -> None:
    environ = {"LD_LIBRARY_PATH": "/tmp/_MEI:/lib", "LD_LIBRARY_PATH_ORIG": "/lib", "_PYI_X": "1", "A": "b"}
    launch = boot.launch("supervisor", python="/usr/bin/python3", environ=environ)
    assert launch.program == "/usr/bin/python3"
    assert json.loads(launch.argv[4])[0] is None
    assert launch.environment == heap_tuning.put_in({"LD_LIBRARY_PATH": "/lib", "A": "b"})


def ended(*argv: str, code: str) -> subprocess.CompletedProcess[str]:
    head = "import sys; sys.frozen = True; from onnx_dl.system import boot; "
    return subprocess.run(
        [sys.executable, "-c", head + code, *argv], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_process_of_ours_ends_in_freeze_support() -> None:
    code = "boot.ENTRIES['exit'] = 'sys'; sys.main = lambda n: print('ran', n); "
    done = ended(boot.MARKER, "exit", "[3]", code=code + "boot.freeze_support(); print('on')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ran 3\n", "")


def test_also_where_the_program_has_taken_its_arguments_away() -> None:
    code = "boot.ENTRIES['exit'] = 'sys'; sys.main = sys.exit; sys.argv[1:] = []; sys.orig_argv[1:3] = []; "
    done = ended(boot.MARKER, "exit", "[3]", code=code + "boot.freeze_support(); print('on')")
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


@pytest.mark.parametrize("argv", [(), ("file",), (boot.MARKER,), (boot.MARKER, "a", "[]", "b")])
def test_other_arguments_are_the_programs(argv: tuple[str, ...]) -> None:
    done = ended(*argv, code="boot.freeze_support(); print('on')")
    assert (done.returncode, done.stdout, done.stderr) == (0, "on\n", "")


def test_an_entry_that_this_version_does_not_have() -> None:
    done = ended(boot.MARKER, "nonsense", "[]", code="boot.freeze_support()")
    assert done.returncode == 1
    assert "this version has no process 'nonsense'" in done.stderr and "Restart" in done.stderr


def test_an_interpreter_of_another_version() -> None:
    launch = boot.launch("demo", "nothing")
    argv = [*launch.argv[:4], json.dumps([sys.path, [2, 7]]), *launch.argv[5:]]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "is not of the Python version of the application: set ONNX_DL_PYTHON" in done.stderr
