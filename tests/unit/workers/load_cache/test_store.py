"""The load cache on disk, and what lies beside a model."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_dl.cli import main
from onnx_dl.core.model_files import bytes_of, external_files
from onnx_dl.core.parsing import parse_size
from onnx_dl.errors import ConfigError
from onnx_dl.tensors import segment
from onnx_dl.workers.load_cache.store import MODEL, WEIGHTS, Cache, EntryMeta, files_of, open_meta
from tests.support.builders import DESCRIPTION

LIMIT = 10_000


@pytest.fixture
def store(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", LIMIT)


def put(store: Cache, key: str, nbytes: int = 100, used: float | None = None, source: str = "") -> bool:
    with store.writing(key) as path:
        assert path is not None
        (path / MODEL).write_bytes(b"m" * 10)
        (path / WEIGHTS).write_bytes(b"w" * (nbytes - 10))
        meta = EntryMeta(
            key=key, name=f"{key}.onnx", source=source, description=DESCRIPTION, files=files_of(path)
        )
        kept = store.keep(key, path, meta)
    if used is not None and kept:
        os.utime(store.root / key, (used, used))
    return kept


def names(store: Cache) -> set[str]:
    return {path.name for path in store.root.iterdir()}


def test_what_was_kept_is_found(store: Cache):
    assert store.find("a") is None
    assert put(store, "a")
    entry = store.find("a")
    assert entry is not None
    assert (entry.meta.name, entry.meta.description, entry.nbytes) == ("a.onnx", DESCRIPTION, 100)
    assert Path(entry.model).read_bytes() == b"m" * 10
    assert names(store) == {"a"}


def test_what_is_written_again_replaces_what_was(store: Cache):
    put(store, "a", 100)
    put(store, "a", 200)
    assert [entry.nbytes for entry in store.entries()] == [200]
    assert names(store) == {"a"}


def test_the_entry_of_another_model_is_none(store: Cache):
    """Complete as it is: models given as bytes have no files by which they could be told apart."""
    put(store, "a")
    os.rename(store.root / "a", store.root / "b")
    assert store.find("b") is None and store.entries() == []
    assert put(store, "b") and store.find("b") is not None


@pytest.mark.parametrize("damage", ["weights", "shorter", "missing", "meta"])
def test_a_damaged_entry_is_removed_and_not_found(store: Cache, damage: str):
    put(store, "a")
    assert store.find("a") is not None  # verified: the damage comes later
    weights = store.root / "a" / WEIGHTS
    if damage == "weights":
        weights.write_bytes(b"x" + b"w" * 89)
    elif damage == "shorter":
        weights.write_bytes(b"w")
    elif damage == "missing":
        weights.unlink()
    else:
        (store.root / "a" / "meta.json").write_bytes(b'{"name": 3}')
    assert store.find("a") is None
    assert damage == "meta" or names(store) == set()
    assert put(store, "a") and store.find("a") is not None


def is_refused(meta: bytes) -> bool:
    try:
        open_meta(meta)
    except ValueError:
        return True
    return False


def test_a_flipped_bit_in_what_an_entry_says_of_itself_makes_it_none(store: Cache):
    """Of any byte, checksum included: names and shapes would be wrong at each load."""
    put(store, "a")
    meta = store.root / "a" / "meta.json"
    whole = meta.read_bytes()
    assert open_meta(whole).name == "a.onnx"
    flips = [bytearray(whole) for _ in range(8 * len(whole))]
    for bit, flipped in enumerate(flips):
        flipped[bit // 8] ^= 1 << bit % 8
    cut = [whole[:length] for length in range(len(whole))]
    assert all(is_refused(bytes(damaged)) for damaged in (*flips, *cut))
    for damaged in (flips[0], flips[len(flips) // 2], cut[-1]):
        meta.write_bytes(damaged)
        assert store.find("a") is None
    meta.write_bytes(whole)
    assert store.find("a") is not None


def test_what_is_no_entry_any_more_goes_with_the_next_save(store: Cache):
    put(store, "a")
    (store.root / "a" / "meta.json").write_bytes(b"{}")
    put(store, "b")
    assert names(store) == {"b"}


def test_a_failed_write_leaves_nothing(store: Cache):
    with pytest.raises(OSError, match="full"), store.writing("a") as path:
        assert path is not None
        (path / MODEL).write_bytes(b"m")
        raise OSError("full")
    assert not store.entries()
    assert not [name for name in names(store) if "unfinished" in name]


def test_one_at_a_time_writes_a_key(store: Cache):
    with store.writing("a") as first, store.writing("a") as second, store.writing("b") as other:
        assert first is not None and second is None and other is not None


def test_what_a_killed_writer_left_is_swept_up(store: Cache):
    put(store, "a")
    (store.root / "unfinished-b-xyz").mkdir()
    (store.root / "unfinished-b-xyz" / WEIGHTS).write_bytes(b"w")
    with store.writing("c") as path:
        assert path is not None and not (store.root / "unfinished-b-xyz").exists()
    with store.writing("d") as living:
        put(store, "e")
        assert living is not None and living.exists(), "somebody writes there"


def test_least_recently_used_goes_first(store: Cache):
    now = time.time()
    for age, key in enumerate("abc"):
        put(store, key, 3000, used=now - 100 * age)
    assert [entry.key for entry in store.entries()] == ["a", "b", "c"]
    store.find("c")
    put(store, "d", 3000)
    assert {entry.key for entry in store.entries()} == {"a", "c", "d"}


def test_what_is_larger_than_the_cache_is_not_kept_and_nothing_goes_for_it(store: Cache):
    put(store, "a", 3000)
    assert not put(store, "b", LIMIT + 1)
    assert [entry.key for entry in store.entries()] == ["a"]


def test_entries_of_models_that_are_gone_go_with_the_next_save(store: Cache, tmp_path: Path):
    (tmp_path / "here.onnx").write_text("")
    put(store, "here", source=str(tmp_path / "here.onnx"))
    put(store, "gone", source=str(tmp_path / "gone.onnx"))
    put(store, "bytes")
    assert {entry.key for entry in store.entries()} == {"here", "bytes"}


def test_clear(store: Cache):
    put(store, "a", 300)
    put(store, "b", 200)
    store.refuse("c")
    assert store.is_refused("c")
    assert store.clear() == 500
    assert names(store) == set()
    assert not store.is_refused("c")


def test_no_cache_is_an_empty_one(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "nothing", tmp_path / "file" / "below"):
        store = Cache(root, LIMIT)
        assert (store.find("a"), store.entries(), store.clear()) == (None, [], 0)
        store.discard("a")


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("ONNX_DL_CACHE_DIR", str(tmp_path / "c"))
    put(Cache(tmp_path / "c", LIMIT), "a", 1500)
    assert main.main(["cache", "ls"]) == 0
    listing = capsys.readouterr().out
    assert "a.onnx" in listing and "1 models, 0.0 MB" in listing
    assert main.main(["cache", "clear"]) == 0
    assert main.main(["cache", "ls"]) == 0
    assert "0 models" in capsys.readouterr().out


# --- files beside a model --------------------------------------------------------------------------------


def test_external_data_is_found_wherever_it_is(tmp_path: Path):
    def tensor(name: str, file: str | None) -> onnx.TensorProto:
        made = numpy_helper.from_array(np.ones(3, np.float32), name)
        if file:
            made.ClearField("raw_data")
            made.data_location = TensorProto.EXTERNAL
            entry = made.external_data.add()
            entry.key, entry.value = "location", file
        return made

    branch = helper.make_graph(
        [helper.make_node("Identity", ["b"], ["y"])],
        "branch",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])],
        [tensor("b", "branch.bin")],
    )
    nodes = [
        helper.make_node("Constant", [], ["c"], value=tensor("c", "constant.bin")),
        helper.make_node("If", ["p"], ["z"], then_branch=branch, else_branch=branch),
    ]
    inputs = [helper.make_tensor_value_info("p", TensorProto.BOOL, [])]
    outputs = [helper.make_tensor_value_info("z", TensorProto.FLOAT, [3])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [tensor("a", "a.bin"), tensor("i", None)])
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    names = ["a.bin", "branch.bin", "constant.bin"]
    with open(segment.freeze(path.read_bytes())) as memory:
        assert external_files(str(path)) == external_files(memory.fileno()) == names


@pytest.mark.parametrize("content", [b"not a model at all", b"\xff" * 40, b"\x3a\xff\x01"])
def test_what_is_no_model_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a model"):
        external_files(str(path))


def within(path: Path, limit: float = 1.0) -> int:
    """What is counted of a model, and that it is told soon: 50 ms are usual, of this thread's own time, which
    does not pass while others have the processors."""
    began = time.thread_time()
    nbytes = bytes_of(str(path))
    assert time.thread_time() - began < limit
    return nbytes


@pytest.mark.parametrize("content", [b"\0", b"\x08\x00", b"\x2a\x00", b"\x3a\x02\x0a\x00", b"\xff"])
def test_an_application_looks_through_a_file_for_a_bounded_time(tmp_path: Path, content: bytes):
    path = tmp_path / "m.onnx"
    path.write_bytes(content * ((32 << 20) // len(content)))
    assert within(path) == path.stat().st_size


def test_a_sparse_file(tmp_path: Path):
    path = tmp_path / "m.onnx"
    with open(path, "wb") as file:
        file.truncate(3 << 30)
    assert within(path) == 3 << 30


def nested(levels: int) -> bytes:
    """Subgraphs of subgraphs, which are too long to be searched at once."""
    message = b"\x12" + _length(9) + b"location " + b"\x12" + _length(1 << 17) + bytes(1 << 17)
    for _ in range(levels):  # graph.node, node.attribute, attribute.g
        for field in (b"\x32", b"\x2a", b"\x0a"):
            message = field + _length(len(message)) + message
    return b"\x3a" + _length(len(message)) + message


def _length(count: int) -> bytes:
    parts = bytearray()
    while count > 127:
        parts.append(count & 127 | 128)
        count >>= 7
    return bytes([*parts, count])


def test_messages_within_each_other(tmp_path: Path):
    path = tmp_path / "m.onnx"
    for levels in (30, 35, 300):
        path.write_bytes(nested(levels))
        assert within(path) == path.stat().st_size
    with pytest.raises(ValueError, match="nested deeper than 100"):
        external_files(str(path))


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("fifo", "loop", "nothing", "nothing/m.onnx", "x" * 300, "a\0b", ""):
        assert within(tmp_path / name) in (0, os.stat(tmp_path).st_size)


def test_files_beside_a_model_count_as_far_as_they_are_found(tmp_path: Path):
    weights = numpy_helper.from_array(np.ones(3000, np.float32), "w")
    graph = helper.make_graph([], "g", [], [], [weights])
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph), path, save_as_external_data=True, location="w", size_threshold=0)
    assert within(path) == path.stat().st_size + 12_000
    (tmp_path / "way").symlink_to(path)
    os.mkdir(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "m.onnx").symlink_to(path)
    assert within(tmp_path / "way") == path.stat().st_size + 12_000
    assert within(tmp_path / "elsewhere" / "m.onnx") == path.stat().st_size, "its weights are not there"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        (12, 12),
        ("12", 12),
        ("2GiB", 2 << 30),
        ("1.5 GB", 1_500_000_000),
        ("500m", 500_000_000),
        ("3 kib", 3072),
    ],
)
def test_sizes(text: str | int, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "1TBx", True, None, 1.5, "1e9"])
def test_no_sizes(text: object):
    with pytest.raises(ConfigError, match="is not a size"):
        parse_size(text)


def _field(number: int, value: bytes) -> bytes:
    size, head = len(value), bytearray([number << 3 | 2])
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    return bytes([*head, size]) + value


def test_whatever_stands_in_a_model_file_it_is_looked_through_soon(tmp_path: Path):
    """A host does that with files that it was told to load."""
    deep = b""
    for number in (6, 5, 1) * 400:  # a graph in an attribute in a node in a graph...
        deep = _field(number, deep)
    path = tmp_path / "m.onnx"
    long = b"\x3a\xff\xff\xff\xff\x7f"
    for data in (_field(7, deep), b"\x80" * 100_000, b"\x08\x01" * 2_000_000, long, b""):
        path.write_bytes(data)
        assert bytes_of(str(path)) == len(data)
    for seed in range(200):
        rng = random.Random(seed)
        path.write_bytes(bytes(rng.choice(b"\x00\x08\x0a\x0d\x2a\x3a\x6a\x80\x01\x05") for _ in range(300)))
        assert bytes_of(str(path)) >= 300
    path.unlink()
    os.mkfifo(path)
    assert bytes_of(str(path)) == 0


# --- entries that were tampered with -----------------------------------------------------------------------


@pytest.mark.parametrize("what", ["meta.json", "verified", MODEL])
@pytest.mark.parametrize("becomes", ["fifo", "folder", "deep", "no text", "large", "link"])
def test_whatever_stands_in_an_entry_it_is_used_or_removed(store: Cache, what: str, becomes: str):
    """Nobody waits, nothing is raised, and another model's file is never taken for its own."""
    put(store, "a")
    path = store.root / "a" / what
    path.unlink(missing_ok=True)
    match becomes:
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "deep":
            path.write_bytes(b"[" * 100_000)
        case "no text":
            path.write_bytes(b'{"name": "\xff"}')
        case "large":
            with open(path, "wb") as file:
                file.truncate(1 << 32)
        case "link":
            path.symlink_to("/dev/zero")
    found = store.find("a")
    assert (found is not None) == (what == "verified")
    store.entries()
    store.clear()
