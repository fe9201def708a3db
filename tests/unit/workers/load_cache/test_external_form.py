"""The external form of models: the same model for the package ``onnx`` and for onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnx_dl.core.wire import NotAMessage
from onnx_dl.workers.load_cache import external_form
from onnx_dl.workers.load_cache.external_form import SMALLEST
from onnx_dl.workers.load_cache.store import MODEL, WEIGHTS
from tests.fuzz import model_variants
from tests.support import zoo
from tests.support.zoo import F, build, constant, node, tensor

WIDTH = 128
"""Of weights of 64 KiB."""


class Written:
    """A model and its form, in two folders."""

    def __init__(self, folder: Path, data: bytes) -> None:
        self.source = folder / "m.onnx"
        self.source.write_bytes(data)
        self.folder = folder / "form"
        self.folder.mkdir()
        self.model, self.weights = self.folder / MODEL, self.folder / WEIGHTS
        with open(self.source, "rb") as file:
            self.moved = external_form.write(file.fileno(), str(self.model), str(self.weights))

    def is_same(self) -> bool:
        with open(self.source, "rb") as file:
            return external_form.is_same(file.fileno(), str(self.model), str(self.weights))


def graphs(model: ModelProto) -> Iterator[onnx.GraphProto]:
    """The graph and those in nodes."""
    waiting = [model.graph]
    while waiting:
        yield (graph := waiting.pop())
        for attribute in (each for inner in graph.node for each in inner.attribute):
            waiting += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def plain(path: Path) -> bytes:
    """The model with all its weights, in a form that can be compared."""
    model = onnx.load(path)
    for each in (weights for graph in graphs(model) for weights in graph.initializer):
        each.ClearField("data_location")
        assert not each.external_data
    return model.SerializeToString(deterministic=True)


def session(path: Path, optimized: Path | None = None, level: str = "ORT_ENABLE_ALL") -> Any:
    options = zoo.session_options(1)
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(path, options, providers=zoo.CPU)


def square(name: str) -> TensorProto:
    return constant(name, zoo.floats(np.random.default_rng(len(name)), WIDTH, WIDTH))


def layer(*weights: TensorProto, **more: Any) -> ModelProto:
    """x @ w."""
    model = build(
        [node("MatMul", ["x", "w"], ["y"])], [tensor("x", F, ["n", WIDTH])], [tensor("y", F)], weights
    )
    return helper.make_model(model.graph, opset_imports=model.opset_import, ir_version=9, **more)


@pytest.mark.parametrize("kind", model_variants.KINDS)
def test_it_is_the_same_model_with_the_same_optimizations(tmp_path: Path, kind: str) -> None:
    data = model_variants.KINDS[kind](np.random.default_rng(0)).SerializeToString()
    written = Written(tmp_path, data)
    assert written.moved > 0.9 * len(data) and written.model.stat().st_size < 8192
    assert written.is_same()
    assert plain(written.model) == plain(written.source)
    feed = {"x": zoo.floats(np.random.default_rng(1), 2, model_variants.WIDTH)}
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"):
        # The second one refers to the weights, so it lies beside them.
        optimized = [tmp_path / f"{level}.onnx", written.folder / f"{level}.onnx"]
        pair = zip((written.source, written.model), optimized, strict=True)
        sessions = [session(path, target, level) for path, target in pair]
        assert plain(optimized[0]) == plain(optimized[1])
        results = [each.run(None, feed)[0] for each in sessions]
        assert np.array_equal(*results)


def test_what_a_model_says_of_itself_stays(tmp_path: Path) -> None:
    """Metadata, documentation, fields that nobody knows, initializers that callers may replace."""
    model = layer(
        square("w"), producer_name="me", doc_string="\N{BIRD}" * 9000, domain="here", model_version=7
    )
    model.graph.input.append(tensor("w", F, [WIDTH, WIDTH]))
    model.graph.initializer[0].doc_string = "weights"
    helper.set_model_props(model, {"author": "me"})
    unknown = b"\x82\x7d\x03abc\xf8\x7d\x05"  # field 2000, bytes, and 2015, a number
    written = Written(tmp_path, model.SerializeToString() + unknown)
    assert written.moved == WIDTH * WIDTH * 4 and written.is_same()
    assert plain(written.model) == plain(written.source)
    assert unknown in written.model.read_bytes()
    ours, theirs = session(written.model), session(written.source)
    names = ("producer_name", "description", "domain", "version", "graph_name", "custom_metadata_map")
    for name in names:
        assert getattr(ours.get_modelmeta(), name) == getattr(theirs.get_modelmeta(), name)
    assert [each.name for each in ours.get_overridable_initializers()] == ["w"]
    feed = {"x": np.ones((1, WIDTH), np.float32), "w": np.eye(WIDTH, dtype=np.float32)}
    assert np.array_equal(ours.run(None, feed)[0], theirs.run(None, feed)[0])


@pytest.mark.parametrize("kind", ["FLOAT16", "DOUBLE", "INT8", "UINT64", "BOOL", "BFLOAT16", "FLOAT8E4M3FN"])
def test_every_type_of_numbers(tmp_path: Path, kind: str) -> None:
    element = getattr(TensorProto, kind)
    size = 4 * SMALLEST
    moving = TensorProto(name="c", data_type=element, dims=[size])
    moving.raw_data = b"\0\1" * (size * helper.tensor_dtype_to_np_dtype(element).itemsize // 2)
    model = build([node("Identity", ["c"], ["y"])], [], [tensor("y", element, [size])], [moving])
    written = Written(tmp_path, model.SerializeToString())
    assert written.moved == len(moving.raw_data) and written.is_same()
    assert plain(written.model) == plain(written.source)


def test_weights_begin_at_pages(tmp_path: Path) -> None:
    odd = constant("odd", np.arange(SMALLEST + 1, dtype=np.uint8))
    written = Written(tmp_path, layer(odd, square("w")).SerializeToString())
    model = onnx.load(written.model, load_external_data=False)
    entries = [{each.key: each.value for each in t.external_data} for t in model.graph.initializer]
    assert [int(entry["offset"]) % 4096 for entry in entries] == [0, 0]
    assert {entry["location"] for entry in entries} == {WEIGHTS}
    assert written.is_same()


def unmoved() -> Iterator[TensorProto]:
    """Initializers that stay where they are."""
    yield constant("small", np.zeros(SMALLEST - 1, np.uint8))
    yield helper.make_tensor("text", TensorProto.STRING, [SMALLEST], [b"abc"] * SMALLEST)
    yield helper.make_tensor("numbers", TensorProto.FLOAT, [SMALLEST], np.ones(SMALLEST))
    external = TensorProto(name="external", data_type=F, dims=[SMALLEST], data_location=TensorProto.EXTERNAL)
    external.external_data.add(key="location", value="x" * SMALLEST)
    yield external
    segment = numpy_helper.from_array(np.zeros(SMALLEST, np.float32), "segment")
    segment.segment.end = 1
    yield segment


@pytest.mark.parametrize("kept", list(unmoved()), ids=lambda kept: kept.name)
def test_what_does_not_move_stays_byte_for_byte(tmp_path: Path, kept: TensorProto) -> None:
    data = layer(kept, square("w")).SerializeToString()
    written = Written(tmp_path, data)
    assert written.moved == WIDTH * WIDTH * 4 and written.is_same()
    assert kept.SerializeToString() in written.model.read_bytes()
    alone = layer(kept).SerializeToString()
    (tmp_path / "alone").mkdir()
    other = Written(tmp_path / "alone", alone)
    assert other.moved == 0 and other.is_same() and other.model.read_bytes() == alone


def test_a_graph_that_comes_in_two_parts(tmp_path: Path) -> None:
    """Protobuf merges them."""
    model = layer(square("w"))
    rest = ModelProto(graph=onnx.GraphProto(initializer=[square("more")]))
    written = Written(tmp_path, model.SerializeToString() + rest.SerializeToString())
    assert written.moved == 2 * WIDTH * WIDTH * 4 and written.is_same()
    assert plain(written.model) == plain(written.source)


def test_every_other_bit_is_noticed(tmp_path: Path) -> None:
    """Of the model, and of its weights."""
    model = layer(square("w"), producer_name="me")
    helper.set_model_props(model, {"author": "me"})
    written = Written(tmp_path, model.SerializeToString())
    assert written.is_same()
    for path in (written.model, written.weights):
        whole = path.read_bytes()
        rng = np.random.default_rng(0)
        places = range(len(whole)) if len(whole) < 1000 else rng.integers(0, len(whole), 200).tolist()
        for place in places:
            damaged = bytearray(whole)
            damaged[place] ^= 1 << rng.integers(8)
            path.write_bytes(damaged)
            assert not is_accepted(written), place
        path.write_bytes(whole[:-1])
        assert not is_accepted(written)
        path.write_bytes(whole)
    assert written.is_same()


def is_accepted(written: Written) -> bool:
    try:
        return written.is_same()
    except (ValueError, OSError):
        return False


def test_two_weights_that_changed_places_are_noticed(tmp_path: Path) -> None:
    written = Written(tmp_path, layer(square("w"), square("w2")).SerializeToString())
    half = WIDTH * WIDTH * 4
    data = written.weights.read_bytes()
    written.weights.write_bytes(data[half:] + data[:half])
    assert not written.is_same()


@pytest.mark.parametrize("data", [b"\x00", b"\x3a\x7f", b"no model", bytes(64), b"\x3a\xff\xff\xff\xff\x7f"])
def test_what_is_no_model_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(NotAMessage):
        Written(tmp_path, data)


def test_graphs_that_are_nested_too_deeply(tmp_path: Path) -> None:
    deep = b""
    for number in (6, 5, 1) * 50:  # a graph in an attribute in a node in a graph...
        deep = external_form._bytes(number, deep)
    with pytest.raises(NotAMessage, match="deeper"):
        Written(tmp_path, external_form._bytes(7, deep))
