"""Which hosts run under a name, which of them is wanted, and what is said of them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from onnx_dl.protocol.codec import PROTOCOL_VERSION
from onnx_dl.transport import running_hosts
from onnx_dl.transport.rendezvous import HostEntry, uptime
from onnx_dl.transport.running_hosts import RunningHost

OURS = PROTOCOL_VERSION


def host(
    protocol: int | None, started: float | None, *, managed: bool = False, name: str = "a"
) -> RunningHost:
    return RunningHost(name=name, protocol=protocol, pid=7, started=started, managed=managed, package="1.2")


# --- who follows whom --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "other", "follows"),
    [
        (host(5, 10.0), host(6, 20.0), True),
        (host(6, 10.0), host(5, 20.0), True),  # somebody has gone back to the older version
        (host(5, 10.0), host(None, 20.0), True),
        (host(None, 10.0), host(5, 20.0), True),
        (host(5, 20.0), host(6, 10.0), False),
        (host(5, 10.0), host(6, 10.0), False),
        (host(5, 10.0), host(5, 20.0), False),  # cannot be; if it could, both would leave
        (host(5, 10.0), host(6, 20.0, name="b"), False),
        (host(5, 10.0), host(6, None), False),  # it does not say yet when it was started
        (host(5, None), host(6, 10.0), False),
        (host(5, 10.0, managed=True), host(6, 20.0), True),
        (host(5, 10.0, managed=True), host(6, 20.0, managed=True), True),
        (host(6, 10.0, managed=True), host(5, 20.0), False),
        (host(5, 10.0, managed=True), host(None, 20.0), False),
        (host(6, 10.0), host(5, 20.0, managed=True), True),
    ],
)
def test_one_of_another_version_that_was_started_later(
    own: RunningHost, other: RunningHost, follows: bool
) -> None:
    assert running_hosts.successor(own, [own, other]) == (other if follows else None)


@pytest.mark.parametrize("managed", [True, False])
def test_never_do_two_follow_each_other(managed: bool) -> None:
    """Whatever is started again, and in which order: of hosts of two versions one stays."""
    for first, second in ((5, 6), (6, 5)):
        hosts = [host(first, 10.0, managed=managed), host(second, 20.0, managed=not managed)]
        stay = [seen for seen in hosts if running_hosts.successor(seen, hosts) is None]
        assert stay
        if managed and first == 6:  # the newer one that is managed, beside what somebody still uses
            assert len(stay) == 2


def test_two_that_are_kept_come_to_rest() -> None:
    """Their keepers start again what has left; at the second time nobody leaves."""
    hosts = {5: host(5, 1.0, managed=True), 6: host(6, 2.0, managed=True)}
    leave = []
    for now in (3.0, 4.0, 5.0):
        for protocol, own in list(hosts.items()):
            if running_hosts.successor(own, hosts.values()):
                leave.append(protocol)
                hosts[protocol] = host(protocol, now, managed=True)
    assert leave == [5]


# --- what is found -----------------------------------------------------------------------------------------


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="odl") as name:
        yield Path(name)


@pytest.fixture
def given(folder: Path) -> dict[str, str]:
    return {"ONNX_DL_RUNTIME_DIR": str(folder)}


class Host:
    """A process that has the lock of a host, and perhaps a record."""

    def __init__(self, place: HostEntry, *, whole: bool = False, publishes: bool = True) -> None:
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._be(place, whole, publishes)
                os.write(write, b"!")
                signal.pause()
            finally:
                os._exit(0)
        os.close(write)
        assert os.read(read, 1) == b"!"
        os.close(read)

    def _be(self, place: HostEntry, whole: bool, publishes: bool) -> None:
        if whole:  # as versions before 5 do it
            fcntl.lockf(os.open(place._lock, os.O_RDWR | os.O_CREAT, 0o600), fcntl.LOCK_EX | fcntl.LOCK_NB)
            fields = {"address": "address", "secret": "secret", "pid": os.getpid(), "kept": True}
            place._record.write_text(json.dumps(fields))
        else:
            assert place.claim()
            if publishes:
                place.publish("address", "secret", managed=False)

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def test_what_runs_is_found(folder: Path, given: dict[str, str]) -> None:
    """Of all versions; files of hosts that have ended, and of others, are passed over."""
    ours, theirs = HostEntry("a", given), HostEntry("a", given, OURS + 1)
    before, another = HostEntry("a", given, None), HostEntry("b.lock", given)
    gone = Host(HostEntry("gone", given))
    gone.end()
    for odd in ("x.lock", f"y@{OURS}.lock"):
        (folder / odd).mkdir()
    for odd in (".lock", "@5.lock", "a@.lock", "a@x.lock", "a b.lock", "..lock", "a@99999999999999.lock"):
        (folder / odd).touch()
    hosts = [
        Host(before, whole=True), Host(ours), Host(theirs), Host(another, publishes=False),
    ]  # fmt: skip
    try:
        found = running_hosts.running(environ=given)
        assert [(seen.name, seen.protocol, seen.pid) for seen in found] == [
            ("a", None, hosts[0].pid), ("a", OURS, hosts[1].pid), ("a", OURS + 1, hosts[2].pid),
            ("b.lock", OURS, hosts[3].pid),
        ]  # fmt: skip
        assert [seen.reachable for seen in found] == [False, True, False, True]
        assert [seen.managed for seen in found] == [True, False, False, False]
        assert [seen.started is not None for seen in found] == [True, True, True, False]
        assert all(abs(time.time() - seen.since) < 60 for seen in found if seen.since is not None)
        pids = [process.pid for process in hosts]
        assert [seen.pid for seen in running_hosts.running("a", given)] == pids[:3]
        assert [seen.pid for seen in running_hosts.of_other_versions(ours)] == [pids[0], pids[2]]
        assert [seen.pid for seen in running_hosts.of_other_versions(before)] == pids[1:3]
        assert not running_hosts.running("c", given)
    finally:
        for process in hosts:
            process.end()
    assert not running_hosts.running(environ=given)


def test_a_record_of_an_earlier_host_says_nothing_of_this_one(given: dict[str, str]) -> None:
    place = HostEntry("a", given)
    place.publish("address", "secret", managed=True)
    process = Host(HostEntry("a", given), publishes=False)
    try:
        assert running_hosts.running("a", given) == [RunningHost(name="a", protocol=OURS, pid=process.pid)]
    finally:
        process.end()


def test_a_host_looks_for_its_follower(folder: Path, given: dict[str, str]) -> None:
    """And has its lock afterwards; in a folder that has gone it finds nobody."""
    own = HostEntry("a", given)
    assert own.claim()
    assert (
        running_hosts.reason_to_leave(own) is None
    )  # nor is it itself its follower, nor before it has published
    own.publish("address", "secret", managed=False)
    assert running_hosts.reason_to_leave(own) is None
    other = Host(HostEntry("a", given, OURS + 1))
    try:
        assert f"protocol version {OURS + 1}, pid {other.pid}," in (running_hosts.reason_to_leave(own) or "")
    finally:
        other.end()
    assert running_hosts.reason_to_leave(own) is None
    asked = os.fork()
    if asked == 0:
        os._exit(HostEntry("a", given).claim())
    assert os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1]) == 0
    shutil.rmtree(folder)
    assert running_hosts.reason_to_leave(own) is None
    assert not folder.exists()
    folder.mkdir()  # for the fixture
    os.close(own._held)


# --- words -------------------------------------------------------------------------------------------------


def test_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    seen = host(6, uptime() - (time.time() - 86400.0), managed=True)
    expected = (
        "onnx-dl 1.2, protocol version 6, pid 7, since 1970-01-02 00:00:00, managed by onnx-dl supervise"
    )
    assert running_hosts.describe(seen) == expected
    monkeypatch.undo()
    time.tzset()
    assert running_hosts.describe(RunningHost(name="a", protocol=None, pid=7)) == (
        "onnx-dl, protocol version 4 or older, pid 7"
    )
    assert running_hosts.describe(host(6, 1e300)) == "onnx-dl 1.2, protocol version 6, pid 7"


def test_what_becomes_of_one() -> None:
    old, new, before = host(5, 1.0), host(6, 2.0), host(None, 1.0)
    assert running_hosts.outlook(old, [old, new]) == "It ends when its clients have gone."
    assert running_hosts.outlook(new, [old, new]) == "It stays, as any host does."
    assert "onnx-dl stop --host a --all-versions ends it" in running_hosts.outlook(before, [before, new])
