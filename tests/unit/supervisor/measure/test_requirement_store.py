"""What models need, on disk: several writers, damage, disks that refuse."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from onnx_dl.core.settings import Settings
from onnx_dl.supervisor.measure import requirement_store
from onnx_dl.supervisor.measure.requirement_store import RequirementStore
from onnx_dl.supervisor.policy.memory_amount import MemoryAmount
from onnx_dl.supervisor.policy.requirements import Peak, Requirement
from onnx_dl.system import installation
from tests.support.damage import damaged


def need(load: int, at: float = 0.0) -> Requirement:
    return Requirement(load=Peak(load), steady=MemoryAmount(load, 1), peak=MemoryAmount(load, 2), at=at)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "needs.json"


def test_the_next_host_knows(path: Path) -> None:
    RequirementStore(lambda: path).put("a", need(1))
    assert RequirementStore(lambda: path).get("a") == need(1)
    assert RequirementStore(lambda: path).get("b") is None
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # nothing unfinished is left


def test_writers_do_not_undo_each_other(path: Path) -> None:
    one, other = RequirementStore(lambda: path), RequirementStore(lambda: path)
    assert one.get("a") is None and other.get("a") is None  # both have read
    one.put("a", need(1))
    other.put("b", need(2))
    one.put("a", need(3))
    assert [RequirementStore(lambda: path).get(key) for key in "ab"] == [need(3), need(2)]


FILL = """
import sys
from pathlib import Path
from onnx_dl.supervisor.policy.memory_amount import MemoryAmount
from onnx_dl.supervisor.policy.requirements import Peak, Requirement
from onnx_dl.supervisor.measure.requirement_store import RequirementStore
mine = RequirementStore(lambda: Path(sys.argv[1]))
for i in range(50):
    amounts = {"steady": MemoryAmount(i, 1), "peak": MemoryAmount(i, 2)}
    mine.put(sys.argv[2] + str(i), Requirement(load=Peak(i), **amounts))
while mine._unwritten:  # the lock was another's
    mine.put(sys.argv[2] + "49", Requirement(load=Peak(49), **amounts))
"""


def test_processes_at_once(path: Path) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", FILL, str(path), name]) for name in "xyz"]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    known = RequirementStore(lambda: path)
    assert all(known.get(f"{name}{i}") == need(i) for name in "xyz" for i in range(50))


def test_somebody_else_is_at_it(path: Path) -> None:
    """It is written the next time; nobody waits."""
    mine = RequirementStore(lambda: path)
    mine.put("a", need(1))
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        mine.put("b", need(2))
        assert RequirementStore(lambda: path).get("b") is None
    finally:
        os.close(folder)
    mine.put("c", need(3))
    assert [RequirementStore(lambda: path).get(key) for key in "abc"] == [need(1), need(2), need(3)]


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"a": 1}', b'{"a": {"load": "x"}}', b"\xff\xfe", b"null"]
)
def test_a_damaged_file_is_replaced(path: Path, damage: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(damage)
    mine = RequirementStore(lambda: path)
    assert mine.get("a") is None
    mine.put("a", need(1))
    assert RequirementStore(lambda: path).get("a") == need(1)


def test_what_was_not_told_of_for_longest_goes(path: Path) -> None:
    path.parent.mkdir()
    many = {str(i): need(i, at=i) for i in range(4096)}
    path.write_bytes(msgspec.json.encode(many))
    RequirementStore(lambda: path).put("new", need(1, at=9e9))
    known = RequirementStore(lambda: path)
    assert known.get("0") is None and known.get("1") is not None and known.get("new") is not None


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    mine = RequirementStore(lambda: tmp_path / "file" / "cache" / "needs.json")
    assert mine.get("a") is None
    mine.put("a", need(1))
    assert (tmp_path / "file").read_text() == ""


def test_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "build", lambda: "onnxruntime-9.9")
    requirement_store.of(Settings(cache_dir=str(tmp_path))).put("a", need(1))
    assert [entry.name for entry in tmp_path.iterdir()] == ["needs-onnxruntime-9.9.json"]
    monkeypatch.setattr(installation, "build", lambda: "onnxruntime-10.0")
    assert (
        requirement_store.of(Settings(cache_dir=str(tmp_path))).get("a") is None
    )  # another version, other needs


@pytest.mark.parametrize("settings", [Settings(cache="off", cache_dir="/tmp"), Settings(cache_dir="here")])
def test_nothing_is_kept(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    requirement_store.of(settings).put("a", need(1))
    assert requirement_store.of(settings).get("a") is None
    assert not list(tmp_path.iterdir())


def test_the_build_that_is_installed() -> None:
    import onnxruntime

    assert installation.build().endswith(f"-{onnxruntime.__version__}")


# --- whatever stands there ---------------------------------------------------------------------------------

WRONG = [
    *(
        b"1",
        b"null",
        b'"x"',
        b"[]",
        b"[" * 900 + b"]" * 900,
        b'{"load": 1}',
        b'{"load": [1]',
        b'{"load": ["1"]}',
    ),
    *(b'{"load": [%d]}' % number for number in (-1, 2**50 + 1, 2**63, 2**64 + 1, 10**400)),
    *(b'{"load": [1e999]}', b'{"load": [NaN]}', b'{"load": [1.5]}', b'{"load": [1, 2]}', b'{"at": -1}'),
    *(b'{"at": 1e300}', b'{"steady": {"ram": -5}}', b'{"peak": {"gpu": 99999999999999999999}}'),
    *(b'{"entry": "../../etc"}', b'{"entry": 5}', b'{"entry": "\xff"}'),
]


@pytest.mark.parametrize("wrong", WRONG, ids=[str(wrong[:30]) for wrong in WRONG])
def test_what_cannot_be_is_dropped_and_the_rest_is_used(path: Path, wrong: bytes) -> None:
    for key in "ac":
        RequirementStore(lambda: path).put(key, need(1))
    first, *rest = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, b'"b": ' + wrong + b",", *rest]))
    mine = RequirementStore(lambda: path)
    assert [mine.get(key) for key in "abc"] == [need(1), None, need(1)]
    mine.put("d", need(2))
    assert b'"b"' not in path.read_bytes()
    assert [RequirementStore(lambda: path).get(key) for key in "acd"] == [need(1), need(1), need(2)]


def test_of_a_file_that_was_cut_off_the_lines_are_used(path: Path) -> None:
    for key in "abc":
        RequirementStore(lambda: path).put(key, need(1))
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        found = RequirementStore(lambda: path).open()
        assert set(found.values()) <= {need(1)}
        assert len(found) >= data[:size].count(b"},\n")


def test_what_claims_to_be_of_the_future_does_not_stay_for_ever(path: Path) -> None:
    RequirementStore(lambda: path).put("a", need(1, at=1e11))
    assert RequirementStore(lambda: path).get("a") == need(1, at=0.0)


@pytest.mark.parametrize("seed", range(300))
def test_whatever_the_file_becomes(path: Path, seed: int) -> None:
    whole = RequirementStore(lambda: path)
    for number in range(5):
        whole.put(str(number), need(number * 1000, at=float(number)))
    path.write_bytes(damaged(path.read_bytes(), [*WRONG, b"{", b"}", b'"', b"\n", b"\\u0000", b":"], seed))
    mine = RequirementStore(lambda: path)
    assert all(0 <= found.load.nbytes <= 1 << 50 and found.at >= 0 for found in mine.open().values())
    mine.put("new", need(7))
    assert RequirementStore(lambda: path).get("new") == need(7)


@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "large"])
def test_something_else_in_its_place(path: Path, kind: str) -> None:
    """Nobody waits for it, and nobody reads a gigabyte."""
    path.parent.mkdir()
    match kind:
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "large":
            with open(path, "wb") as file:
                file.truncate(1 << 30)
    mine = RequirementStore(lambda: path)
    assert mine.get("a") is None
    mine.put("a", need(1))
    assert (RequirementStore(lambda: path).get("a") is None) == (kind == "folder")


def test_entries_of_the_load_cache(path: Path) -> None:
    mine = RequirementStore(lambda: path)
    (path.parent / "ab12").mkdir(parents=True)
    assert mine.is_saved("ab12")
    assert not mine.is_saved("ab13") and not mine.is_saved("")
    assert not RequirementStore(lambda: None).is_saved("ab12")
