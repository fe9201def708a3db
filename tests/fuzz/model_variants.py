"""Models that the load cache takes, in all forms in which they are given, and options that they load with."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, helper

from tests.support import zoo
from tests.support.zoo import BOOL, I64, F, build, constant, node, tensor

WIDTH: Final = 1024
"""Of weights of 4 MiB."""
ROWS: Final = 2
"""Of every feed, because one of the options says so."""


def _weights(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return zoo.floats(rng, *shape) / np.float32(shape[-1] ** 0.5)


def _ends() -> tuple[list[Any], list[Any]]:
    return [tensor("x", F, ["n", WIDTH])], [tensor("y", F, ["n", WIDTH])]


def _layers(rng: np.random.Generator, width: int = WIDTH) -> ModelProto:
    nodes = [
        node("MatMul", ["x", "w0"], ["a"]),
        node("Add", ["a", "b"], ["c"]),
        node("Relu", ["c"], ["d"]),
        node("Gemm", ["d", "w1"], ["e"], transB=1),
        node("MatMul", ["e", "w2"], ["y"]),
    ]
    weights = [constant(f"w{i}", _weights(rng, WIDTH, WIDTH)) for i in range(3)]
    return build(nodes, *_ends(), [*weights, constant("b", zoo.floats(rng, WIDTH))])


def _large(rng: np.random.Generator) -> ModelProto:
    """One of 40 MiB."""
    nodes = [node("MatMul", ["x", "wide"], ["a"]), node("Slice", ["a", "from", "to", "axis"], ["y"])]
    numbers = {"from": [3], "to": [3 + WIDTH], "axis": [1]}
    ints = [constant(name, np.int64(value)) for name, value in numbers.items()]
    return build(nodes, *_ends(), [constant("wide", _weights(rng, WIDTH, 10 * WIDTH)), *ints])


def _mixed(rng: np.random.Generator) -> ModelProto:
    """Bytes, half floats and folded constants."""
    nodes = [
        node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
        node("MatMulInteger", ["q", "bytes", "zero"], ["i"]),
        node("Cast", ["i"], ["f"], to=F),
        node("Mul", ["f", "scale"], ["g"]),
        node("Cast", ["half"], ["h"], to=F),
        node("Mul", ["h", "two"], ["k"]),
        node("MatMul", ["g", "k"], ["y"]),
    ]
    weights = [
        constant("bytes", rng.integers(0, 255, (WIDTH, 4 * WIDTH), dtype=np.uint8)),
        constant("half", _weights(rng, 4 * WIDTH, WIDTH).astype(np.float16)),
        constant("two", np.float32(2)),
    ]
    return build(nodes, *_ends(), weights)


def _convolution(rng: np.random.Generator) -> ModelProto:
    nodes = [
        node("Reshape", ["x", "image"], ["a"]),
        node("Conv", ["a", "kernel", "bias"], ["b"], pads=[1, 1, 1, 1]),
        node("Relu", ["b"], ["c"]),
        node("Conv", ["c", "back"], ["d"]),
        node("Reshape", ["d", "flat"], ["y"]),
    ]
    weights = [
        constant("kernel", _weights(rng, 1024, 256, 3, 3)),
        constant("bias", zoo.floats(rng, 1024)),
        constant("back", _weights(rng, 256, 1024, 1, 1)),
        constant("image", np.int64([-1, 256, 2, 2])),
        constant("flat", np.int64([-1, WIDTH])),
    ]
    return build(nodes, *_ends(), weights)


def _branches(rng: np.random.Generator) -> ModelProto:
    """Weights in the graphs of an If."""

    def branch(name: str) -> Any:
        weights = constant(f"{name}_w", _weights(rng, WIDTH, WIDTH))
        result = tensor(f"{name}_y", F, ["n", WIDTH])
        return helper.make_graph(
            [node("MatMul", ["x", f"{name}_w"], [f"{name}_y"])], name, [], [result], [weights]
        )

    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("ReduceSum", ["a"], ["sum"], keepdims=0),
        node("Greater", ["sum", "zero"], ["positive"]),
        node("If", ["positive"], ["b"], then_branch=branch("yes"), else_branch=branch("no")),
        node("Add", ["a", "b"], ["y"]),
    ]
    return build(
        nodes, *_ends(), [constant("w", _weights(rng, WIDTH, WIDTH)), constant("zero", np.float32(0))]
    )


def _turns(rng: np.random.Generator) -> ModelProto:
    """A Loop whose body has weights of its own, and uses those around it."""
    body = helper.make_graph(
        [
            node("MatMul", ["state", "inner"], ["a"]),
            node("MatMul", ["a", "outer"], ["b"]),
            node("Tanh", ["b"], ["next"]),
            node("Identity", ["go"], ["on"]),
        ],
        "body",
        [tensor("turn", I64, []), tensor("go", BOOL, []), tensor("state", F, None)],
        [tensor("on", BOOL, []), tensor("next", F, None)],
        [constant("inner", _weights(rng, WIDTH, WIDTH))],
    )
    nodes = [node("Loop", ["count", "", "x"], ["y"], body=body)]
    weights = [constant("outer", _weights(rng, WIDTH, WIDTH)), constant("count", np.int64(3))]
    return build(nodes, *_ends(), [*weights, constant("more", _weights(rng, 8))])


def _recurrent(rng: np.random.Generator) -> ModelProto:
    nodes = [
        node("Unsqueeze", ["x", "first"], ["a"]),
        node("LSTM", ["a", "w", "r"], ["", "h", ""], hidden_size=WIDTH // 2),
        node("Squeeze", ["h", "first"], ["b"]),
        node("Concat", ["b", "b"], ["y"], axis=1),
    ]
    half = WIDTH // 2
    weights = [
        constant("w", _weights(rng, 1, 4 * half, WIDTH)),
        constant("r", _weights(rng, 1, 4 * half, half)),
    ]
    return build(nodes, *_ends(), [*weights, constant("first", np.int64([0]))])


KINDS: Final[dict[str, Callable[[np.random.Generator], ModelProto]]] = {
    "layers": _layers, "large": _large, "mixed": _mixed, "convolution": _convolution, "branches": _branches,
    "turns": _turns, "recurrent": _recurrent,
}  # fmt: skip


class How(NamedTuple):
    """Options; ``cached``: whether the load cache takes models with them."""

    attributes: dict[str, Any] = {}
    config: dict[str, str] = {}
    providers: Any = ("CPUExecutionProvider",)
    rows: bool = False
    cached: bool = True


_LEVELS = onnxruntime.GraphOptimizationLevel
HOWS: Final[dict[str, How]] = {
    "default": How(),
    "unoptimized": How({"graph_optimization_level": _LEVELS.ORT_DISABLE_ALL}),
    "basic": How({"graph_optimization_level": _LEVELS.ORT_ENABLE_BASIC}),
    "extended": How({"graph_optimization_level": _LEVELS.ORT_ENABLE_EXTENDED}),
    "parallel": How({"execution_mode": onnxruntime.ExecutionMode.ORT_PARALLEL, "inter_op_num_threads": 2}),
    "no arena": How({"enable_cpu_mem_arena": False, "enable_mem_pattern": False}),
    "providers": How(providers=(("CPUExecutionProvider", {"arena_extend_strategy": "kSameAsRequested"}),)),
    "denormals": How(config={"session.set_denormal_as_zero": "1"}),
    "rows": How(rows=True, cached=False),
    "unpacked": How(config={"session.disable_prepacking": "1"}, cached=False),
    "quantized": How(config={"session.qdqisint8allowed": "1"}, cached=False),
}
FORMS: Final = ("path", "external", "bytes", "link")


class Expected(NamedTuple):
    """What in-process onnxruntime answers, and says of the model."""

    answers: list[tuple[zoo.Feed, Any]]
    said: list[Any]


class Variant(NamedTuple):
    """A model in one of the forms, with options."""

    kind: str
    form: str
    how: str
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind} as {self.form}, {self.how}"

    @property
    def is_cached(self) -> bool:
        return HOWS[self.how].cached

    @property
    def has_files(self) -> bool:
        return self.form != "bytes"

    @property
    def providers(self) -> list[Any]:
        return list(HOWS[self.how].providers)

    def options(self) -> onnxruntime.SessionOptions:
        how = HOWS[self.how]
        options = zoo.session_options(1)
        for name, value in how.attributes.items():
            setattr(options, name, value)
        for name, value in how.config.items():
            options.add_session_config_entry(name, value)
        if how.rows:
            options.add_free_dimension_override_by_name("n", ROWS)
        return options

    def source(self, folder: Path) -> str | bytes:
        """What a session is made of."""
        path = self._file(folder)
        return path.read_bytes() if self.form == "bytes" else str(path)

    def _file(self, folder: Path) -> Path:
        return folder / f"{self.kind}-{self.form}-{self.seed}.onnx"

    def write(self, folder: Path) -> None:
        """Writes the model, if it is not there."""
        path = self._file(folder)
        if path.exists():
            return
        model = KINDS[self.kind](np.random.default_rng(self.seed))
        external = self.form == "external"  # there, another seed is another file of weights and no more
        helper.set_model_props(model, {"kind": self.kind} | ({} if external else {"seed": str(self.seed)}))
        target = path.with_suffix(".target") if self.form == "link" else path
        onnx.save(model, target, save_as_external_data=external, location=f"{path.name}.data")
        if self.form == "link":
            path.symlink_to(target.name)

    def expected(self, folder: Path) -> Expected:
        return _expected(self, folder)

    @staticmethod
    def said_by(session: Any) -> list[Any]:
        """Names, types, shapes, metadata, providers."""
        ends = [[n.name, n.type, list(n.shape)] for n in (*session.get_inputs(), *session.get_outputs())]
        meta = session.get_modelmeta()
        return [
            ends,
            dict(meta.custom_metadata_map),
            meta.graph_name,
            meta.producer_name,
            session.get_providers(),
        ]

    @contextlib.contextmanager
    def changed(self, folder: Path, rng: random.Random) -> Iterator[Variant]:
        """The files are those of another model meanwhile, by a rename or written in place."""
        other = self._replace(seed=1)
        other.write(folder)
        other.expected(folder)
        with contextlib.ExitStack() as stack:
            change = rng.choice([_renamed, _written])
            for file, new in zip(self._files(folder), other._files(folder), strict=True):
                stack.enter_context(change(file, new))
            yield other

    def _files(self, folder: Path) -> list[Path]:
        """Those that make the difference; of external data, the graph stays as it is."""
        path = self._file(folder)
        return {"external": [path.with_name(f"{path.name}.data")], "link": [path.with_suffix(".target")]}.get(
            self.form, [path]
        )


@contextlib.contextmanager
def _renamed(file: Path, new: Path) -> Iterator[None]:
    """Another file is there under the name, and then the old one again."""
    kept = file.with_name(f"{file.name}.kept")
    os.link(file, kept)
    shutil.copyfile(new, file.with_name("new"))
    os.replace(file.with_name("new"), file)
    try:
        yield
    finally:
        os.replace(kept, file)


@contextlib.contextmanager
def _written(file: Path, new: Path) -> Iterator[None]:
    """The file has other bytes, and then the old ones and the old time."""
    data, stat = file.read_bytes(), file.stat()
    shutil.copyfile(new, file)
    try:
        yield
    finally:
        file.write_bytes(data)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@functools.cache
def _expected(variant: Variant, folder: Path) -> Expected:
    session = onnxruntime.InferenceSession(
        variant.source(folder), variant.options(), providers=variant.providers
    )
    rng = np.random.default_rng(7)
    feeds = [{"x": zoo.floats(rng, ROWS, WIDTH)} for _ in range(2)]
    return Expected([(feed, session.run(None, feed)) for feed in feeds], variant.said_by(session))


_ALL: Final = list(itertools.starmap(Variant, itertools.product(KINDS, FORMS, HOWS)))
VARIANTS: Final = [variant for variant in _ALL if variant.is_cached]
PLAIN: Final = [variant for variant in _ALL if not variant.is_cached]
