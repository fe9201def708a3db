"""Runs a model once before anybody waits for its results.

The first run is slower than later ones: memory is allocated, kernels are chosen.  A failed warm-up leaves a
usable model, so it only prints a line on stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import numpy as np

from onnx_dl.core.spec import ModelSpec, Warmup
from onnx_dl.core.status import ModelDescription, TensorSpec
from onnx_dl.workers.engines import base as members
from onnx_dl.workers.engines.base import Array, Backend, CancelToken, Feed


def run_all(
    backend: Backend,
    spec: ModelSpec,
    description: ModelDescription,
    warmups: Mapping[str, Mapping[str, Warmup]],
) -> None:
    """Runs the model, or each loaded member of a group, once; prints failures on stderr.

    ``warmups``: inputs by key of the model.
    """
    for member in spec.members or [spec]:
        if member.key in warmups and member.key not in description.failed:
            described = description.members.get(member.key, description)
            try:
                feed: Feed = {name: array_of(warmup) for name, warmup in warmups[member.key].items()}
                members.member(backend, member.key).run(None, feed, None, CancelToken())
            except Exception as error:  # the inputs may be wrong; that says nothing about the model
                print(complaint(member.name, described.inputs, error), file=sys.stderr, flush=True)


def array_of(warmup: Warmup) -> Array:
    """Makes the array.

    Raises:
        TypeError: numpy has no such dtype.
        ValueError: the shape is impossible, or ``fill`` is not of the dtype.
        MemoryError: it is too large.
    """
    dtype = np.dtype(object if warmup.dtype == "str" else warmup.dtype)
    fill = str(warmup.fill) if dtype.kind == "O" else warmup.fill
    return np.full(warmup.shape, fill, dtype)


def complaint(name: str, inputs: list[TensorSpec], error: Exception) -> str:
    """Returns one line that tells what to change."""
    takes = ", ".join(f"{spec.name}: {spec.type} {spec.shape}" for spec in inputs)
    why = " ".join(f"{type(error).__name__}: {error}".split())
    return (
        f"onnx-dl: the warm-up of {name} failed ({why}). The model is ready anyway; give its warm-up a "
        f"dtype, shape and fill for each of its inputs: {takes}."
    )
