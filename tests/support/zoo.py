"""Models of many kinds with inputs by chance, and what in-process onnxruntime makes of them.

What the fuzzers and the soak have in common.  Everything that is drawn is the same for the same seed.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

F, F64, F16, I64, I32, U8, BOOL, STR = (
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
    TensorProto.FLOAT16,
    TensorProto.INT64,
    TensorProto.INT32,
    TensorProto.UINT8,
    TensorProto.BOOL,
    TensorProto.STRING,
)
CPU = ["CPUExecutionProvider"]
SIZES = (0, 1, 2, 3, 7, 16, 17, 64, 300, 4096, 16384, 16385, 70_000, 300_000)
"""Elements of an input, on both sides of where results become views (64 KiB) and of what the event loop
copies itself (1 MiB)."""

Feed = dict[str, Any]
node = helper.make_node


class Kind(NamedTuple):
    """A model.  ``draw(rng, size)`` makes its feed; ``most``: elements that it takes at most; ``arrays``: all
    that goes in and comes out are arrays of numbers."""

    name: str
    data: bytes
    draw: Callable[[np.random.Generator, int], Feed]
    most: int = 1 << 30
    arrays: bool = True


def tensor(name: str, kind: int = F, shape: list[Any] | None = None) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def constant(name: str, value: Any) -> TensorProto:
    return numpy_helper.from_array(np.asarray(value), name)


def build(
    nodes: Sequence[Any],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    constants: Sequence[TensorProto] = (),
) -> ModelProto:
    """As a model of opset 17."""
    graph = helper.make_graph(list(nodes), "zoo", list(inputs), list(outputs), list(constants))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def _bytes(*parts: Any) -> bytes:
    data: bytes = build(*parts).SerializeToString()
    return data


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def _rows(rng: np.random.Generator, size: int, most: int = 8) -> np.ndarray:
    """So many elements, about, in a few rows."""
    rows = int(rng.integers(1, most + 1)) if size else 0
    return floats(rng, rows, max(1, size // max(1, rows)))


# --- models ----------------------------------------------------------------------------------------------


def plus(added: float) -> bytes:
    """y = x + constant, of any length."""
    ends = [tensor("x", F, ["n"])], [tensor("y", F, ["n"])]
    return _bytes([node("Add", ["x", "c"], ["y"])], *ends, [constant("c", np.float32([added]))])


def negative() -> bytes:
    """z = -y, of any length: what follows y = x + constant in a pipeline."""
    return _bytes([node("Neg", ["y"], ["z"])], [tensor("y", F, ["n"])], [tensor("z", F, ["n"])])


def _two() -> bytes:
    nodes = [node("Add", ["a", "b"], ["sum"]), node("ReduceMax", ["sum"], ["top"], keepdims=1)]
    ends = [tensor(name, F, ["n", "m"]) for name in ("a", "b", "sum")]
    return _bytes(nodes, ends[:2], [ends[2], tensor("top", F, [1, 1])])


def _two_feed(rng: np.random.Generator, size: int) -> Feed:
    a = _rows(rng, max(1, size))
    return {"a": a, "b": floats(rng, *a.shape)}


def layers(width: int = 64, count: int = 2, seed: int = 0) -> bytes:
    """A vector of so many through matrices."""
    rng = np.random.default_rng(seed)
    weights = [constant(f"w{i}", floats(rng, width, width) / width**0.5) for i in range(count)]
    nodes = [node("MatMul", [f"h{i}" if i else "x", f"w{i}"], [f"h{i + 1}"]) for i in range(count)]
    nodes.append(node("Softmax", [f"h{count}"], ["p"]))
    return _bytes(nodes, [tensor("x", F, ["n", width])], [tensor("p", F, ["n", width])], weights)


def _found() -> bytes:
    """Shapes that depend on values: where x is positive, and which numbers it has."""
    zero = constant("zero", np.float32(0))
    nodes = [
        node("Greater", ["x", "zero"], ["positive"]),
        node("NonZero", ["positive"], ["where"]),
        node("Compress", ["x", "positive"], ["which"]),
        node("Unique", ["x"], ["values", "first", "", "counts"]),
    ]
    outputs = [tensor("where", I64, [1, "k"]), tensor("which", F, ["k2"]), tensor("values", F, ["u"])]
    return _bytes(nodes, [tensor("x", F, ["n"])], [*outputs, tensor("counts", I64, ["u"])], [zero])


def _found_feed(rng: np.random.Generator, size: int) -> Feed:
    x = rng.integers(-2, 3, max(1, size)).astype(np.float32)
    x[: rng.integers(0, len(x) + 1)] = 0 if rng.random() < 0.5 else 1
    return {"x": x}


def _dtypes() -> bytes:
    """Numbers of many kinds, side by side."""
    names = {"d": F64, "h": F16, "i": I64, "j": I32, "u": U8, "b": BOOL}
    nodes = [node("Identity", [name], [f"{name}_out"]) for name in names]
    inputs = [tensor(name, kind, ["n"]) for name, kind in names.items()]
    return _bytes(nodes, inputs, [tensor(f"{name}_out", kind, ["n"]) for name, kind in names.items()])


def _dtypes_feed(rng: np.random.Generator, size: int) -> Feed:
    x = rng.standard_normal(size) * 50
    kinds = {"d": "f8", "h": "f2", "i": "i8", "j": "i4"}
    feed = {name: x.astype(kind) for name, kind in kinds.items()}
    return feed | {"u": np.abs(x).astype("u1"), "b": x > 0}


def _scalars() -> bytes:
    """No dimensions, and an initializer that a feed may override."""
    nodes = [node("Mul", ["x", "w"], ["y"]), node("Shape", ["x"], ["shape"])]
    inputs = [tensor("x", F), tensor("w", F, [])]
    return _bytes(nodes, inputs, [tensor("y", F), tensor("shape", I64)], [constant("w", np.float32(3))])


def _scalars_feed(rng: np.random.Generator, size: int) -> Feed:
    shape = [(), (1,), (2, 0, 3), (1, 1, 1), (4, 1, 2)][int(rng.integers(5))]
    feed: Feed = {"x": floats(rng, *shape)}
    return feed | ({"w": np.array(size, np.float32)} if rng.random() < 0.5 else {})


def _picked() -> bytes:
    """Fails where an index is too large."""
    ends = [tensor("x", F, ["n"]), tensor("i", I64, ["k"])]
    return _bytes([node("Gather", ["x", "i"], ["y"])], ends, [tensor("y", F, ["k"])])


def _picked_feed(rng: np.random.Generator, size: int) -> Feed:
    x = floats(rng, max(2, size))
    wrong = rng.random() < 0.15
    return {"x": x, "i": rng.integers(0, len(x), 3) + (2 * len(x) if wrong else 0)}


def _text() -> bytes:
    """Text, and which words there are: as many as there are."""
    nodes = [node("Identity", ["t"], ["same"]), node("Unique", ["t"], ["words", "first"])]
    outputs = [tensor("same", STR, ["n"]), tensor("words", STR, ["k"]), tensor("first", I64, ["k"])]
    return _bytes(nodes, [tensor("t", STR, ["n"])], outputs)


def _words(rng: np.random.Generator, count: int) -> np.ndarray:
    some = np.array(["", "a", "ä€𝄞", "word", "x" * 300, "tab\t\n"], object)
    return some[rng.integers(0, len(some), count)]


def _classes() -> bytes:
    """Labels as text, and ZipMap's list of dicts."""
    ml, names = "ai.onnx.ml", ["a", "ä", "c"]
    nodes = [
        node("ArgMax", ["x"], ["best"], axis=1, keepdims=0),
        node("LabelEncoder", ["best"], ["label"], domain=ml, keys_int64s=[0, 1, 2], values_strings=names),
        node("ZipMap", ["x"], ["maps"], domain=ml, classlabels_strings=names),
    ]
    inner = helper.make_map_type_proto(STR, helper.make_tensor_type_proto(F, None))
    maps = helper.make_value_info("maps", helper.make_sequence_type_proto(inner))
    return _bytes(nodes, [tensor("x", F, ["n", 3])], [tensor("label", STR, ["n"]), maps])


def _mapped() -> bytes:
    """From a dict."""
    kind = helper.make_map_type_proto(STR, helper.make_tensor_type_proto(F, []))
    nodes = [node("DictVectorizer", ["m"], ["y"], domain="ai.onnx.ml", string_vocabulary=["a", "b", "ä"])]
    return _bytes(nodes, [helper.make_value_info("m", kind)], [tensor("y", F, [1, 3])])


def _mapped_feed(rng: np.random.Generator, size: int) -> Feed:
    a, b = map(float, floats(rng, 2))
    return {"m": {"a": a, "b": b}}


def _sequences() -> bytes:
    """A sequence goes in and comes out; its length is a value."""
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(F, None))
    parts, more = helper.make_value_info("parts", kind), helper.make_value_info("more", kind)
    nodes = [
        node("SequenceInsert", ["parts", "x"], ["more"]),
        node("ConcatFromSequence", ["more"], ["all"], axis=0),
        node("SequenceLength", ["more"], ["length"]),
    ]
    outputs = [more, tensor("all", F, ["k"]), tensor("length", I64, [])]
    return _bytes(nodes, [parts, tensor("x", F, ["n"])], outputs)


def _sequences_feed(rng: np.random.Generator, size: int) -> Feed:
    parts = [floats(rng, int(n)) for n in rng.integers(0, max(2, size), rng.integers(1, 4))]
    return {"parts": parts, "x": floats(rng, size)}


def turns() -> bytes:
    """y = sin(x), ``n`` times: runs for as long as one likes."""
    body = helper.make_graph(
        [node("Sin", ["v"], ["w"]), node("Identity", ["go"], ["on"])],
        "body",
        [tensor("i", I64, []), tensor("go", BOOL, []), tensor("v", F, ["k"])],
        [tensor("on", BOOL, []), tensor("w", F, ["k"])],
    )
    loop = node("Loop", ["n", "", "x"], ["y"], body=body)
    return _bytes([loop], [tensor("n", I64, []), tensor("x", F, ["k"])], [tensor("y", F, ["k"])])


def _turns_feed(rng: np.random.Generator, size: int) -> Feed:
    return {"n": np.array(rng.integers(0, 40)), "x": floats(rng, max(1, size))}


def forever(rng: np.random.Generator) -> Feed:
    """A feed of :func:`turns` that ends when it is told to."""
    return {"n": np.array(1 << 60), "x": floats(rng, 4)}


@functools.cache
def kinds() -> dict[str, Kind]:
    """By name."""
    found = [
        Kind("plus", plus(3), lambda rng, size: {"x": floats(rng, size)}),
        Kind("negative", negative(), lambda rng, size: {"y": floats(rng, size)}),
        Kind("two", _two(), _two_feed),
        Kind("layers", layers(), lambda rng, size: {"x": floats(rng, size // 64 + 1, 64)}, 70_000),
        Kind("found", _found(), _found_feed, 70_000),
        Kind("dtypes", _dtypes(), _dtypes_feed, 70_000),
        Kind("scalars", _scalars(), _scalars_feed),
        Kind("picked", _picked(), _picked_feed),
        Kind("turns", turns(), _turns_feed, 4096),
        Kind("text", _text(), lambda rng, size: {"t": _words(rng, size + 1)}, 4096, False),
        Kind("classes", _classes(), lambda rng, size: {"x": floats(rng, size + 1, 3)}, 300, False),
        Kind("mapped", _mapped(), _mapped_feed, 1, False),
        Kind("sequences", _sequences(), _sequences_feed, 16_385, False),
    ]  # fmt: skip
    return {kind.name: kind for kind in found}


# --- the judge -------------------------------------------------------------------------------------------


def session_options(threads: int = 2) -> onnxruntime.SessionOptions:
    """Two threads, because ``run_async()`` needs them, which sleep between calls.  No model here sums in an
    order that depends on how many there are."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4
    return options


@functools.cache
def reference(name: str) -> onnxruntime.InferenceSession:
    """The model in this process, without threads of its own: the process forks."""
    return onnxruntime.InferenceSession(kinds()[name].data, session_options(1), providers=CPU)


def outputs_of(name: str) -> list[str]:
    return [end.name for end in reference(name).get_outputs()]


def expected(name: str, outputs: list[str] | None, feed: Mapping[str, Any]) -> Any:
    """What onnxruntime returns, or the exception that it raises."""
    try:
        return reference(name).run(outputs, plain(feed))
    except Exception as error:
        return error


def plain(value: Any) -> Any:
    """The same values in ordinary memory, as nobody else has it."""
    if isinstance(value, np.ndarray):
        return np.array(value, order="C", copy=True)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def difference(found: Any, wanted: Any, where: str = "result") -> str | None:
    """How the first value is not the second one, bit for bit; None: it is."""
    if type(found) is not type(wanted):
        return f"{where} is {_shown(found)}, not {_shown(wanted)}"
    if isinstance(wanted, Exception):
        return None if str(found) == str(wanted) else f"{where} says {str(found)!r}, not {str(wanted)!r}"
    if isinstance(wanted, np.ndarray):
        return _array_difference(found, wanted, where)
    if isinstance(wanted, list):
        if len(found) != len(wanted):
            return f"{where} has {len(found)} items, not {len(wanted)}"
        pairs = enumerate(zip(found, wanted, strict=True))
        return next((text for i, pair in pairs if (text := difference(*pair, f"{where}[{i}]"))), None)
    if isinstance(wanted, dict):
        if list(found) != list(wanted):
            return f"{where} has the keys {list(found)}, not {list(wanted)}"
        return next((t for k in wanted if (t := difference(found[k], wanted[k], f"{where}[{k!r}]"))), None)
    if isinstance(wanted, float):
        found, wanted = struct.pack("d", found), struct.pack("d", wanted)
    return None if found == wanted else f"{where} is {found!r}, not {wanted!r}"


def _array_difference(found: np.ndarray, wanted: np.ndarray, where: str) -> str | None:
    if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
        return f"{where} is {found.dtype}{found.shape}, not {wanted.dtype}{wanted.shape}"
    if wanted.dtype.kind == "O":
        return difference(found.tolist(), wanted.tolist(), where)
    ours, theirs = (np.frombuffer(array.tobytes(), np.uint8) for array in (found, wanted))
    if not (other := np.flatnonzero(ours != theirs)).size:
        return None
    at = int(other[0]) // wanted.itemsize
    values = found.reshape(-1)[at], wanted.reshape(-1)[at]
    return (
        f"{where}: {other.size} bytes of {ours.size} are others; first at {at}: {values[0]} for {values[1]}"
    )


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:200]!r}"
