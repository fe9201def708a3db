"""The demo's models and samples, and the maker of its large model. Needs numpy and the standard library only.

The files lie in the folder ``assets`` beside this module; ``examples/train_models.py`` makes them.

- ``digits.onnx``: handwritten digits; a neural network; outputs two plain tensors.
- ``wine.onnx``: wine cultivars; a random forest; outputs a string tensor and (ZipMap) a list of dicts.
- ``diabetes.onnx``: disease progression; scaler and gradient boosting; outputs one float tensor.
- ``large.onnx``: stacked random layers whose weights are external data, written by `make_large_model`.
- ``samples.npz``: rows the first three models were not trained on, with the true answers.

Each function raises FileNotFoundError if a file is missing (a broken or zipped installation).
"""

import os
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

SMALL_MODELS = ("digits", "wine", "diabetes")
"""Names of the trained models: those `load_samples` has samples for."""

LARGE_MODEL = "large"
"""Name of the model whose weights `make_large_model` writes."""

SAMPLES_FILE = "samples.npz"

# The shape of the large model: every layer is Tanh(MatMul(x, W)), W being float32 [LARGE_WIDTH, LARGE_WIDTH].
LARGE_WIDTH = 1024
LARGE_LAYERS = 50
LARGE_SEED = 20240229
LARGE_DATA_FILE = "large.bin"
# 4 MiB, so every weight starts on a page boundary of any common platform and can be memory-mapped.
LARGE_WEIGHT_BYTES = LARGE_WIDTH * LARGE_WIDTH * np.dtype(np.float32).itemsize
LARGE_DATA_BYTES = LARGE_LAYERS * LARGE_WEIGHT_BYTES


class Samples(NamedTuple):
    """Held-out rows of one model's data set: none of them was used to train the model."""

    input_name: str
    """The name of the model's only input."""
    inputs: NDArray[np.float32]
    """Rows to feed, [rows, features], in the units of the data set."""
    targets: NDArray[Any]
    """The true answers, [rows], comparable with the model's first output flattened: int64 digits, unicode
    class names of wine, float32 diabetes scores (a unitless measure of progression, 25 to 346)."""
    class_names: tuple[str, ...]
    """The classes in the order of the model's probabilities; empty for a regression."""


def model_path(name: str) -> Path:
    """Return the path of a model that comes with the package.

    Args:
        name: one of `SMALL_MODELS`, or `LARGE_MODEL`, which needs the weights of `make_large_model` to load.

    Raises:
        ValueError: the demo has no model of that name.
    """
    known = (*SMALL_MODELS, LARGE_MODEL)
    if name not in known:
        raise ValueError(f"the demo has no model {name!r}; it has {', '.join(known)}")
    return _asset(f"{name}.onnx")


def load_samples() -> dict[str, Samples]:
    """Return the held-out samples of every model in `SMALL_MODELS`, by model name."""
    with np.load(_asset(SAMPLES_FILE), allow_pickle=False) as stored:
        return {
            name: Samples(
                input_name=str(stored[f"{name}.input_name"]),
                inputs=stored[f"{name}.inputs"],
                targets=stored[f"{name}.targets"],
                class_names=tuple(stored[f"{name}.class_names"].tolist()),
            )
            for name in SMALL_MODELS
        }


def make_large_model(directory: Path, progress: Callable[[int, int], None] | None = None) -> Path:
    """Write the large model and its weights (`LARGE_DATA_BYTES` bytes, 200 MiB) into a directory.

    The model takes ``X``, float32 [N, LARGE_WIDTH], and gives ``Y`` of the same shape and type, every value
    within -1 to 1. The weights are seeded random numbers. They are written under a temporary name, and the
    model file comes last, so where this function has put a model its weights are complete, and a process
    that has older weights mapped keeps them.

    Args:
        directory: where to write; made, with its parents, if missing. An earlier call's files are replaced.
        progress: called after each weight with (bytes written so far, bytes in all).

    Returns:
        The path of the model file in `directory`.

    Raises:
        OSError: the directory cannot be made or written, or the disk is full.
        Exception: that of `progress`.  No partial weights remain after any of these.
    """
    source = model_path(LARGE_MODEL)
    directory.mkdir(parents=True, exist_ok=True)
    # With the process id, two processes that fill one directory write two files, not one file twice.
    partial = directory / f"{LARGE_DATA_FILE}.{os.getpid()}.partial"
    try:
        with partial.open("wb") as file:
            _write_large_weights(file, progress)
        partial.replace(directory / LARGE_DATA_FILE)
    finally:
        partial.unlink(missing_ok=True)
    return Path(shutil.copyfile(source, directory / source.name))


def _write_large_weights(file: BinaryIO, progress: Callable[[int, int], None] | None) -> None:
    """Write the layers' weights, float32 little-endian, in order; one layer in memory at a time."""
    generator = np.random.default_rng(LARGE_SEED)
    # Uniform weights of variance 1 / LARGE_WIDTH: smaller ones make the signal vanish layer by layer, and
    # larger ones make the network chaotic, so that rounding alone would give other outputs on another device.
    limit = np.float32(np.sqrt(3 / LARGE_WIDTH))
    for layer in range(1, LARGE_LAYERS + 1):
        weight = generator.random((LARGE_WIDTH, LARGE_WIDTH), dtype=np.float32)
        weight = (weight * 2 - 1) * limit
        file.write(weight.astype("<f4", copy=False).data)
        if progress is not None:
            progress(layer * LARGE_WEIGHT_BYTES, LARGE_DATA_BYTES)


def _asset(file_name: str) -> Path:
    """Return the path of a file in the folder ``assets``."""
    # A real path, since onnxruntime opens models by path.
    path = Path(str(files("onnx_dl.demo") / "assets" / file_name))
    if not path.is_file():
        raise FileNotFoundError(f"the demo's file {path} is missing; reinstall onnx_dl, unzipped")
    return path
