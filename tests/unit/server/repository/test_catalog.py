"""Folders on the disk as candidates: names, versions, external data, two of one name."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnx_dl.core.environment import NOTHING
from onnx_dl.core.spec import specify
from onnx_dl.core.terms import Terms, WorkerOptions
from onnx_dl.errors import ConfigError
from onnx_dl.server.repository import layout, signature, specs
from onnx_dl.server.repository.catalog import Catalog, NamedModel
from tests.support import zoo
from tests.support.small import plus


def put(root: Path, name: str, version: str, data: bytes, filename: str = "model.onnx") -> Path:
    folder = root / name / version
    folder.mkdir(parents=True, exist_ok=True)
    (folder / filename).write_bytes(data)
    return folder / filename


def external(folder: Path) -> None:
    """A model whose weights are in a file of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = numpy_helper.from_array(np.arange(1000, dtype=np.float32), "w")
    graph = helper.make_graph(
        [zoo.node("Add", ["x", "w"], ["y"])], "g", [zoo.tensor("x", shape=[1000])],
        [zoo.tensor("y", shape=[1000])], [weights],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)


def test_folders_and_versions(tmp_path: Path) -> None:
    for version in ("1", "2", "10", "010", "x", ".3"):
        put(tmp_path, "a", version, plus(1))
    put(tmp_path, ".hidden", "1", plus(1))
    (tmp_path / "file").write_text("x")
    (tmp_path / "nothing").mkdir()
    found = Catalog([str(tmp_path)]).read()
    assert found.keys() == {"a", "nothing"}
    assert found["a"].there == ("1", "2", "10")
    assert [entry.version for entry in found["a"].entries] == ["10"]
    assert "has no folder of a version" in found["nothing"].problem


def test_links_as_volumes_of_kubernetes_have_them(tmp_path: Path) -> None:
    put(tmp_path / "..2026_11_27", "a", "1", plus(1))
    (tmp_path / "..data").symlink_to("..2026_11_27")
    (tmp_path / "a").symlink_to("..data/a")
    (entry,) = Catalog([str(tmp_path)]).read()["a"].entries
    assert entry.path == str(tmp_path / "a" / "1" / "model.onnx")


@pytest.mark.parametrize(
    ("names", "filename", "chosen"),
    [
        (["model.onnx"], "", "model.onnx"),
        (["model.ort"], "", "model.ort"),
        (["model.onnx", "model.ort"], "", "model.onnx"),
        (["model.onnx", "other.onnx"], "other.onnx", "other.onnx"),
        ([], "", "model.onnx"),
    ],
)
def test_the_file_of_a_version(tmp_path: Path, names: list[str], filename: str, chosen: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert layout.model_file(str(tmp_path), names, filename) == str(tmp_path / chosen)


def test_a_folder_as_a_model(tmp_path: Path) -> None:
    external(tmp_path / "a" / "1" / "model.onnx")
    (entry,) = Catalog([str(tmp_path)]).read()["a"].entries
    assert entry.path == str(tmp_path / "a" / "1" / "model.onnx" / "model.onnx")


def test_external_data_is_part_of_the_content(tmp_path: Path) -> None:
    external(tmp_path / "a" / "1")
    catalog = Catalog([str(tmp_path)])
    first = catalog.read()["a"]
    assert catalog.read()["a"] == first
    weights = tmp_path / "a" / "1" / "w.bin"
    os.utime(weights, ns=(1, 1))
    second = catalog.read()["a"]
    assert second.entries[0].generation != first.entries[0].generation
    assert specs.key_of(second.entries[0].generation) == specs.key_of(first.entries[0].generation)
    weights.unlink()
    third = catalog.read()["a"]
    assert not third.entries
    assert third.broken["1"].endswith("its external data w.bin is not there")


def test_what_has_not_changed_is_not_read_again(tmp_path: Path) -> None:
    put(tmp_path, "a", "1", plus(1))
    (tmp_path / "a" / "config.pbtxt").write_text('name: "a"')
    catalog = Catalog([str(tmp_path)])
    first = catalog.read()
    with patch.object(signature, "read", side_effect=AssertionError("it was read again")):
        assert catalog.read()["a"] is first["a"]
    (tmp_path / "a" / "config.pbtxt").write_text('name: "a" max_batch_size: 2')
    assert catalog.read()["a"].entries[0].max_batch_size == 2
    assert catalog.read({"a": "{}"})["a"].entries[0].max_batch_size == 0
    (tmp_path / "a" / "config.pbtxt").unlink()
    assert catalog.read()["a"].entries[0].max_batch_size == 0


def test_versions_of_a_policy(tmp_path: Path) -> None:
    for version in ("1", "2", "3"):
        put(tmp_path, "a", version, plus(1))
    (tmp_path / "a" / "config.pbtxt").write_text("version_policy { specific { versions: [ 1, 3, 7 ] } }")
    found = Catalog([str(tmp_path)]).read()["a"]
    assert [entry.version for entry in found.entries] == ["1", "3"]
    assert found.broken == {"7": f"there is no folder {tmp_path}/a/7"}


@pytest.mark.parametrize("name", ["config.pbtxt", "1/model.onnx"])
def test_what_cannot_be_read_is_told(tmp_path: Path, name: str) -> None:
    path = put(tmp_path, "a", "1", plus(1))
    path.unlink()
    os.mkfifo(tmp_path / "a" / name)
    if name == "config.pbtxt":
        path.write_bytes(plus(1))
    found = Catalog([str(tmp_path)]).read()["a"]
    assert not found.entries
    assert any(str(tmp_path / "a" / name) in text for text in (found.problem, *found.broken.values()))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.EIO])
def test_an_error_that_passes_is_forgotten(tmp_path: Path, number: int) -> None:
    """The file's state is the same before and after."""
    put(tmp_path, "a", "1", plus(1))
    catalog = Catalog([str(tmp_path)])
    with patch.object(signature, "read", side_effect=OSError(number, os.strerror(number))):
        assert os.strerror(number) in catalog.read()["a"].broken["1"]
    assert [entry.version for entry in catalog.read()["a"].entries] == ["1"]


def test_a_folder_that_cannot_be_read_may_have_versions(tmp_path: Path) -> None:
    put(tmp_path, "a", "1", plus(1))
    catalog = Catalog([str(tmp_path)])
    with patch.object(layout, "_names", side_effect=OSError(errno.ESTALE, os.strerror(errno.ESTALE))):
        found = catalog.read()["a"]
    assert (found.is_unreadable, os.strerror(errno.ESTALE) in found.problem) == (True, True)
    (tmp_path / "b").mkdir()
    assert not catalog.read()["b"].is_unreadable


def test_another_text_is_another_configuration(tmp_path: Path) -> None:
    """Also where what is understood of it is the same."""
    put(tmp_path, "a", "1", plus(1))
    config = tmp_path / "a" / "config.pbtxt"
    catalog = Catalog([str(tmp_path)])
    for value in ("x", "y"):
        config.write_text(f'parameters {{ key: "mine" value {{ string_value: "{value}" }} }}')
        (entry,) = catalog.read()["a"].entries
        assert entry.config["parameters"] == {"mine": {"string_value": value}}


def test_a_configuration_in_another_encoding(tmp_path: Path) -> None:
    put(tmp_path, "a", "1", plus(1))
    (tmp_path / "a" / "config.pbtxt").write_bytes(b'name: "\xff"')
    assert Catalog([str(tmp_path)]).read()["a"].problem == f"{tmp_path}/a/config.pbtxt:1: this is not UTF-8"


def test_two_of_one_name(tmp_path: Path) -> None:
    put(tmp_path / "r", "a", "1", plus(1))
    put(tmp_path / "r", "b", "1", plus(1))
    file = put(tmp_path, "alone", "1", plus(2))
    named = NamedModel(name="a", path=str(file), place=f"--model a={file}")
    found = Catalog([str(tmp_path / "r")], [named]).read()
    assert f"{tmp_path}/r/a and --model a={file}" in found["a"].problem
    assert not found["a"].entries
    assert found["b"].entries


@pytest.mark.parametrize("name", ["", " ", "a/b", "..", "a\nb", "a\\b"])
def test_names_that_cannot_be_part_of_a_path(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a name for a model"):
        Catalog([], [NamedModel(name=name, path="/x", place="--model")])


def test_a_model_of_a_hosts_file_has_its_spec(tmp_path: Path) -> None:
    path = put(tmp_path, "a", "1", plus(1))
    how = {
        "options": {"intra_op_num_threads": 1, "config": {}},
        "providers": [["CPUExecutionProvider", {"a": 1}]],
        "provider_options": None, "memory": None, "extra": {}, "surroundings": {}, "max_memory": 10**9,
        "max_memory_hard": None, "max_runs": None, "group": None, "sandbox": False,
        "environment": NOTHING, "sha256": {},
    }  # fmt: skip
    spec = specify(str(path), None, "/somewhere", how)
    named = NamedModel(
        name="n", path=str(path), place="host.toml", spec=spec, terms=Terms(7.0, pin=True), is_eager=True
    )
    (entry,) = Catalog([], [named]).read()["n"].entries
    assert entry.is_eager
    assert entry.arguments["ttl"] == 7
    assert specs.spec_of(entry) == spec
    assert specs.terms(entry.arguments) == Terms(7.0, pin=True)


def test_a_client_takes_no_limit_off_a_model_of_a_hosts_file(tmp_path: Path) -> None:
    path = put(tmp_path, "a", "1", plus(1))
    options = WorkerOptions.parse(10**9, 2 * 10**9, 5, "g").with_trust({"model.onnx": "0" * 64}, True)
    how = {
        "options": None, "providers": ["CPUExecutionProvider"], "provider_options": None, "memory": None,
        "extra": {}, "surroundings": {}, **options.fields(),
    }  # fmt: skip
    spec = specify(str(path), None, "/somewhere", how)
    named = NamedModel(name="n", path=str(path), place="host.toml", spec=spec, terms=Terms(7.0, pin=True))
    catalog = Catalog([], [named])
    text = '{"parameters": {"onnx_dl.sandbox": {"string_value": "false"}}, "max_batch_size": 0}'
    for override in ("{}", text):
        found = catalog.read_one("n", override)
        assert found is not None
        (entry,) = found.entries
        assert specs.spec_of(entry) == spec
        assert specs.terms(entry.arguments) == Terms(7.0, pin=True)


def test_a_client_takes_no_limit_off_a_configuration(tmp_path: Path) -> None:
    put(tmp_path, "a", "1", plus(1))
    given = {"sandbox": "true", "max_memory_hard": "2GB", "max_memory": "1GB", "max_runs": "5", "group": "g"}
    lines = [
        f'parameters {{ key: "onnx_dl.{name}" value {{ string_value: "{value}" }} }}'
        for name, value in given.items()
    ]
    (tmp_path / "a" / "config.pbtxt").write_text("\n".join([*lines, "instance_group { kind: KIND_CPU }"]))
    catalog = Catalog([str(tmp_path)])
    limits = {
        "sandbox": True, "max_memory_hard": 2 * 10**9, "max_memory": 10**9, "max_runs": 5, "group": "g",
        "providers": ["CPUExecutionProvider"],
    }  # fmt: skip
    looser = {"sandbox": "false", "max_memory_hard": "9GB", "max_runs": "900", "group": "h", "ttl": "1"}
    loose = {f"onnx_dl.{name}": {"string_value": value} for name, value in looser.items()}
    for override, more in (
        ({}, {"ttl": 300.0}),
        ({"parameters": loose, "instance_group": [{"kind": "KIND_GPU"}]}, {"ttl": 1.0}),
        ({"parameters": {"onnx_dl.max_memory_hard": {"string_value": "5MB"}}},
         {"ttl": 300.0, "max_memory_hard": 5 * 10**6, "max_memory": 5 * 10**6}),
    ):  # fmt: skip
        found = catalog.read_one("a", json.dumps(override))
        assert found is not None
        assert found.entries[0].arguments == limits | more


def test_a_repository_that_cannot_be_listed(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised:
        Catalog([str(tmp_path / "absent")]).read()
    assert raised.value.filename == str(tmp_path / "absent")


def test_one_model_by_name(tmp_path: Path) -> None:
    put(tmp_path, "a", "1", plus(1))
    catalog = Catalog([str(tmp_path)])
    found = catalog.read_one("a", '{"max_batch_size": 3}')
    assert found is not None
    assert found.entries[0].max_batch_size == 3
    for name in ("", ".", "..", "b", "a/1", "../" + tmp_path.name, "a\0", "x" * 5000, "\ud800"):
        assert catalog.read_one(name) is None
