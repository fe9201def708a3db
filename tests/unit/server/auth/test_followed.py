"""Files that are read again when they change."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from onnx_dl.server.auth.followed import LOOK_EVERY, FileError, Followed
from tests.support.waiting import DEADLINE, allowed

LONG_AGO = 1_000_000_000


class World:
    """A file, a clock that stands, and what was told.  ``reads`` counts."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self.now = 0.0
        self.reads = 0
        self.told: list[str] = []
        self.write(text)
        self.followed = Followed((str(path),), self.read, self.told.append, lambda: self.now)

    def read(self) -> str:
        self.reads += 1
        try:
            text = self.path.read_text()
        except OSError as error:
            raise FileError(f"{self.path}: {error.strerror}.") from None
        if text.startswith("bad"):
            raise FileError(f"{self.path}: {text}.")
        return text

    def write(self, text: str) -> None:
        fresh = self.path.with_suffix(".new")
        fresh.write_text(text)
        fresh.rename(self.path)

    def later(self) -> str:
        self.now += LOOK_EVERY
        return self.followed.current()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """As it is read in the moment in which it was written, however long that takes."""
    monkeypatch.setattr("time.time_ns", lambda: 0)
    return World(tmp_path / "file", "one")


def test_a_change_is_seen_at_the_next_look_and_not_before(world: World) -> None:
    world.write("two")
    assert world.followed.current() == "one"
    assert world.later() == "two"


def test_an_invalid_file_leaves_the_last_value_and_is_told_once(world: World) -> None:
    world.write("bad one")
    assert [world.later() for _ in range(5)] == ["one"] * 5
    assert len(world.told) == 1 and "bad one" in world.told[0] and "stays in use" in world.told[0]
    world.write("bad two")
    assert world.later() == "one" and "bad two" in world.told[1]
    world.write("two")
    assert world.later() == "two" and len(world.told) == 2


def test_a_file_that_vanishes_leaves_the_last_value(world: World) -> None:
    world.path.unlink()
    assert [world.later(), world.later()] == ["one", "one"]
    assert len(world.told) == 1 and "No such file" in world.told[0]
    world.write("two")
    assert world.later() == "two"


def test_the_first_read_must_be_valid(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="bad"):
        World(tmp_path / "file", "bad")


def test_a_link_on_the_way_is_followed(tmp_path: Path) -> None:
    """As the kubelet does: ``file`` -> ``..data/file``, ``..data`` -> a folder that is replaced."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "..data").symlink_to("first")
    (tmp_path / "file").symlink_to("..data/file")
    now = [0.0]
    path = tmp_path / "file"
    followed = Followed((str(path),), path.read_text, lambda _: None, lambda: now[0])
    (tmp_path / "..new").symlink_to("second")
    (tmp_path / "..new").rename(tmp_path / "..data")
    assert followed.current() == "first"
    now[0] += LOOK_EVERY
    assert followed.current() == "second"


def test_a_file_that_has_settled_is_not_read_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert world.reads == 1
    written = os.stat(world.path).st_ctime_ns
    monkeypatch.setattr("time.time_ns", lambda: written + LONG_AGO)
    world.later()  # it was read in the moment in which it was written: once more
    assert world.reads == 2
    for _ in range(5):
        world.later()
    assert world.reads == 2


def test_a_change_within_one_tick_of_the_files_clock_is_seen(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same size, the same time stamp, the same inode: the file is read again because it was too new."""
    seen = os.stat(world.path)
    monkeypatch.setattr("os.stat", lambda path: seen)
    world.path.write_text("eno")
    assert world.later() == "eno"


def test_one_thread_looks_and_the_others_do_not_wait(world: World) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> str:
        begun.set()
        assert go_on.wait(allowed(DEADLINE))
        return "slow"

    world.followed._read = slow
    world.write("two")
    looking = threading.Thread(target=world.later)
    looking.start()
    assert begun.wait(allowed(DEADLINE))
    assert world.followed.current() == "one"
    go_on.set()
    looking.join(allowed(DEADLINE))
    assert world.followed.current() == "slow"
