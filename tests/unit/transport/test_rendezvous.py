"""The folder in which the processes of one user find a shared host, and the lock and record in it."""

from __future__ import annotations

import json
import os
import signal
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import onnx_dl
from onnx_dl import ConfigError, PlatformError
from onnx_dl.protocol.codec import PROTOCOL_VERSION
from onnx_dl.transport import rendezvous
from onnx_dl.transport.rendezvous import HostEntry, HostRecord, runtime_folder

ROOT_ONLY = pytest.mark.skipif(os.getuid() != 0, reason="only root can make a folder of another user")
NOBODY = 65534


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short private one."""
    with tempfile.TemporaryDirectory(prefix="odl") as name:
        yield Path(name)


def given(path: Path) -> dict[str, str]:
    return {"ONNX_DL_RUNTIME_DIR": str(path)}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """As without a login: /run/user/<uid> and the system's own temporary folders are not ours to fill."""
    real = os.path.isdir
    monkeypatch.setattr(os.path, "isdir", lambda p: not str(p).startswith("/run/user/") and real(p))


# --- the folder --------------------------------------------------------------------------------------------


def test_one_that_is_given_is_made_and_is_private(folder: Path) -> None:
    path = folder / "run"
    assert runtime_folder(given(path)) == path
    assert mode(path) == 0o700
    assert runtime_folder(given(path)) == path


def test_a_login_has_a_folder_of_its_own(folder: Path) -> None:
    made = runtime_folder({"XDG_RUNTIME_DIR": str(folder), "TMPDIR": "/nowhere"})
    assert made == folder / "onnx-dl"
    assert mode(made) == 0o700


def test_the_login_s_folder_is_found_without_its_variable(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cron has no XDG_RUNTIME_DIR."""
    monkeypatch.setattr(os.path, "isdir", lambda p: True)
    login = f"/run/user/{os.getuid()}"
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda p, **kw: real(folder if p == login else p, **kw))
    assert next(rendezvous._candidates({})) == Path(login) / "onnx-dl"


@pytest.mark.parametrize("xdg", ["", "/nowhere"])
def test_without_a_login_it_is_in_a_temporary_folder(folder: Path, xdg: str) -> None:
    made = runtime_folder({"XDG_RUNTIME_DIR": xdg, "TMPDIR": str(folder)})
    assert made == folder / f"onnx-dl-{os.getuid()}"


def test_a_temporary_folder_with_a_long_name(folder: Path) -> None:
    """No socket lies there, so that 108 bytes are no limit."""
    long = folder / ("x" * 120) / ("y" * 120)
    long.mkdir(parents=True)
    made = runtime_folder({"TMPDIR": str(long)})
    assert made.parent == long and mode(made) == 0o700


def test_a_temporary_folder_that_is_not_there(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    tried = []

    def private(path: Path) -> Path:
        tried.append(str(path.parent))
        if len(tried) < 4:
            raise PermissionError(13, "Permission denied")
        return path

    monkeypatch.setattr(rendezvous, "_private", private)
    runtime_folder({"TMPDIR": "/nowhere"})
    assert tried == ["/nowhere", "/tmp", "/var/tmp", "/dev/shm"]


def test_it_needs_no_home(folder: Path) -> None:
    assert runtime_folder({"HOME": "/nowhere", **given(folder / "run")})
    assert runtime_folder(given(folder / "run"))


def test_one_that_is_open_to_others_is_refused(folder: Path) -> None:
    for bits in (0o755, 0o710, 0o701, 0o770):
        folder.chmod(bits)
        with pytest.raises(PlatformError, match=r"open to other users \(chmod 700") as caught:
            runtime_folder(given(folder))
    assert str(folder) in str(caught.value) and "ONNX_DL_RUNTIME_DIR" in str(caught.value)


def test_a_link_is_refused(folder: Path) -> None:
    (folder / "real").mkdir(mode=0o700)
    (folder / "link").symlink_to(folder / "real")
    with pytest.raises(PlatformError, match="is not a folder of this user"):
        runtime_folder(given(folder / "link"))


def test_a_file_is_refused(folder: Path) -> None:
    (folder / "file").touch(mode=0o600)
    with pytest.raises(PlatformError, match="is not a folder of this user"):
        runtime_folder(given(folder / "file"))


def test_a_folder_in_none_is_refused(folder: Path) -> None:
    with pytest.raises(PlatformError, match="No such file"):
        runtime_folder(given(folder / "a" / "b"))


def test_a_relative_path_is_refused() -> None:
    """The host has another working directory: nobody would ever find it."""
    with pytest.raises(PlatformError, match=r"run: is not an absolute path.*Set ONNX_DL_RUNTIME_DIR"):
        runtime_folder({"ONNX_DL_RUNTIME_DIR": "run"})


@ROOT_ONLY
def test_one_of_another_user_is_refused(folder: Path) -> None:
    (folder / "his").mkdir(mode=0o700)
    os.chown(folder / "his", NOBODY, NOBODY)
    with pytest.raises(PlatformError, match="is not a folder of this user"):
        runtime_folder(given(folder / "his"))


@ROOT_ONLY
def test_a_login_of_another_user_is_left_alone(folder: Path) -> None:
    """su keeps XDG_RUNTIME_DIR: a folder of root's in there would shut its owner out."""
    his, tmp = folder / "his", folder / "tmp"
    his.mkdir(mode=0o700)
    tmp.mkdir()
    os.chown(his, NOBODY, NOBODY)
    made = runtime_folder({"XDG_RUNTIME_DIR": str(his), "TMPDIR": str(tmp)})
    assert made.parent == tmp
    assert not os.listdir(his)


def test_a_folder_that_somebody_else_took_in_a_temporary_one_is_passed_by(folder: Path) -> None:
    """A guessable name in /tmp: whoever takes it first gains nothing."""
    (folder / f"onnx-dl-{os.getuid()}").mkdir(mode=0o777)
    (folder / f"onnx-dl-{os.getuid()}").chmod(0o777)
    seen = list(rendezvous._candidates({"TMPDIR": str(folder)}))
    assert seen[0].parent == folder and len(seen) == 4
    with pytest.raises(PermissionError):
        rendezvous._private(seen[0])


# --- names -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a b", "ä", "x" * 65, "a\n"])
def test_bad_names(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="not a host name; use letters"):
        HostEntry(name, given(folder))
    assert not os.listdir(folder)


@pytest.mark.parametrize("name", ["default", "a.b-c_D", "x" * 64])
def test_good_names(folder: Path, name: str) -> None:
    assert HostEntry(name, given(folder)).holder() is None


# --- the record --------------------------------------------------------------------------------------------


def test_what_is_published_is_found_until_it_is_withdrawn(folder: Path) -> None:
    place = HostEntry("a", given(folder))
    assert place.record() is None
    place.publish("address", "secret", managed=True)
    record = place.record()
    assert record == place.published and record is not None
    assert (record.address, record.secret, record.pid, record.managed) == (
        "address",
        "secret",
        os.getpid(),
        True,
    )
    assert (record.protocol, record.package) == (PROTOCOL_VERSION, onnx_dl.__version__)
    assert record.started is not None and 0 <= rendezvous.uptime() - record.started < 60
    assert [path.name for path in folder.iterdir()] == [f"a@{PROTOCOL_VERSION}.json"]
    assert [mode(path) for path in folder.iterdir()] == [0o600]
    assert HostEntry("b", given(folder)).record() is None
    place.withdraw()
    place.withdraw()
    assert place.record() is None


def test_each_version_has_a_record_of_its_own(folder: Path) -> None:
    ours, theirs = HostEntry("a", given(folder)), HostEntry("a", given(folder), PROTOCOL_VERSION + 1)
    theirs.publish("address", "secret", managed=False)
    assert ours.record() is None
    assert theirs.record() == theirs.published
    ours.publish("another", "secret", managed=False)
    theirs.withdraw()
    assert theirs.record() is None
    assert ours.record() == ours.published


def test_a_record_before_5_says_no_version(folder: Path) -> None:
    fields = {"address": "address", "secret": "secret", "pid": 7, "kept": True}
    (folder / "a.json").write_text(json.dumps(fields))
    before = HostEntry("a", given(folder), protocol=None)
    assert before.record() == HostRecord(address="address", secret="secret", pid=7, managed=True)
    published = before.published_at()
    assert published is not None and abs(rendezvous.uptime() - published) < 60
    assert HostEntry("a", given(folder)).record() is None


GOOD = {"address": "a", "secret": "s", "pid": 7, "protocol": PROTOCOL_VERSION}


def record_of(folder: Path, content: bytes) -> HostRecord | None:
    (folder / f"a@{PROTOCOL_VERSION}.json").write_bytes(content)
    return HostEntry("a", given(folder)).record()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"\xff", b"\x00" * 100, b'{"address": "\xff"}', b"[" * 10_000, b"9" * 400,
        b'{"x": ' + b"[" * 8000 + b"]" * 8000 + b"}", json.dumps(GOOD).encode() + b" " * 20_000,
        json.dumps(GOOD).encode("utf-16"), json.dumps(GOOD).encode()[:-1],
    ],
)  # fmt: skip
def test_a_file_that_is_no_record(folder: Path, content: bytes) -> None:
    assert record_of(folder, content) is None


@pytest.mark.parametrize(
    "field",
    [
        {"address": 1}, {"address": ""}, {"address": "a\0b"}, {"address": "\u00e4"}, {"address": "a" * 200},
        {"address": "a\n"}, {"secret": None}, {"secret": "\u00e4"}, {"pid": "7"}, {"pid": 7.5}, {"pid": True},
        {"kept": 1}, {"protocol": PROTOCOL_VERSION + 1}, {"protocol": None}, {"protocol": "5"},
        {"package": 5}, {"package": "x" * 1000}, {"started": "now"}, {"started": -1}, {"started": 1e300},
    ],
)  # fmt: skip
def test_a_record_with_a_field_of_no_use(folder: Path, field: dict[str, object]) -> None:
    assert record_of(folder, json.dumps(GOOD | field).encode()) is None


def test_fields_of_later_packages_are_passed_over(folder: Path) -> None:
    assert record_of(folder, json.dumps(GOOD | {"colour": [1]}).encode()) is not None


def fifo(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def closed(path: Path) -> None:
    path.write_text("{}")
    path.chmod(0)


@pytest.mark.parametrize("make", [Path.mkdir, fifo, loop, device, closed])
def test_something_else_in_place_of_a_record(folder: Path, make: Callable[[Path], None]) -> None:
    """It is none, and reading it waits for nobody."""
    make(folder / f"a@{PROTOCOL_VERSION}.json")
    assert HostEntry("a", given(folder)).record() is None


@pytest.mark.parametrize("make", [fifo, loop, device, closed])
def test_a_record_takes_the_place_of_something_else(folder: Path, make: Callable[[Path], None]) -> None:
    make(folder / f"a@{PROTOCOL_VERSION}.json")
    place = HostEntry("a", given(folder))
    place.publish("address", "secret", managed=False)
    assert place.record() == place.published


def test_a_folder_in_place_of_a_record_is_said(folder: Path) -> None:
    (folder / f"a@{PROTOCOL_VERSION}.json").mkdir()
    with pytest.raises(
        PlatformError, match=r"a@\d+\.json, which cannot be used \(Is a directory\)\. Remove it"
    ):
        HostEntry("a", given(folder)).publish("address", "secret", managed=False)
    assert len(list(folder.iterdir())) == 1


def test_a_folder_in_place_of_a_lock_is_said(folder: Path) -> None:
    (folder / f"a@{PROTOCOL_VERSION}.lock").mkdir()
    place = HostEntry("a", given(folder))
    for ask in (place.holder, place.claim):
        with pytest.raises(PlatformError, match=r"a@\d+\.lock, which cannot be used \(Is a directory\)"):
            ask()


# --- the lock ----------------------------------------------------------------------------------------------


class Child:
    """A forked process that does something with a place and says what came of each step."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self._read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for step in steps:
                    os.write(write, b"!" if step() is not False else b"-")
                signal.pause()
            finally:
                os._exit(0)
        os.close(write)

    def says(self) -> bytes:
        """What came of the next step."""
        return os.read(self._read, 1)

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._read)


def claimed(folder: Path) -> Child:
    """A child that is the host."""
    child = Child(HostEntry("a", given(folder)).claim)
    assert child.says() == b"!"
    return child


def test_the_lock_says_who_has_it_and_ends_with_it(folder: Path) -> None:
    place = HostEntry("a", given(folder))
    assert place.holder() is None
    first = claimed(folder)
    try:
        assert place.holder() == first.pid
        assert not place.claim()
        assert place.holder() == first.pid  # looking and trying took nothing away
        assert HostEntry("b", given(folder)).holder() is None
        for protocol in (None, PROTOCOL_VERSION + 1):
            assert HostEntry("a", given(folder), protocol).holder() is None
    finally:
        first.end()
    assert place.holder() is None
    second = claimed(folder)
    assert place.holder() == second.pid
    second.end()


def test_who_waits_is_the_next(folder: Path) -> None:
    """However many try at that moment; the host learns that somebody waits, and a third one is told."""
    place, waiting = HostEntry("a", given(folder)), HostEntry("a", given(folder))
    told: list[bytes] = []
    read, write = os.pipe()

    def host() -> None:
        assert place.claim()
        assert place.next_pid() is None
        os.write(write, b"claimed")
        while place.next_pid() is None:
            os.sched_yield()
        os.write(write, str(place.next_pid()).encode())

    first = Child(host)
    assert os.read(read, 100) == b"claimed"
    second = Child(waiting.claim_next, waiting.await_turn, lambda: waiting.next_pid() is None)
    try:
        assert second.says() == b"!"
        told.append(os.read(read, 100))
        assert not HostEntry("a", given(folder)).claim_next()
        assert not HostEntry("a", given(folder)).claim()
    finally:
        first.end()
    assert told == [str(second.pid).encode()]
    assert second.says() == b"!"  # it is the host,
    assert second.says() == b"!"  # and nobody waits for its end
    assert HostEntry("a", given(folder)).holder() == second.pid
    second.end()
    os.close(read)
    os.close(write)


def test_a_folder_that_knows_no_locks_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than taken for a host that is there."""

    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", none)
    with pytest.raises(OSError, match="No locks"):
        HostEntry("a", given(folder)).claim()
