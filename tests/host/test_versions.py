"""Shared hosts of several versions of onnx-dl under one name: both serve, and the older one leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import onnx_dl
from onnx_dl import SupervisorError, SupervisorStartError
from onnx_dl.client.connection import Connection, ConnectionListener
from onnx_dl.client.worker_output import WorkerOutput
from onnx_dl.protocol import codec
from onnx_dl.protocol.codec import PROTOCOL_VERSION
from onnx_dl.supervisor import lifetime
from onnx_dl.transport import running_hosts
from onnx_dl.transport.rendezvous import HostEntry
from onnx_dl.transport.running_hosts import RunningHost
from tests.contract.both import scaled
from tests.support.sharing import Forked, belonging, command, own_runtime
from tests.support.versions import Program, Version, made
from tests.support.waiting import DEADLINE, allowed, eventually, is_process

pytestmark = pytest.mark.slow

NEXT = f"protocol version {PROTOCOL_VERSION + 1}"
AFTER_A_LOOK = lifetime.LOOK_EVERY + DEADLINE


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Version]:
    return made(tmp_path_factory.mktemp("versions"))


@pytest.fixture(autouse=True)
def runtime(nothing_is_left_behind: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("ONNX_DL_LINGER", "600")  # who leaves, leaves for another reason
    with own_runtime(monkeypatch) as folder:
        yield folder


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "twice.onnx").write_bytes(scaled())
    return str(tmp_path / "twice.onnx")


def seen() -> dict[int | None, RunningHost]:
    """The hosts that run, by the version that they speak."""
    return {found.protocol: found for found in running_hosts.running("mine")}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=allowed(4 * DEADLINE))


def text(*arguments: str) -> str:
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# --- both serve, and one leaves ----------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [("this", "next"), ("next", "this")])
def test_both_serve_and_the_first_leaves(
    first: str, second: str, path: str, versions: dict[str, Version]
) -> None:
    """When its clients have gone, also if it holds a model itself; the second one stays."""
    older, newer = versions[first], versions[second]
    with Program(newer) as later:
        with Program(older) as earlier, Program(older) as sharing:
            assert earlier.ask("use", path) == 42
            earlier.ask("adopt", path)
            assert later.ask("use", path) == 42
            later.ask("adopt", path)
            assert sharing.ask("use", path) == 42
            pids = {older.protocol: earlier.ask("host"), newer.protocol: later.ask("host")}
            assert sharing.ask("host") == pids[older.protocol] != pids[newer.protocol]
            assert {protocol: found.pid for protocol, found in seen().items()} == pids
            earlier.end()
            assert sharing.ask("use", path) == 42
            assert sharing.ask("host") == pids[older.protocol]
        eventually(lambda: set(seen()) == {newer.protocol}, "the first one has gone")
        assert later.ask("host") == pids[newer.protocol]
        assert later.ask("use", path) == 42
    assert seen()[newer.protocol].pid == pids[newer.protocol]


def test_one_that_has_no_clients_already_leaves(path: str, versions: dict[str, Version]) -> None:
    """It looks from time to time."""
    host = onnx_dl.connect("mine")
    host.adopt(path)
    host.close()
    assert set(seen()) == {PROTOCOL_VERSION}
    with Program(versions["next"]) as later:
        assert later.ask("use", path) == 42
        eventually(lambda: set(seen()) == {PROTOCOL_VERSION + 1}, "the first one has gone", AFTER_A_LOOK)
    expected = f"a host of another version was started after it: onnx-dl 8.8.0, {NEXT}, pid "
    assert expected in HostEntry("mine").log.read_text()


def test_beside_one_of_before_versions_had_hosts_of_their_own(
    path: str, versions: dict[str, Version], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows of no follower, and stays until it has lingered."""
    monkeypatch.setenv("ONNX_DL_LINGER", "0.2")
    with Program(versions["before 5"]) as earlier:
        assert earlier.ask("use", path) == 42
        monkeypatch.setenv("ONNX_DL_LINGER", "600")
        host = onnx_dl.connect("mine")
        host.adopt(path)
        assert host.snapshot().supervisor_pid == seen()[PROTOCOL_VERSION].pid != earlier.ask("host")
        assert seen()[None].pid == earlier.ask("host")
        assert seen()[None].since is not None
        assert earlier.ask("use", path) == 42
        host.close()
    eventually(lambda: set(seen()) == {PROTOCOL_VERSION}, "it has lingered")


def test_after_a_downgrade(path: str, versions: dict[str, Version]) -> None:
    """The host of this version leaves for one that does not tell its version, too."""
    host = onnx_dl.connect("mine")
    host.adopt(path)
    with Program(versions["before 5"]) as later:
        assert later.ask("use", path) == 42
        assert set(seen()) == {None, PROTOCOL_VERSION}
        host.close()
        eventually(lambda: set(seen()) == {None}, "the host of this version has gone")


def test_another_package_with_the_same_protocol_shares(path: str, versions: dict[str, Version]) -> None:
    host = onnx_dl.connect("mine")
    with Program(versions["this"]) as other:
        assert other.ask("use", path) == 42
        assert other.ask("host") == host.snapshot().supervisor_pid
        assert len(seen()) == 1


def test_ten_start_at_once_beside_another_version(
    path: str, runtime: Path, versions: dict[str, Version]
) -> None:
    read, write = os.pipe()

    def find() -> int | None:
        os.close(write)
        os.read(read, 1)
        return onnx_dl.connect("mine").snapshot().supervisor_pid

    with Program(versions["next"]) as other:
        children = [Forked(find) for _ in range(10)]
        os.close(write)
        os.close(read)
        # One more, which stays: a host that has lost its clients would leave for the other one.
        host = onnx_dl.connect("mine")
        assert other.ask("use", path) == 42
        pids = {child.result() for child in children}
        assert pids == {HostEntry("mine").holder()} == {host.snapshot().supervisor_pid}
        expected = pids | {other.ask("host")}
        eventually(lambda: supervisors(runtime) == expected, "those that were late are gone")


def supervisors(runtime: Path) -> set[int]:
    found = set()
    for process in belonging(runtime):
        with contextlib.suppress(psutil.Error):
            if is_process(process, "supervisor"):
                found.add(process.pid)
    return found


# --- kept hosts --------------------------------------------------------------------------------------------


def supervise(version: Version) -> subprocess.Popen[str]:
    """``onnx-dl supervise`` of that version; returns when it can be reached."""
    process = subprocess.Popen(
        command("supervise", "--host", "mine"), env=version.environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert f"pid {process.pid};" in process.stdout.readline()
    return process


@pytest.fixture
def kept(versions: dict[str, Version]) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Of two versions."""
    both = {name: supervise(versions[name]) for name in ("this", "next")}
    yield both
    for process in both.values():
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=allowed(2 * DEADLINE))


def test_one_that_is_kept_leaves_for_a_newer_version(
    path: str, versions: dict[str, Version], kept: dict[str, subprocess.Popen[str]]
) -> None:
    """So that its keeper starts what is installed now.  What is started again by then stays."""
    with Program(versions["this"]) as client:
        assert client.ask("use", path) == 42
        assert client.ask("host") == kept["this"].pid
    said = kept["this"].communicate(timeout=allowed(AFTER_A_LOOK))[0]
    assert kept["this"].returncode == 0
    assert "the host ends, because a host of another version was started after it" in said
    assert HostEntry("mine").record() is None
    kept["this"] = supervise(versions["this"])
    with Program(versions["this"]) as client, Program(versions["next"]) as other:
        assert (client.ask("use", path), other.ask("use", path)) == (42, 42)
        assert client.ask("host") == kept["this"].pid
        assert other.ask("host") == kept["next"].pid
    # Neither makes room for the other now: the first was started later, the second is of a newer version.
    (first, second) = (seen()[PROTOCOL_VERSION + number] for number in (0, 1))
    assert running_hosts.successor(first, [second]) is running_hosts.successor(second, [first]) is None


def test_supervise_follows_a_host_in_the_background(path: str) -> None:
    host = onnx_dl.connect()
    proxy = host.open(path, providers=["CPUExecutionProvider"])
    proxy.load()
    proxy.adopt()
    background = host.snapshot().supervisor_pid
    waiting = subprocess.Popen(command("supervise"), stdout=subprocess.PIPE, text=True)
    assert waiting.stdout is not None
    said = waiting.stdout.readline()
    assert f"runs in the background (pid {background})" in said and "onnx-dl stop --host default" in said
    second = run("supervise")
    assert (second.returncode, second.stdout) == (1, "")
    assert "another onnx-dl supervise already waits for its end" in second.stderr
    assert host.snapshot().supervisor_pid == background
    host.close()
    assert waiting.stdout.readline().startswith(f"host 'default' runs, pid {waiting.pid};")
    assert onnx_dl.connect(start=False).snapshot().supervisor_pid == waiting.pid
    waiting.send_signal(signal.SIGINT)
    waiting.communicate(timeout=allowed(2 * DEADLINE))
    assert waiting.returncode == 0


def test_stop_lets_the_one_that_waits_be_the_host() -> None:
    """Not one of the clients, which want a host at that moment, too."""
    host = onnx_dl.connect()
    waiting = subprocess.Popen(command("supervise"), stdout=subprocess.PIPE, text=True)
    assert waiting.stdout is not None
    assert "runs in the background" in waiting.stdout.readline()
    host.stop()
    assert onnx_dl.connect().snapshot().supervisor_pid == waiting.pid
    host.close()
    waiting.send_signal(signal.SIGINT)
    waiting.communicate(timeout=allowed(2 * DEADLINE))


# --- commands ----------------------------------------------------------------------------------------------


def test_commands_tell_of_both(path: str, versions: dict[str, Version]) -> None:
    host = onnx_dl.connect("mine")
    host.adopt(path)
    with Program(versions["next"]) as other:
        assert other.ask("use", path) == 42
        pids = [host.snapshot().supervisor_pid, other.ask("host")]
        shown = json.loads(text("ps", "--host", "mine", "--json"))
        assert shown["supervisor_pid"] == pids[0] and len(shown["models"]) == 1
        assert [found["pid"] for found in shown["hosts"]] == pids
        assert [found["protocol"] for found in shown["hosts"]] == [PROTOCOL_VERSION, PROTOCOL_VERSION + 1]
        assert [found["package"] for found in shown["hosts"]][1] == "8.8.0"
        assert [found["reachable"] for found in shown["hosts"]] == [True, False]
        assert [found["leaving"] for found in shown["hosts"]] == [True, False]
        lines = " ".join(text("ps", "--host", "mine").split())
        assert f"protocol version {PROTOCOL_VERSION}, pid {pids[0]}, since 2" in lines
        assert f"onnx-dl 8.8.0, {NEXT}, pid {pids[1]}, since 2" in lines
        assert "cannot connect to it" in lines and "It ends when its clients have gone." in lines
        # Not its exit code: on a busy machine, its trials may get no answer in time.
        found = json.loads(run("doctor", "--json").stdout)["findings"]
        marks = [
            (finding["mark"], f"pid {pid}" in finding["found"])
            for finding in found
            if finding["check"] == "host mine"
            for pid in pids
        ]
        assert marks == [("ok", True), ("ok", False), ("warning", False), ("warning", True)]
        host.close()


def test_commands_where_only_another_version_runs(path: str, versions: dict[str, Version]) -> None:
    with Program(versions["next"]) as other:
        assert other.ask("use", path) == 42
        with pytest.raises(
            SupervisorError, match=r"for this version of onnx-dl.*another version: onnx-dl 8\.8"
        ):
            onnx_dl.connect("mine", start=False)
        for arguments in (["ps"], ["ps", "--json"], ["stop"], ["unload", path]):
            done = run(*arguments, "--host", "mine")
            assert done.returncode == 1
            assert f"{NEXT}, pid {other.ask('host')}" in done.stderr
            assert ("8.8.0" in done.stdout) == (arguments[0] == "ps")
        assert set(seen()) == {PROTOCOL_VERSION + 1}  # nothing was started or ended


def test_stop_ends_its_own_version_and_others_on_request(path: str, versions: dict[str, Version]) -> None:
    host = onnx_dl.connect("mine")  # without a client, it would leave for the other one by itself
    with Program(versions["next"]) as other:
        assert other.ask("use", path) == 42
        lines = text("stop", "--host", "mine").splitlines()
        host.close()
        assert [line.split(":")[0] for line in lines] == [
            "ended",
            "left",
            "onnx-dl stop --all-versions also ends those of other versions",
        ]
        assert set(seen()) == {PROTOCOL_VERSION + 1}
        first = other.ask("host")
        lines = text("stop", "--host", "mine", "--all-versions").splitlines()
        assert [line.split(":")[0] for line in lines] == ["ended"] and f"pid {first}," in lines[0]
        assert other.ask("use", path) == 42  # at the next one
        assert other.ask("host") != first
        assert text("stop", "--host", "mine", "--all-versions").count("ended: host 'mine'") == 1


# --- guards ------------------------------------------------------------------------------------------------


def test_a_client_of_another_version_is_refused_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a record was copied by hand, for one."""
    onnx_dl.connect("mine")
    record = HostEntry("mine").record()
    assert record is not None
    monkeypatch.setattr(codec, "PROTOCOL_VERSION", 99)
    with pytest.raises(
        SupervisorStartError, match=f"speaks protocol version {PROTOCOL_VERSION}, the client 99"
    ):
        Connection(record.address, record.secret, 2.0, ConnectionListener(print, print, bool), WorkerOutput())


@pytest.mark.parametrize("shared", [True, False])
def test_the_package_is_replaced_under_a_program(shared: bool, tmp_path: Path, path: str) -> None:
    """It starts a host of another version than its own, which says so at once."""
    version = made(tmp_path, ["this"])["this"]
    with Program(version) as program:
        version.speak(PROTOCOL_VERSION + 1)
        answer = program.ask("host" if shared else "use_own", *([] if shared else [path]))
        assert "SupervisorStartError: " in answer
        assert f"the application uses protocol version {PROTOCOL_VERSION}" in answer
        assert "Restart the application" in answer
    assert not seen()


def test_the_package_is_replaced_under_a_host(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each worker is a fresh interpreter, it is one of the new version: no load, and no call that waits
    for it, ends in nothing."""
    monkeypatch.setenv("ONNX_DL_START", "exec")
    later = [str(tmp_path / f"{number}.onnx") for number in range(3)]
    for name in later:
        Path(name).write_bytes(scaled())
    version = made(tmp_path, ["this"])["this"]
    with Program(version) as program:
        assert program.ask("use", path) == 42
        version.speak(PROTOCOL_VERSION + 1)
        answers = [program.ask("use", name) for name in later]
        if answers[0] == 42:  # the interpreter for the next worker was there already
            del answers[0]
        for answer in answers:
            assert answer.startswith("WorkerDied: ")
            assert "Restart the application, or the shared host" in answer
        assert program.ask("use", path) == 42  # what is loaded goes on
