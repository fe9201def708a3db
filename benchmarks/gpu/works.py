"""What is called, and what is asked of onnx-dl: microseconds more than in-process, or the ratio to it."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from onnx import helper, numpy_helper

from benchmarks.calls import ARENA, LOW, OURS
from benchmarks.gpu.machine import CUDA
from benchmarks.models import convolutions, identity, make_model
from benchmarks.report import ADDED
from onnx_dl import InferenceSessionProxy, ModelHost

RATIO: Final = "x"
# By heuristics, so that both sessions choose the same algorithm, and what they compute can be compared.
PROVIDERS: Final = [(CUDA, {"cudnn_conv_algo_search": "HEURISTIC"}), "CPUExecutionProvider"]


class Work(NamedTuple):
    """A model, its input ``x``, how many calls make a block.  ``asked``: the most, by way, in ``unit``."""

    key: str
    name: str
    model: bytes
    x: np.ndarray
    calls: int
    unit: str
    asked: dict[str, float]


def add_one(*shape: int) -> bytes:
    one = numpy_helper.from_array(np.ones(1, np.float32), "one")
    return make_model([helper.make_node("Add", ["x", "one"], ["y"])], {"x": shape}, {"y": shape}, [one])


def images(batch: int) -> bytes:
    """Images of 0.8 MB each through 16 convolutions."""
    return convolutions(layers=16, channels=64, size=256, batch=batch)


def works() -> dict[str, Work]:
    """By key, from small to large."""
    rng = np.random.default_rng(1)

    def data(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    made = (
        Work("tiny", "tiny Add, 1x16", add_one(1, 16), data(1, 16), 300, ADDED, {OURS: 25, LOW: 15}),
        Work(
            "5mb", "4.9 MB in and out", add_one(1, 3, 640, 640), data(1, 3, 640, 640), 40, RATIO,
            {OURS: 0.95, ARENA: 0.45},
        ),
        Work(
            "67mb", "67 MB in and out", add_one(16, 1024, 1024), data(16, 1024, 1024), 5, RATIO,
            {OURS: 0.95, ARENA: 0.25},
        ),
        Work(
            "conv", "convolutions, batch 1", images(1), data(1, 3, 256, 256), 50, RATIO,
            {OURS: 1.1, LOW: float("inf")},
        ),
        Work(
            "conv16", "convolutions, batch 16", images(16), data(16, 3, 256, 256), 10, RATIO,
            {OURS: 1.02, ARENA: 0.9},
        ),
    )  # fmt: skip
    return {work.key: work for work in made}


def session_of(model: bytes | str, options: Any = None) -> Any:
    """A session in-process."""
    import onnxruntime

    return onnxruntime.InferenceSession(model, options, PROVIDERS)


def proxy_of(
    model: bytes | str,
    host: ModelHost,
    *,
    options: Any = None,
    latency: str = "auto",
    group: str | None = None,
) -> InferenceSessionProxy:
    return InferenceSessionProxy(model, options, PROVIDERS, host=host, latency=latency, group=group)


def another(number: int) -> bytes:
    """Small models that differ."""
    return identity((1, 16 + number))
