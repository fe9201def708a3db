"""The ONNX backend's own test cases: models and inputs, as the onnx package has them."""

from __future__ import annotations

import dataclasses
import functools
import random
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import ModelProto, TensorProto, TypeProto
from onnx.backend.test.case import node
from onnx.backend.test.loader import DATA_DIR

from tests.support.onnx_values import feedable, ort_value

FOLDERS = ("simple", "pytorch-operator", "pytorch-converted")
IR_VERSION, OPSET = 10, 26
"""What onnxruntime 1.31 reads.  onnx says newer ones, mostly for operators that have not changed since."""


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A model, and a value for each of its inputs."""

    name: str
    model: ModelProto
    values: dict[str, Any]

    @functools.cached_property
    def blob(self) -> bytes:
        """The model as both sessions get it."""
        model = ModelProto()
        model.CopyFrom(self.model)
        model.ir_version = min(model.ir_version, IR_VERSION)
        for opset in model.opset_import:
            if opset.domain in ("", "ai.onnx"):
                opset.version = min(opset.version, OPSET)
        return model.SerializeToString()

    @functools.cached_property
    def kinds(self) -> dict[str, TypeProto]:
        """The declared type of each input."""
        return {info.name: info.type for info in self.model.graph.input}

    @property
    def feed(self) -> dict[str, Any]:
        """As ``run`` takes it."""
        return {name: feedable(value) for name, value in self.values.items()}

    @functools.cached_property
    def ort_feed(self) -> dict[str, onnxruntime.OrtValue]:
        """As ``run_with_ort_values`` takes it."""
        return {name: ort_value(feedable(value), self.kinds[name]) for name, value in self.values.items()}

    @property
    def group(self) -> str:
        """What is special about it, so that a sample can have something of everything."""
        graph = self.model.graph
        kinds = [info.type for info in (*graph.input, *graph.output)]
        special = {kind.WhichOneof("value") for kind in kinds} - {"tensor_type"}
        if special:
            return sorted(special)[0]
        elements = {kind.tensor_type.elem_type for kind in kinds}
        if TensorProto.STRING in elements:
            return "string"
        return "narrow" if any(e >= TensorProto.BFLOAT16 for e in elements) else "plain"


@functools.cache
def cases() -> list[Case]:
    """All that the onnx package has: those that its code makes, and those in its files.  Takes 5 s."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own arithmetic
        np.random.seed(0)
        made = node.collect_testcases(None)
    return [_made(case) for case in made] + [_read(folder) for folder in _folders()]


def _made(case: Any) -> Case:
    (inputs, _), *_ = case.data_sets
    names = [info.name for info in case.model.graph.input]
    return Case(case.name, case.model, dict(zip(names, inputs, strict=False)))


def _folders() -> Iterable[Path]:
    return sorted(model.parent for kind in FOLDERS for model in Path(DATA_DIR, kind).glob("*/model.onnx"))


def _read(folder: Path) -> Case:
    model = onnx.load(folder / "model.onnx")
    protos = {"sequence_type": onnx.SequenceProto, "optional_type": onnx.OptionalProto}
    values = {}
    for i, info in enumerate(model.graph.input):
        file = folder / "test_data_set_0" / f"input_{i}.pb"
        if file.exists():
            value = protos.get(info.type.WhichOneof("value"), TensorProto)()
            value.ParseFromString(file.read_bytes())
            values[info.name] = value
    return Case(f"{folder.parent.name}/{folder.name}", model, values)


def sample(count: int, seed: int) -> list[Case]:
    """About as many cases of each group, by chance but always the same."""
    groups: dict[str, list[Case]] = {}
    for case in cases():
        groups.setdefault(case.group, []).append(case)
    share = -(-count // len(groups))
    rng = random.Random(seed)
    rare = [case for name in sorted(groups) if name != "plain" for case in _some(groups[name], share, rng)]
    return rare + _some(groups["plain"], count - len(rare), rng)


def _some(of: list[Case], count: int, rng: random.Random) -> list[Case]:
    return rng.sample(of, min(count, len(of)))
