"""What ``onnx-dl run`` makes of its command line and environment: pure functions."""

from __future__ import annotations

import os
import sys

import pytest

from onnx_dl.cli import run
from onnx_dl.cli.output import size_to_fill, wrapped
from onnx_dl.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "own"),
    [
        ("run app.py --ttl 5", 1),
        ("run --ttl 5 app.py", 3),
        ("run --ttl=5 --lazy app.py", 3),
        ("run --set a:b=c --set d:e=f --memory-limit 1GiB -m package --ttl 5", 7),
        ("run -h app.py", 2),
        ("run --lazy -u -c code", 2),
        ("run -- app.py", 1),
        ("run -", 1),
        ("run", 1),
        ("run --ttl", 3),
    ],
)
def test_where_the_program_begins(words: str, own: int) -> None:
    assert run.split(words.split()) == (words.split()[:own], words.split()[own:])


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("app.py -u", ""),
        ("-u app.py -O", "-u"),
        ("-uO -Xdev -X utf8 -W error app.py -B", "-u -O -X dev -X utf8 -W error"),
        ("-OOm package -u", "-O -O"),
        ("-Buc -u -O", "-B -u"),
        ("-mpackage -u", ""),
        ("-uWerror -m x", "-u -W error"),
        ("--check-hash-based-pycs always -u app.py", "--check-hash-based-pycs always -u"),
        ("-u - -O", "-u"),
        ("-u -- -O", "-u"),
        ("-Z -u app.py", ""),
    ],
)
def test_options_of_python(command: str, options: str) -> None:
    assert run.python_options(command.split()) == options.split()


def test_the_command_line_is_python_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "-mx", "run", "-u", "y"])
    made = run.prepare(["-O", "app.py", "--ttl", "5"], ttl="60")
    assert made.python == sys.executable
    assert made.arguments == [sys.executable, "-X", "dev", "-O", "app.py", "--ttl", "5"]


@pytest.mark.parametrize("option", ["-I", "-uE", "-SB"])
def test_python_that_would_not_listen(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"does not work with Python's option -\w\. Leave it out"):
        run.prepare([option, "app.py"])
    monkeypatch.setattr(sys, "orig_argv", ["python", option, "-m", "onnx_dl"])
    with pytest.raises(ConfigError, match="does not work with Python's option"):
        run.prepare(["app.py"])


@pytest.mark.parametrize("name", ["executable", "HOOK"])
def test_python_that_cannot_be_started(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*((sys, name, "") if name == "executable" else (run, name, "/a:b")))
    with pytest.raises(ConfigError, match="cannot start Python"):
        run.prepare(["app.py"])


@pytest.mark.parametrize("wrong", [{"settings": ["x"]}, {"ttl": "soon"}, {"memory_limit": "much"}])
def test_settings_are_checked_before_anything_runs(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        run.prepare(["app.py"], **wrong)
    with pytest.raises(ConfigError, match="needs a program"):
        run.prepare([])


@pytest.mark.parametrize("theirs", [None, "", "a", f"a{os.pathsep}b"])
def test_the_hook_comes_first(theirs: str | None) -> None:
    environ = {"X": "y"} if theirs is None else {"X": "y", "PYTHONPATH": theirs}
    hooked = run.hooked(environ, "orders")
    assert hooked["PYTHONPATH"].split(os.pathsep) == [
        run.HOOK,
        *(theirs.split(os.pathsep) if theirs else []),
    ]
    assert (hooked["X"], hooked["ONNX_DL_RUN"]) == ("y", "orders")
    assert hooked.get("ONNX_DL_RUN_PYTHONPATH") == theirs


@pytest.mark.parametrize(
    ("utf8_mode", "more", "before"),
    [
        (True, {}, "C"),
        (False, {}, "C.UTF-8"),
        (True, {"LC_ALL": "C"}, "C.UTF-8"),
        (True, {"PYTHONCOERCECLOCALE": "0"}, "C.UTF-8"),
        (True, {"LC_CTYPE": "de_DE.UTF-8"}, "de_DE.UTF-8"),
    ],
)
def test_a_locale_that_python_changed(utf8_mode: bool, more: dict[str, str], before: str) -> None:
    environ = {"LC_CTYPE": "C.UTF-8"} | more
    assert run.uncoerced(environ, utf8_mode=utf8_mode) == environ | {"LC_CTYPE": before}


@pytest.mark.parametrize(
    ("told", "terminal", "expected"),
    [
        (None, None, 100), (None, 120, None), (None, 0, 100), (None, 19, 100),
        ("60", None, 60), ("60", 120, 60), ("0", None, 100), ("0", 120, 120), ("1", 0, 100),
        ("-5", 120, 120), ("abc", None, 100), ("", 120, 120), ("\u00b2", None, 100),
    ],
)  # fmt: skip
def test_how_wide_a_table_is(told: str | None, terminal: int | None, expected: int | None) -> None:
    assert size_to_fill(told, terminal, 20, 100) == expected


def test_the_host_of_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-mx", "run", "app.py"])
    assert run.prepare(["app.py"], environ={"ONNX_DL_HOST": "a"}).environ["ONNX_DL_HOST"] == "a"
    assert run.prepare(["app.py"], host="b", environ={"ONNX_DL_HOST": "a"}).environ["ONNX_DL_HOST"] == "b"
    assert "ONNX_DL_HOST" not in run.prepare(["app.py"], environ={}).environ


def test_errors_on_a_terminal_are_wrapped_between_words() -> None:
    path = "/a/" + "b" * 40
    assert wrapped(f"No file {path} is there.\nStart it.", 20) == f"No file\n{path}\nis there.\nStart it."
