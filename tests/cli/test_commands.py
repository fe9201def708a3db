"""``onnx-dl ps``, ``top``, ``events``, ``load``, ``unload``, ``pin`` and ``doctor``, on real hosts."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from onnx_dl import ModelHost, Snapshot, WorkerDied
from onnx_dl.cli import hosts
from onnx_dl.cli.doctor import collect, trials
from onnx_dl.cli.main import main
from onnx_dl.cli.models import load
from onnx_dl.core.events import ModelEvent
from onnx_dl.core.status import ModelStatus
from onnx_dl.demo.assets import model_path
from onnx_dl.errors import SupervisorStartError
from tests.support.sharing import own_runtime
from tests.support.waiting import DEADLINE, allowed, eventually

pytestmark = pytest.mark.slow

DIGITS, WINE = str(model_path("digits")), str(model_path("wine"))


class Shared:
    """A host as ``connect()`` gives it, which outlives who closes its connection to it."""

    def __init__(self, host: ModelHost) -> None:
        self._host = host
        self.asked: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def adopt(self, model: str, **terms: Any) -> ModelStatus:
        self.asked.append(("adopt", model, terms))
        return self._host.adopt(model)

    def unload(self, model: str, *, force: bool = False) -> bool:
        self.asked.append(("unload", model, force))
        return model == DIGITS

    def close(self) -> None:
        self.asked.append(("close",))


@pytest.fixture(autouse=True)
def runtime(nothing_is_left_behind: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No hosts of others."""
    with own_runtime(monkeypatch):
        yield


@pytest.fixture
def shared(host: ModelHost, monkeypatch: pytest.MonkeyPatch) -> Shared:
    """The host that commands find, whichever they ask for; ``asked`` has what they did."""
    found = Shared(host)

    def connect(name: str, *, start: bool) -> Shared:
        found.asked.append(("connect", name, start))
        return found

    monkeypatch.setattr(hosts, "connect", connect)
    return found


# --- finding a host ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ["ps"],
        ["ps", "--json"],
        ["top"],
        ["events", "--follow"],
        ["events", "--for", "1"],
        ["unload", "m"],
        ["stop"],
        ["stop", "--all-versions"],
    ],
)
def test_no_host_runs(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ONNX_DL_HOST", raising=False)
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("onnx-dl: No shared host named 'default' runs. Start one ")
    assert main([*command, "--host", "batch"]) == 1
    assert "'batch'" in capsys.readouterr().err


def test_a_host_that_cannot_be_reached_for_another_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def connect(name: str, *, start: bool) -> None:
        raise SupervisorStartError("it speaks another version")

    monkeypatch.setattr(hosts, "connect", connect)
    assert main(["ps"]) == 1
    assert capsys.readouterr().err == "onnx-dl: it speaks another version\n"


def test_which_host(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_DL_HOST", "batch")
    shared.start()
    assert main(["ps"]) == main(["ps", "--host", "other"]) == main(["load", DIGITS]) == 0
    assert [asked[1:] for asked in shared.asked if asked[0] == "connect"] == [
        ("batch", False), ("other", False), ("batch", True),
    ]  # fmt: skip
    assert shared.asked.count(("close",)) == 3


# --- ps ----------------------------------------------------------------------------------------------------


def test_ps_touches_nothing(shared: Shared, capsys: pytest.CaptureFixture[str]) -> None:
    proxy = shared.open(DIGITS, ttl=60, pin=True)
    proxy.load()
    eventually(lambda: shared.snapshot().models[0].idle is not None, "the worker notes the end of the use")
    (before,) = shared.snapshot().models
    for _ in range(3):
        assert main(["ps"]) == 0
    out = capsys.readouterr().out
    assert out.count(str(before.pid)) == 3 and out.count("digits.onnx") == 3 and "Memory: " in out
    assert main(["ps", "--json"]) == 0
    seen = msgspec.json.decode(capsys.readouterr().out, type=Snapshot)
    (after,) = seen.models
    assert (after.pid, after.loads, after.pinned, after.ttl) == (before.pid, 1, True, 60.0)
    assert before.idle is not None and after.idle is not None and after.idle > before.idle
    assert seen.supervisor_pid == shared.snapshot().supervisor_pid


def test_ps_of_a_host_that_has_just_ended(shared: Shared, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ps", "--json"]) == 1
    assert capsys.readouterr() == ("", "onnx-dl: The host has ended, and its models are unloaded.\n")


# --- load, pin, unload -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "terms"),
    [
        (["load"], {"ttl": None, "pin": None, "priority": None}),
        (["load", "--ttl", "60"], {"ttl": 60.0, "pin": None, "priority": None}),
        (["load", "--ttl", "5m", "--priority", "3"], {"ttl": 300.0, "pin": None, "priority": 3}),
        (["pin", "--ttl", "-1"], {"ttl": -1.0, "pin": True, "priority": None}),
        (["load", "--env", "A=1", "--env", "B=x=y"], {"environment": {"A": "1", "B": "x=y"}}),
    ],
)
def test_loading(
    arguments: list[str], terms: dict[str, Any], shared: Shared, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, DIGITS]) == 0
    nothing: dict[str, Any] = {"ttl": None, "pin": None, "priority": None, "environment": {}}
    assert ("adopt", DIGITS, nothing | terms) in shared.asked
    assert capsys.readouterr().out.startswith(f"ready {DIGITS}, pid ")


def test_a_ttl_that_is_none_asks_no_host(shared: Shared, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["load", "--ttl", "soon", DIGITS]) == 1
    assert "not one of the three modes" in capsys.readouterr().err
    assert shared.asked == []


def test_a_file_that_is_no_model(shared: Shared, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """onnxruntime's error is told, without a traceback."""
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    assert main(["load", str(tmp_path / "bad.onnx")]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"onnx-dl: {tmp_path}/bad.onnx did not load: [ONNXRuntimeError]")


def test_our_own_errors_are_told_as_they_are() -> None:
    class Dying(Shared):
        def adopt(self, model: str, **terms: Any) -> None:
            raise WorkerDied("it died", pid=1, exit_code=1, signal=None, stderr="", reason="crash")

    with pytest.raises(WorkerDied, match="it died"):
        load(Dying(None), "m", ttl=None, pin=False, priority=0)  # type: ignore[arg-type]


def test_unloading(shared: Shared, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unload", DIGITS]) == main(["unload", "--force", "other"]) == 0
    assert [asked for asked in shared.asked if asked[0] == "unload"] == [
        ("unload", DIGITS, False), ("unload", "other", True),
    ]  # fmt: skip
    assert (
        capsys.readouterr().out == f"unloaded {DIGITS}\nother was not loaded. onnx-dl ps lists the models.\n"
    )


# --- events and top, in processes of their own -------------------------------------------------------------

PROGRAM = f"""
import contextlib, sys, threading
from onnx_dl import ModelHost, OnnxDLError
from onnx_dl.cli import hosts

host = ModelHost(memory_limit="2GiB")
proxy = host.open({DIGITS!r}, ttl=3600)
with host.events() as loaded:
    proxy.load()
    while loaded.get(60).type != "ready":
        pass

class Shared:
    snapshot, recent_events, close = host.snapshot, host.recent_events, lambda self: None
    def events(self):
        stream = host.events()
        threading.Thread(target=goes_on, daemon=True).start()
        return stream

def goes_on():
    with contextlib.suppress(OnnxDLError):  # the command ends meanwhile
        for _ in range(2):
            proxy.unload()
            proxy.load()

hosts.connect = lambda name, start: Shared()
from onnx_dl.cli.main import main
"""
DIES = """
import os, signal

def last_one(self):
    snapshot = host.snapshot()
    if snapshot.supervisor_pid is not None:
        os.kill(snapshot.supervisor_pid, signal.SIGKILL)
    return snapshot

Shared.snapshot = last_one
"""
KINDS = ["draining", "unloaded", "loading", "ready"] * 2


class Running(subprocess.Popen[bytes]):
    """A command on a host of its own; ``before``: what the program does first."""

    def __init__(self, *arguments: str, before: str = "", stdout: int = subprocess.PIPE) -> None:
        code = f"{PROGRAM}\n{before}\nsys.exit(main({list(arguments)!r}))"
        super().__init__(
            [sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE,
            env=os.environ | {"TERM": "xterm", "LINES": "40", "COLUMNS": "100"},
        )  # fmt: skip

    def ended(self) -> tuple[int, str]:
        """Exit code and stderr."""
        _, err = self.communicate(timeout=allowed(DEADLINE))
        return self.returncode, (err or b"").decode()


@pytest.fixture
def running() -> Iterator[Callable[..., Running]]:
    commands: list[Running] = []

    def start(*arguments: str, **terms: Any) -> Running:
        commands.append(Running(*arguments, **terms))
        return commands[-1]

    yield start
    for command in commands:
        command.kill()
        command.communicate()


def test_events_as_lines_of_json(running: Callable[..., Running]) -> None:
    """Each is there as soon as it has happened, while the command goes on."""
    command = running("events", "--follow", "--lines", "0", "--json")
    assert command.stdout is not None
    events = [json.loads(command.stdout.readline()) for _ in KINDS]
    assert [event["type"] for event in events] == KINDS
    assert {event["model"] for event in events} == {DIGITS}
    assert command.poll() is None
    command.send_signal(signal.SIGINT)
    assert command.ended() == (130, "")


def test_events_as_text_for_a_time(running: Callable[..., Running]) -> None:
    """Events of before come first; none is printed twice."""
    command = running("events", "--for", f"{allowed(3.0):.1f}s")  # in which two loads have time
    out, err = command.communicate(timeout=allowed(DEADLINE))
    assert (command.returncode, err) == (0, b"")
    assert [line.split()[2] for line in out.decode().splitlines()] == ["loading", "ready", *KINDS]
    assert f"unloaded {DIGITS}, reason request, " in out.decode()


def test_a_reader_who_has_enough(running: Callable[..., Running]) -> None:
    """As with ``| head -1``: nothing more happens, and the command ends all the same."""
    command = running("events", "--follow", "-n", "0")
    assert command.stdout is not None
    assert [command.stdout.readline().split()[2].decode() for _ in KINDS] == KINDS
    command.stdout.close()
    assert command.stderr is not None
    assert (command.wait(allowed(DEADLINE)), command.stderr.read()) == (1, b"")


@pytest.mark.parametrize("arguments", [["ps"], ["ps", "--json"], ["top", "--interval", "0.1"]])
def test_nobody_reads(arguments: list[str], running: Callable[..., Running]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = running(*arguments, stdout=writer)
    os.close(writer)
    assert command.ended() == (1, "")


@pytest.mark.parametrize("arguments", [["events", "--follow"], ["top", "--interval", "0.1"]])
def test_the_host_ends(arguments: list[str], running: Callable[..., Running]) -> None:
    code, err = running(*arguments, before=DIES).ended()
    assert code == 1
    assert "onnx-dl: The " in err and ("has ended" in err or "ended, and all" in err)


def ended(arguments: list[str], stdout: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command whose stdout the shell redirects so."""
    command = f'exec "$0" -m onnx_dl "$@" {stdout}'
    return subprocess.run(
        ["sh", "-c", command, sys.executable, *arguments],
        env=os.environ | environment, capture_output=True, text=True, timeout=allowed(DEADLINE),
    )  # fmt: skip


def test_a_full_disk_is_told_in_a_line() -> None:
    found = ended(["cache", "ls"], ">/dev/full")
    assert found.returncode == 1
    assert found.stderr == "onnx-dl: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("stdout", [">&-", ">/dev/null"])
def test_a_closed_stdout_is_one_that_nobody_reads(stdout: str) -> None:
    found = ended(["cache", "ls"], stdout)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_characters_that_the_terminal_does_not_have(tmp_path: Path) -> None:
    folder = tmp_path / "\u00e4"
    found = ended(["cache", "ls"], "", ONNX_DL_CACHE_DIR=str(folder), PYTHONIOENCODING="ascii")
    assert found.stdout.endswith(f"{tmp_path}/?\n") and not found.stderr


def test_events_of_before(shared: Shared, capsys: pytest.CaptureFixture[str]) -> None:
    """The host keeps them, for commands that come later; the command ends by itself."""
    shared.start()
    assert main(["events"]) == 0
    assert capsys.readouterr().out == "No events yet. Load a model with: onnx-dl load MODEL\n"
    proxy = shared.open(DIGITS, ttl=3600)
    proxy.load()
    proxy.unload()
    kinds = ["loading", "ready", "draining", "unloaded"]
    assert main(["events"]) == main(["events", "-n", "2"]) == 0
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == kinds + kinds[2:]
    assert main(["events", "--json"]) == main(["events", "--json", "-n", "0"]) == 0
    told = [msgspec.json.decode(line, type=ModelEvent) for line in capsys.readouterr().out.splitlines()]
    assert told == shared.recent_events(4) and [event.type for event in told] == kinds


@pytest.mark.parametrize("number", ["-1", "few", "1.5"])
def test_a_number_of_events_that_is_none(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["events", f"--lines={number}"])
    assert ended.value.code == 2
    assert "is not a whole number" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "soon", "inf"])
def test_an_interval_that_is_none(value: str, shared: Shared, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", f"--interval={value}"]) == 1
    assert "is not a time" in capsys.readouterr().err


def read_until(fd: int, wanted: bytes) -> bytes:
    """What a terminal shows up to these bytes; at its end, all of it."""
    seen, deadline = b"", time.monotonic() + allowed(DEADLINE)
    while wanted not in seen:
        assert select.select([fd], [], [], deadline - time.monotonic())[0], seen
        try:
            seen += os.read(fd, 1 << 16)
        except OSError:  # the other end of a terminal is closed
            return seen
    return seen


def test_top_on_a_terminal(running: Callable[..., Running]) -> None:
    """Pictures follow each other on the alternate screen, and Ctrl-C leaves everything as it was."""
    screen, terminal = pty.openpty()
    try:
        command = running("top", "--interval", "0.1", stdout=terminal)
        os.close(terminal)
        seen = read_until(screen, b"full bar")
        assert b"\x1b[?1049h" in seen and b"digits.onnx" in seen and b"Memory: " in seen
        read_until(screen, b"full bar")
        command.send_signal(signal.SIGINT)
        rest = read_until(screen, b"\x1b[?1049l")
        assert b"\x1b[?25h" in seen + rest + read_until(screen, b"no such bytes")
        assert command.ended() == (0, "")
    finally:
        os.close(screen)


def test_top_in_a_pipe(running: Callable[..., Running]) -> None:
    command = running("top", "--interval", "100ms")
    assert command.stdout is not None
    lines: list[str] = []
    while sum("full bar" in line for line in lines) < 3:
        lines.append(command.stdout.readline().decode())
    command.send_signal(signal.SIGINT)
    assert command.ended() == (0, "")
    assert not any("\x1b" in line for line in lines)
    assert sum("digits.onnx" in line for line in lines) == 6  # in the table, and in that of memory over time


# --- doctor ------------------------------------------------------------------------------------------------


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials may take longer than a user wants to wait: the machine is busy with other tests."""
    monkeypatch.setattr(collect, "_IMPORT", allowed(DEADLINE))
    monkeypatch.setattr(collect, "_BUDGET", allowed(2 * DEADLINE))


def test_doctor(patient: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONNX_DL_START", raising=False)
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = {finding["check"]: finding for finding in report["findings"]}
    assert report["ok"] and found["provider CPU"]["mark"] == found["onnxruntime"]["mark"] == "ok"
    assert "forked from a template" in found["workers"]["found"]
    assert "models of a host may take" in found["memory"]["found"]
    assert "ORT_DISABLE_TELEMETRY" in found["telemetry"]["found"] or "none" in found["telemetry"]["found"]


def test_doctor_waits_no_longer_than_its_budget(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("_IMPORT", "_BUDGET"):
        monkeypatch.setattr(collect, name, 0.05)  # in which nothing can answer
    started = time.monotonic()
    assert main(["doctor"]) == 1
    assert time.monotonic() - started < allowed(6)
    assert "gave no answer" in " ".join(capsys.readouterr().out.split())


def test_doctor_finds_that_workers_are_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_DL_START", "exec")
    said = trials.run("start", timeout=allowed(DEADLINE)).report
    assert said is not None and said["forked"] is False


BROKEN = """
import os, signal, sys, time
__version__ = "1.99.0"
def get_available_providers():
    return ["CrashExecutionProvider", "CPUExecutionProvider"]
class InferenceSession:
    def __init__(self, model, providers):
        name = providers[0]
        if name.startswith("Crash"):
            print("no such device", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if name.startswith("Hang"):
            time.sleep(1000)
    def get_providers(self):
        return ["CPUExecutionProvider"]
    def run(self, names, feed):
        return [abs(feed["x0"])]
"""


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An onnxruntime with providers that crash and hang."""
    package = tmp_path / "onnxruntime"
    (package / "capi").mkdir(parents=True)
    (package / "__init__.py").write_text(BROKEN)
    (package / "capi" / "__init__.py").touch()
    (package / "capi" / "build_and_package_info.py").write_text("package_name = 'onnxruntime-own'\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_crash_of_a_provider_is_a_finding(
    patient: None, broken: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """And so is that no worker starts with such an onnxruntime."""
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    found = {finding["check"]: finding for finding in report["findings"]}
    assert not report["ok"]
    assert found["provider Crash"]["mark"] == "warning"
    assert "was killed by SIGSEGV: no such device" in found["provider Crash"]["found"]
    assert found["provider CPU"]["mark"] == "ok"
    assert "onnxruntime-own 1.99.0" in found["onnxruntime"]["found"]
    assert found["workers"]["mark"] == "problem"


def test_a_trial_has_a_deadline(broken: None) -> None:
    started = time.monotonic()
    tried = trials.run("provider", "HangExecutionProvider", timeout=1.5)
    assert tried.report is None and tried.failure == "gave no answer within 2 s"
    assert time.monotonic() - started < allowed(DEADLINE)
    assert trials.run("provider", "OtherExecutionProvider", timeout=allowed(DEADLINE)).report == {
        "providers": ["CPUExecutionProvider"],
        "computes": True,
    }


def test_an_interpreter_that_is_not_there() -> None:
    tried = trials.run("installed", timeout=1.0, python="/no/such/python")
    assert tried.report is None and "could not be started" in tried.failure


def test_doctor_with_settings_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ONNX_DL_LANE", "carrier pigeon")
    assert main(["doctor"]) == 1
    assert "ONNX_DL_LANE='carrier pigeon'" in capsys.readouterr().out


# --- all of it, on a host that is really shared ------------------------------------------------------------


@pytest.fixture
def supervised(tmp_path: Path, nothing_is_left_behind: None) -> Iterator[str]:
    """The name of a host that runs in a process of its own."""
    name = f"t{os.getpid()}-{tmp_path.name[-20:]}".lower()
    command = [sys.executable, "-m", "onnx_dl.cli", "supervise", "--host", name]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            eventually(lambda: main(["ps", "--host", name]) == 0, "the host is found")
            yield name
        finally:
            process.terminate()
            process.wait(allowed(DEADLINE))


def test_a_shared_host(supervised: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What one command loads, later ones see; what one unloads is gone for all."""

    def models() -> dict[str, ModelStatus]:
        capsys.readouterr()
        assert main(["ps", "--json", "--host", supervised]) == 0
        seen = msgspec.json.decode(capsys.readouterr().out, type=Snapshot)
        assert seen.host == supervised
        return {status.model: status for status in seen.models}

    assert main(["load", DIGITS, "--ttl", "5m", "--host", supervised]) == 0
    loaded = models()[DIGITS]
    assert (loaded.state, loaded.ttl, loaded.pinned) == ("ready", 300.0, False)
    assert main(["pin", WINE, "--priority", "3", "--host", supervised]) == 0
    assert (models()[WINE].pinned, models()[WINE].priority) == (True, 3)
    assert models()[DIGITS].pid == loaded.pid
    assert main(["unload", DIGITS, "--host", supervised]) == 0
    assert DIGITS not in models() and WINE in models()
