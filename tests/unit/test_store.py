"""What models need, on disk: several writers, damage, disks that refuse."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from onnx_dl import installation
from onnx_dl.config import Settings
from onnx_dl.supervisor import store
from onnx_dl.supervisor.needs import Bytes, Need
from onnx_dl.supervisor.store import Store


def need(load: int, at: float = 0.0) -> Need:
    return Need(load=load, steady=Bytes(load, 1), peak=Bytes(load, 2), at=at)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "needs.json"


def test_the_next_host_knows(path: Path) -> None:
    Store(lambda: path).put("a", need(1))
    assert Store(lambda: path).get("a") == need(1)
    assert Store(lambda: path).get("b") is None
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # nothing unfinished is left


def test_writers_do_not_undo_each_other(path: Path) -> None:
    one, other = Store(lambda: path), Store(lambda: path)
    assert one.get("a") is None and other.get("a") is None  # both have read
    one.put("a", need(1))
    other.put("b", need(2))
    one.put("a", need(3))
    assert [Store(lambda: path).get(key) for key in "ab"] == [need(3), need(2)]


FILL = """
import sys
from pathlib import Path
from onnx_dl.supervisor.needs import Bytes, Need
from onnx_dl.supervisor.store import Store
mine = Store(lambda: Path(sys.argv[1]))
for i in range(50):
    mine.put(sys.argv[2] + str(i), Need(load=i, steady=Bytes(i, 1), peak=Bytes(i, 2)))
while mine._unwritten:  # the lock was another's
    mine.put(sys.argv[2] + "49", Need(load=49, steady=Bytes(49, 1), peak=Bytes(49, 2)))
"""


def test_processes_at_once(path: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", FILL, str(path), name]) for name in "xyz"]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    known = Store(lambda: path)
    assert all(known.get(f"{name}{i}") == need(i) for name in "xyz" for i in range(50))


def test_somebody_else_is_at_it(path: Path) -> None:
    """It is written the next time; nobody waits."""
    mine = Store(lambda: path)
    mine.put("a", need(1))
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        mine.put("b", need(2))
        assert Store(lambda: path).get("b") is None
    finally:
        os.close(folder)
    mine.put("c", need(3))
    assert [Store(lambda: path).get(key) for key in "abc"] == [need(1), need(2), need(3)]


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"a": 1}', b'{"a": {"load": "x"}}', b"\xff\xfe", b"null"]
)
def test_a_damaged_file_is_replaced(path: Path, damage: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(damage)
    mine = Store(lambda: path)
    assert mine.get("a") is None
    mine.put("a", need(1))
    assert Store(lambda: path).get("a") == need(1)


def test_what_was_not_told_of_for_longest_goes(path: Path) -> None:
    path.parent.mkdir()
    many = {str(i): need(i, at=i) for i in range(4096)}
    path.write_bytes(msgspec.json.encode(many))
    Store(lambda: path).put("new", need(1, at=9e9))
    known = Store(lambda: path)
    assert known.get("0") is None and known.get("1") is not None and known.get("new") is not None


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    mine = Store(lambda: tmp_path / "file" / "cache" / "needs.json")
    assert mine.get("a") is None
    mine.put("a", need(1))
    assert (tmp_path / "file").read_text() == ""


def test_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "build", lambda: "onnxruntime-9.9")
    store.of(Settings(cache_dir=str(tmp_path))).put("a", need(1))
    assert [entry.name for entry in tmp_path.iterdir()] == ["needs-onnxruntime-9.9.json"]
    monkeypatch.setattr(installation, "build", lambda: "onnxruntime-10.0")
    assert store.of(Settings(cache_dir=str(tmp_path))).get("a") is None  # another version, other needs


@pytest.mark.parametrize("settings", [Settings(cache="off", cache_dir="/tmp"), Settings(cache_dir="here")])
def test_nothing_is_kept(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store.of(settings).put("a", need(1))
    assert store.of(settings).get("a") is None
    assert not list(tmp_path.iterdir())


def test_the_build_that_is_installed() -> None:
    import onnxruntime

    assert installation.build().endswith(f"-{onnxruntime.__version__}")
