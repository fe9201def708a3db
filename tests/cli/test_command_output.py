"""Commands whose stdout is closed, full or read by nobody, and terminals of all sizes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest

from onnx_dl import ConfigError, connect
from onnx_dl.cli.doctor import collect
from onnx_dl.cli.doctor.checks import Finding, Mark
from onnx_dl.cli.main import main
from onnx_dl.demo.assets import model_path
from onnx_dl.transport import running_hosts
from tests.support.sharing import own_runtime
from tests.support.waiting import DEADLINE, allowed, eventually

pytestmark = pytest.mark.slow

DIGITS = str(model_path("digits"))
TELLING = [
    ["--help"], ["--version"], ["ps"], ["cache", "ls"], ["ps", "--json"], ["ps", "--help"],
    ["load", DIGITS], ["pin", DIGITS], ["unload", "nothing"], ["cache", "clear"],
    ["run", "--help"], ["supervise", "--help"],
    ["events"], ["completion", "bash"],
    ["events", "--help"], ["top", "--help"], ["stop", "--help"], ["demo", "--help"], ["doctor", "--help"],
]  # fmt: skip
"""What ends well and says something."""
FAILING = {
    1: [["ps", "--host", "none"], ["stop", "--host", "none"], ["run"]],
    2: [["nonsense"], ["events", "-n", "few"]],
}
"""What says nothing on stdout, by exit code."""
COMMAND = [sys.executable, "-X", "dev", "-m", "onnx_dl"]
FULL = "onnx-dl: [Errno 28] No space left on device\n"


class Outcome(NamedTuple):
    code: int
    stdout: str
    stderr: str


@pytest.fixture(autouse=True, scope="module")
def host() -> Iterator[None]:
    """One host for all, with a model in it."""
    with pytest.MonkeyPatch.context() as changes, own_runtime(changes):
        for name in ("COLUMNS", "LINES", "ONNX_DL_HOST", "NO_COLOR"):
            changes.delenv(name, raising=False)
        changes.setenv("TERM", "xterm")
        assert main(["load", DIGITS]) == 0
        yield


def ended(arguments: list[str], redirected: str = "", **environment: str) -> Outcome:
    """A command with Python's warnings, whose streams bash redirects so; 8 is a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            ["bash", "-c", f'exec "$@" 8>&{writer} {redirected}', "bash", *COMMAND, *arguments],
            env=os.environ | environment, pass_fds=[writer], capture_output=True, text=True,
            timeout=allowed(4 * DEADLINE),
        )  # fmt: skip
    finally:
        os.close(writer)
    return Outcome(done.returncode, done.stdout, done.stderr)


def all_ended(commands: list[list[str]], redirected: str) -> dict[str, Outcome]:
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda arguments: ended(arguments, redirected), commands)
        return {" ".join(arguments): outcome for arguments, outcome in zip(commands, found, strict=True)}


@pytest.mark.parametrize(
    ("redirected", "expected"),
    [
        (">&-", Outcome(0, "", "")),
        (">&- 2>&- <&-", Outcome(0, "", "")),
        (">/dev/full", Outcome(1, "", FULL)),
        (">/dev/full 2>&1", Outcome(1, "", "")),
        (">&8", Outcome(1, "", "")),
        (">&8 2>&1", Outcome(1, "", "")),
    ],
)
def test_what_cannot_be_written(redirected: str, expected: Outcome) -> None:
    """It is said once, if it can be, without a traceback and without a warning."""
    found = all_ended(TELLING[:4] if "2>" in redirected else TELLING, redirected)
    assert found == dict.fromkeys(found, expected)


@pytest.mark.parametrize("redirected", ["2>&-", ">&- 2>&- <&-", "2>/dev/full", ">&8 2>&1"])
def test_errors_that_cannot_be_written(redirected: str) -> None:
    """The exit code tells, and nothing goes to stdout instead."""
    for code, commands in FAILING.items():
        found = all_ended(commands, redirected)
        assert found == dict.fromkeys(found, Outcome(code, "", ""))


def test_a_program_has_its_streams_as_they_are() -> None:
    """:mod:`tests.cli.test_run` compares them with Python's."""
    assert ended(["run", "-c", "import sys; sys.exit(sys.stdout is None)"], ">&-").code == 1


# --- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["ps"], ["cache", "ls"], ["doctor"]])
def test_sizes_that_are_none(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What makes no sense has not been said."""
    if command == ["doctor"]:
        monkeypatch.setattr(collect, "examine", lambda: [Finding("processors", Mark.OK, "all " + "4" * 80)])

    def seen() -> str:
        assert main(command) == 0
        without_times = re.sub(r" +([\d.]+ m?s|\d+ m)\b", "", capsys.readouterr().out)
        return re.sub(r"[\d. ]+", " ", without_times)  # nor figures, which change

    usual = seen()
    for columns in ("", "0", "1", "-5", "5", "abc", "19", "\u00b2"):
        monkeypatch.setenv("COLUMNS", columns)
        assert seen() == usual, columns
    for name, value in (("LINES", "0"), ("TERM", "dumb"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
        assert seen() == usual, name
    monkeypatch.setenv("COLUMNS", "30")
    assert seen() != usual or command == ["cache", "ls"]  # which has no table


@pytest.mark.parametrize(
    ("columns", "environment"),
    [
        (0, {}), (1, {}), (25, {}), (80, {"COLUMNS": "0", "LINES": "0"}), (80, {"NO_COLOR": "1"}),
        (1, {"COLUMNS": "0", "TERM": "dumb"}),
    ],
)  # fmt: skip
def test_terminals(columns: int, environment: dict[str, str]) -> None:
    """A table comes, however little the terminal says of itself."""
    screen = on_terminal(["ps"], columns, environment)
    assert "digits" in screen and "ready" in screen and "Memory: " in screen
    assert not environment or "\x1b[32m" not in screen or "COLUMNS" in environment


def on_terminal(arguments: list[str], columns: int, environment: dict[str, str]) -> str:
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 1 if columns else 0, columns, 0, 0))
    try:
        done = subprocess.Popen(
            [*COMMAND, *arguments], stdout=terminal, stderr=terminal, env=os.environ | environment
        )
        os.close(terminal)
        seen = read_all(screen)
        assert done.wait(allowed(DEADLINE)) == 0, seen
        return seen
    finally:
        os.close(screen)


def read_all(fd: int) -> str:
    seen = b""
    with contextlib.suppress(OSError):  # the other end of a terminal is closed
        while data := os.read(fd, 1 << 16):
            seen += data
    return seen.decode()


# --- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", " ", "../x", ".x"])
@pytest.mark.parametrize("command", ["ps", "top", "events", "load", "pin", "unload", "stop", "supervise"])
def test_a_name_of_no_host(command: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--host", name])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and f"{name!r} is not a host name; use letters" in err


def test_no_name_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable is none; an empty name is no name."""
    monkeypatch.setenv("ONNX_DL_HOST", "")
    assert main(["ps"]) == 0
    with pytest.raises(ConfigError, match="'' is not a host name"):
        connect("")


# --- a host in the foreground ------------------------------------------------------------------------------


@pytest.mark.parametrize("redirected", [">&-", ">&8 2>&1", ">/dev/full"])
def test_a_host_serves_whatever_becomes_of_its_output(redirected: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = ["bash", "-c", f'exec "$@" 8>&{writer} {redirected}', "bash", *COMMAND]
    with subprocess.Popen(
        [*command, "supervise", "--host", "unheard"], pass_fds=[writer], stderr=subprocess.PIPE, text=True
    ) as process:
        os.close(writer)
        try:
            eventually(lambda: running_hosts.running("unheard"), "the host runs")
            assert ended(["load", DIGITS, "--host", "unheard"]).code == 0
            assert ended(["stop", "--host", "unheard"]).code == 0
            assert (process.wait(allowed(DEADLINE)), process.stderr and process.stderr.read()) == (0, "")
        finally:
            process.kill()
