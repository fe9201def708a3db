"""Which files a model was read from, whether they are the same, and loading in spite of who replaces them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from onnx_dl.core import model_files
from onnx_dl.core.model_files import ReadFile
from onnx_dl.core.spec import ModelSpec, specify
from onnx_dl.errors import FilesChanging
from onnx_dl.workers.engines import base, ort_session
from onnx_dl.workers.load_cache import rules
from tests.support.builders import spec

HOW = {"options": None, "providers": None, "provider_options": None, "extra": {}}


def key(path: Path | str, cwd: str = "/") -> str:
    return specify(str(path), None, cwd, HOW).key


def cache_key(path: Path) -> str:
    return rules.key_of(spec_of(path), "1.31")


def spec_of(path: Path | str, cwd: str = "/", **fields: object) -> ModelSpec:
    return ModelSpec(key="k", name="m", cwd=cwd, path=str(path), **fields)  # type: ignore[arg-type]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders in which a link leads to the same file."""
    (tmp_path / "blob").write_bytes(b"1")
    found = tmp_path / "one", tmp_path / "two"
    for folder in found:
        folder.mkdir()
        (folder / "m.onnx").symlink_to("../blob")
    return found


def test_links_in_two_folders_are_two_models(folders: tuple[Path, Path]) -> None:
    one, two = (folder / "m.onnx" for folder in folders)
    assert key(one) != key(two)
    assert cache_key(one) != cache_key(two)


def test_ways_to_one_folder_are_one_model(folders: tuple[Path, Path], tmp_path: Path) -> None:
    one, _ = folders
    (tmp_path / "way").symlink_to(one)
    (one / "same.onnx").symlink_to("m.onnx")
    ways = [one / "m.onnx", tmp_path / "way" / "m.onnx", one / "same.onnx", tmp_path / "two/../one/m.onnx"]
    assert len({key(way) for way in ways}) == len({cache_key(way) for way in ways}) == 1
    assert key("m.onnx", cwd=str(one)) == key(one / "m.onnx")


def test_another_file_is_another_model(folders: tuple[Path, Path], tmp_path: Path) -> None:
    path = folders[0] / "m.onnx"
    before = key(path), cache_key(path)
    (tmp_path / "new").write_bytes(b"1")
    os.replace(tmp_path / "new", tmp_path / "blob")
    assert key(path) != before[0] and cache_key(path) != before[1]


def test_where_files_are_looked_for() -> None:
    model = spec_of("models/m.onnx", cwd="/work")
    assert [model.where(name) for name in ("", "a/w.bin", "/usr/lib/ops.so")] == [
        "/work/models/m.onnx",
        "/work/models/a/w.bin",
        "/usr/lib/ops.so",
    ]
    given = ModelSpec(key="k", name="m", cwd="/work", blob="digest")
    assert given.where("w.bin") == "/work/w.bin"
    told = {"config": {"session.model_external_initializers_file_folder_path": "beside"}}
    elsewhere = ModelSpec(key="k", name="m", cwd="/work", blob="digest", options=told)
    assert elsewhere.where("w.bin") == "/work/beside/w.bin"


@pytest.mark.parametrize("how", ["written", "touched", "replaced", "link", "gone"])
def test_what_has_changed_is_noticed(tmp_path: Path, how: str) -> None:
    (tmp_path / "m.onnx").write_bytes(b"m")
    (tmp_path / "one").write_bytes(b"1")
    (tmp_path / "w").symlink_to("one")
    model = spec_of(tmp_path / "m.onnx")
    read = model_files.identities(model.where, ["", "w", "never"])
    assert model_files.changed(model.where, read) is None
    if how == "written":
        (tmp_path / "one").write_bytes(b"22")
    elif how == "touched":
        os.utime(tmp_path / "one", ns=(0, 1))
    elif how == "gone":
        (tmp_path / "one").unlink()
    else:
        (tmp_path / "two").write_bytes(b"1")
        if how == "link":
            (tmp_path / "next").symlink_to("two")
        os.replace(tmp_path / ("next" if how == "link" else "two"), tmp_path / "w")
    assert model_files.changed(model.where, read) == str(tmp_path / "w")


def test_what_comes_to_be_is_a_change(tmp_path: Path) -> None:
    model = spec_of(tmp_path / "m.onnx")
    read = model_files.identities(model.where, ["w"])
    assert read == [ReadFile("w", None)]
    (tmp_path / "w").write_bytes(b"")
    assert model_files.changed(model.where, read) == str(tmp_path / "w")


def test_a_look_is_cheap(tmp_path: Path) -> None:
    """20 µs for a file; the fastest of many, whatever else this machine does."""
    (tmp_path / "m.onnx").write_bytes(b"m")
    model = spec_of(tmp_path / "m.onnx")
    read = model_files.identities(model.where, [""])
    took = []
    for _ in range(200):
        began = time.perf_counter_ns()
        assert model_files.changed(model.where, read) is None
        took.append(time.perf_counter_ns() - began)
    assert min(took) < 20_000


def test_names_that_cannot_be_looked_at_are_no_files() -> None:
    assert model_files.identity("a\0b") is None
    assert model_files.identity("x" * 5000) is None


def test_libraries_are_among_the_files(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    calls = [
        ["register_custom_ops_library", ["/opt/ops.so"], {}],
        ["register_custom_ops_library", [], {"path": "/opt/more.so"}],
        ["register_custom_ops_library", ["libfound.so"], {}],
        ["add_free_dimension_override_by_name", ["/n", 1], {}],
    ]
    model = spec_of(tmp_path / "m.onnx", options={"calls": calls}, surroundings={"libraries": {"e": "/e.so"}})
    assert ort_session.files_of(model) == ["", "/opt/ops.so", "/opt/more.so", "/e.so"]


# --- loading ---------------------------------------------------------------------------------------------


class Loads:
    """Loads of a file that is replaced during the first so many of them."""

    def __init__(self, path: Path, changes: int, error: Exception | None = None) -> None:
        self.path, self.changes, self.error = path, changes, error
        self.count = 0

    def __call__(self) -> str:
        content = self.path.read_text()
        self.count += 1
        if self.count <= self.changes:
            self.path.with_name("new").write_text(f"{self.count}")
            os.replace(self.path.with_name("new"), self.path)
            if self.error is not None:
                raise self.error
        return content


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "m.onnx").write_text("0")
    return tmp_path / "m.onnx"


@pytest.mark.parametrize("error", [None, ValueError("half of each")])
@pytest.mark.parametrize("changes", [0, 1, 2])
def test_a_file_that_changes_meanwhile_is_loaded_again(
    path: Path, changes: int, error: Exception | None
) -> None:
    loads = Loads(path, changes, error)
    made, read = base.load_unchanged(spec_of(path), lambda: [""], loads)
    assert (made, loads.count) == (str(changes), changes + 1)
    assert read == [ReadFile("", model_files.identity(str(path)))]


def test_one_that_changes_each_time_is_given_up(path: Path) -> None:
    loads = Loads(path, 99)
    with pytest.raises(FilesChanging, match=r"m\.onnx was changed while .* 3 times in a row\. Load it after"):
        base.load_unchanged(spec_of(path), lambda: [""], loads)
    assert loads.count == 3


def test_what_is_wrong_with_a_file_that_stays_is_said_at_once(path: Path) -> None:
    calls = []

    def make() -> None:
        calls.append(1)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        base.load_unchanged(spec_of(path), lambda: [""], make)
    assert len(calls) == 1


# --- a process of its own --------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False)])
def test_what_onnxruntime_does_once_needs_a_process_that_has_not_done_it(value: str, expected: bool) -> None:
    model = spec(options={"config": {"session.set_denormal_as_zero": value}})
    assert model.pristine is expected
    assert spec("g", members=[spec(), model]).pristine is expected
    assert not spec().pristine


def test_a_field_that_protobuf_does_not_know_hides_no_external_file(tmp_path: Path) -> None:
    """In the entry that names the file, a number as the field of the key, which is text."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    entry = field(1, b"location") + field(2, b"weights.bin") + bytes([1 << 3, 1])
    (tmp_path / "model.onnx").write_bytes(field(7, field(5, field(13, entry))))
    assert model_files.external_files(str(tmp_path / "model.onnx")) == ["weights.bin"]
