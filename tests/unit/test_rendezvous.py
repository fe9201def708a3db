"""The folder in which the processes of one user find a shared host, and the lock and record in it."""

from __future__ import annotations

import json
import os
import signal
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from onnx_dl import ConfigError, PlatformError, rendezvous
from onnx_dl.rendezvous import Place, Record, runtime_folder

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
    with pytest.raises(ConfigError, match="no name of a host; use letters"):
        Place(name, given(folder))
    assert not os.listdir(folder)


@pytest.mark.parametrize("name", ["default", "a.b-c_D", "x" * 64])
def test_good_names(folder: Path, name: str) -> None:
    assert Place(name, given(folder)).holder() is None


# --- the record --------------------------------------------------------------------------------------------


def test_what_is_published_is_found_until_it_is_withdrawn(folder: Path) -> None:
    place = Place("a", given(folder))
    assert place.record() is None
    place.publish("address", "secret", kept=True)
    assert place.record() == Record(address="address", secret="secret", pid=os.getpid(), kept=True)
    assert [mode(path) for path in folder.iterdir()] == [0o600]
    assert Place("b", given(folder)).record() is None
    place.withdraw()
    place.withdraw()
    assert place.record() is None


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"address": 1}), "\xff"])
def test_a_record_of_no_use_is_none(folder: Path, text: str) -> None:
    (folder / "a.json").write_text(text, encoding="latin-1")
    assert Place("a", given(folder)).record() is None


# --- the lock ----------------------------------------------------------------------------------------------


def claimed(folder: Path) -> int:
    """A child that is the host, until it is killed."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, b"!" if Place("a", given(folder)).claim() else b"-")
            signal.pause()
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as said:
        assert said.read(1) == b"!"
    return pid


def test_the_lock_says_who_has_it_and_ends_with_it(folder: Path) -> None:
    place = Place("a", given(folder))
    assert place.holder() is None
    pid = claimed(folder)
    try:
        assert place.holder() == pid
        assert not place.claim()
        assert place.holder() == pid  # looking and trying took nothing away
        assert Place("b", given(folder)).holder() is None
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert place.holder() is None
    second = claimed(folder)
    assert place.holder() == second
    os.kill(second, signal.SIGKILL)
    os.waitpid(second, 0)


def test_a_folder_that_knows_no_locks_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rather than taken for a host that is there."""

    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", none)
    with pytest.raises(OSError, match="No locks"):
        Place("a", given(folder)).claim()
