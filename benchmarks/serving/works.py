"""What is served, and each server's folder with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from benchmarks.models import Case, cases

HERE: Final = Path(__file__).parent
INPUT, OUTPUT, DATATYPE = "x", "y", "FP32"


class Work(NamedTuple):
    """A model with one input and one output of FP32.  ``shape`` is the input's."""

    name: str
    title: str
    model: bytes
    shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    threads: int

    def told(self) -> dict[str, Any]:
        """What a client needs to know."""
        return {"name": self.name, "shape": self.shape, "output_shape": self.output_shape}


_OUTPUTS: Final = {
    "tiny": (1, 16),
    "5mb": (1, 3, 480, 480),
    "conv": (1, 32, 1, 1),
    "64mb": (16, 1024, 1024),
}


def _work(case: Case) -> Work:
    return Work(case.key, case.name, case.model, case.feed[INPUT].shape, _OUTPUTS[case.key], case.threads)


def works(names: Sequence[str]) -> dict[str, Work]:
    """By name: tiny, 5mb, conv, 64mb."""
    made = cases()
    return {name: _work(made[name]) for name in names}


def _dims(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))


def _tensors(work: Work) -> str:
    def one(kind: str, name: str, shape: Sequence[int]) -> str:
        return f'{kind} [ {{ name: "{name}" data_type: TYPE_{DATATYPE} dims: [ {_dims(shape)} ] }} ]\n'

    return one("input", INPUT, work.shape) + one("output", OUTPUT, work.output_shape)


def _parameter(key: str, value: object) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'


def for_onnx_dl(folder: Path, served: Sequence[Work]) -> None:
    """Triton's layout; the number of threads is named as Triton's backend for onnxruntime names it."""
    for work in served:
        place = folder / work.name / "1"
        place.mkdir(parents=True)
        (place / "model.onnx").write_bytes(work.model)
        text = 'backend: "onnxruntime"\n' + _tensors(work)
        (place.parent / "config.pbtxt").write_text(
            text + _parameter("intra_op_thread_count", work.threads) + _parameter("onnx_dl.ttl", "30m")
        )


def for_triton(folder: Path, served: Sequence[Work]) -> None:
    """The Python backend around onnxruntime: ``nvidia-pytriton`` brings no other."""
    for work in served:
        place = folder / work.name / "1"
        place.mkdir(parents=True)
        (place / "model.onnx").write_bytes(work.model)
        shutil.copy(HERE / "triton_model.py", place / "model.py")
        text = 'backend: "python"\n' + _tensors(work)
        (place.parent / "config.pbtxt").write_text(text + _parameter("threads", work.threads))


def for_mlserver(folder: Path, served: Sequence[Work]) -> None:
    """A runtime of our own, ``mlserver_runtime``, around onnxruntime."""
    for work in served:
        place = folder / work.name
        place.mkdir(parents=True)
        (place / "model.onnx").write_bytes(work.model)
        settings = {
            "name": work.name,
            "implementation": "mlserver_runtime.OnnxRuntime",
            "parameters": {"uri": "model.onnx", "extra": {"threads": work.threads}},
        }
        (place / "model-settings.json").write_text(json.dumps(settings))
