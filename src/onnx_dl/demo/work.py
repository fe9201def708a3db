"""The demo's work, the same for a proxy and for onnxruntime: predict samples and count correct results."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from onnx_dl.demo.assets import LARGE_WIDTH, load_samples

LARGE_BATCHES = (1, 64, 512, 16)
Array = NDArray[Any]


class Session(Protocol):
    """The part of ``onnxruntime.InferenceSession`` that the work uses."""

    def run(self, output_names: None, input_feed: dict[str, Array]) -> list[Any]: ...


class WorkResult(NamedTuple):
    """The results of one model.

    ``quality``: the result on held-out samples in words; ``digest``: equal for equal outputs; ``load``:
    seconds of the load, measured by the caller of :func:`predict`.
    """

    model: str
    quality: str
    example: str
    digest: str
    load: float = 0.0


def predict(name: str, session: Session) -> WorkResult:
    """Runs all held-out samples of a small model in one batch."""
    samples = load_samples()[name]
    feed = {samples.input_name: samples.inputs}
    outputs = session.run(None, feed)
    predicted = np.asarray(outputs[0]).ravel()
    return WorkResult(
        model=name,
        quality=_quality(predicted, samples.targets),
        example=f"predicted {_label(predicted[0])}, true {_label(samples.targets[0])}",
        digest=_digest(outputs),
    )


def churn(session: Session) -> WorkResult:
    """Runs the large model on batches of several sizes, which fragments the heap."""
    rng = np.random.default_rng(0)
    outputs = []
    for batch in LARGE_BATCHES:
        data = rng.standard_normal((batch, LARGE_WIDTH), dtype=np.float32)
        outputs.append(session.run(None, {"X": data})[0])
    shape = "x".join(map(str, outputs[-1].shape))
    return WorkResult(
        model="large",
        quality=f"batches of {', '.join(map(str, LARGE_BATCHES))}",
        example=f"result {shape}, mean {outputs[-1].mean():+.5f}",
        digest=_digest(outputs),
    )


def _quality(predicted: Array, targets: Array) -> str:
    if targets.dtype.kind == "f":
        residual = ((targets - predicted) ** 2).sum() / ((targets - targets.mean()) ** 2).sum()
        return f"R2 {1 - residual:.2f} on {len(targets)} samples"
    right = int((predicted == targets).sum())
    return f"{right} of {len(targets)} samples right"


def _label(value: object) -> str:
    return f"{value:.0f}" if isinstance(value, float | np.floating) else str(value)


def _digest(outputs: list[Any]) -> str:
    """A digest that is equal for outputs that are equal bit for bit."""
    digest = hashlib.sha256()
    for output in outputs:
        plain = isinstance(output, np.ndarray) and output.dtype.kind != "O"
        digest.update(output.tobytes() if plain else repr(output).encode())
    return digest.hexdigest()
