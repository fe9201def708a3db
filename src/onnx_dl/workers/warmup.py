"""One run of a model before anybody is waiting for its result.

The first run of a model is slower than later ones: memory is allocated, kernels are chosen.  A run that fails
leaves a model that can be used, so it says so on stderr and nothing more.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_dl.core.spec import ModelSpec, Warmup
from onnx_dl.core.status import ModelDescription, TensorSpec
from onnx_dl.workers.cancellation import Halt
from onnx_dl.workers.engines import base as members
from onnx_dl.workers.engines.base import Backend


def run_all(
    backend: Backend,
    spec: ModelSpec,
    description: ModelDescription,
    warmups: Mapping[str, Mapping[str, Warmup]],
) -> None:
    """Runs a model, or each member of a group that loaded, once with the inputs that its key has."""
    for member in spec.members or [spec]:
        if member.key in warmups and member.key not in description.failed:
            described = description.members.get(member.key, description)
            run(members.member(backend, member.key), member, described, warmups[member.key])


def run(
    backend: Backend, spec: ModelSpec, description: ModelDescription, inputs: Mapping[str, Warmup]
) -> None:
    """Runs the model once with these inputs; why it could not is said on stderr."""
    try:
        backend.run(None, {name: array_of(wanted) for name, wanted in inputs.items()}, None, Halt())
    except Exception as error:  # whatever is wrong with the warm-up, nothing is known to be with the model
        print(complaint(spec.name, description.inputs, error), file=sys.stderr, flush=True)


def array_of(wanted: Warmup) -> NDArray[Any]:
    """Raises:
    TypeError: numpy has no such dtype.
    ValueError: the shape cannot be, or ``fill`` is not of the dtype.
    MemoryError: it is too large.
    """
    dtype = np.dtype(object if wanted.dtype == "str" else wanted.dtype)
    fill = str(wanted.fill) if dtype.kind == "O" else wanted.fill
    return np.full(wanted.shape, fill, dtype)


def complaint(name: str, inputs: list[TensorSpec], error: Exception) -> str:
    """One line that tells what to mend."""
    takes = ", ".join(f"{spec.name}: {spec.type} {spec.shape}" for spec in inputs)
    why = " ".join(f"{type(error).__name__}: {error}".split())
    return (
        f"onnx-dl: the warm-up of {name} failed ({why}). The model is ready all the same; give its warm-up a "
        f"dtype, shape and fill for each of its inputs: {takes}."
    )
