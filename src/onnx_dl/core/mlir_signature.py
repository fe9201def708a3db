"""Signatures of onnx-mlir's models: parses them, and checks arrays against them.

Has the data types of its ABI and the JSON text of a signature.  Both are onnx-mlir's: the numbers are in its
include/onnx-mlir/Runtime/OnnxDataTypeMetaData.inc, the text is made in its
src/Conversion/ONNXToKrnl/ConvertONNXToKrnl.cpp.  Pure; used on both sides of the process boundary.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from onnx_dl.core.status import TensorSpec
from onnx_dl.core.types import Array, PlainDict

_TABLE: Final = (
    # OM_DATA_TYPE, in a signature, ONNX's name, numpy's name
    (1, "f32", "float", "float32"),
    (2, "ui8", "uint8", "uint8"),
    (3, "i8", "int8", "int8"),
    (4, "ui16", "uint16", "uint16"),
    (5, "i16", "int16", "int16"),
    (6, "i32", "int32", "int32"),
    (7, "i64", "int64", "int64"),
    (9, "i1", "bool", "bool"),
    (10, "f16", "float16", "float16"),
    (11, "f64", "double", "float64"),
    (12, "ui32", "uint32", "uint32"),
    (13, "ui64", "uint64", "uint64"),
    (14, "complex<f32>", "complex64", "complex64"),
    (15, "complex<f64>", "complex128", "complex128"),
)

DTYPES: Final = {number: np.dtype(name) for number, _, _, name in _TABLE}
"""numpy's dtype for each OM_DATA_TYPE that numpy has: all but STRING (8) and BFLOAT16 (16)."""
NUMBERS: Final = {dtype: number for number, dtype in DTYPES.items()}
_TYPES: Final = {mlir: f"tensor({onnx})" for _, mlir, onnx, _ in _TABLE}
_OF_TYPE: Final = {f"tensor({onnx})": np.dtype(name) for _, _, onnx, name in _TABLE}


@functools.lru_cache(64)
def parse(signature: str) -> tuple[TensorSpec, ...] | None:
    """The tensors of a signature; None: not valid JSON, as onnx-mlir does not quote types such as bf16."""
    try:
        return tuple(_spec(item) for item in json.loads(signature))
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return None


def _spec(item: PlainDict) -> TensorSpec:
    if "seq" in item:
        inner = _spec(item["seq"])
        return TensorSpec(inner.name, f"seq({inner.type})", [])
    kind = str(item["type"])
    # A dimension that may be of any size is -1, or in later versions the name that the model gives it.
    shape = [None if size == -1 else size for size in item["dims"]]
    return TensorSpec(str(item.get("name", "")), _TYPES.get(kind, f"tensor({kind})"), shape)


def check_types(inputs: Sequence[object]) -> None:
    """Raises TypeError if these are no arrays, or of dtypes that the ABI has no name for."""
    if not isinstance(inputs, list | tuple):
        raise TypeError(f"run() takes a list of numpy arrays, not {_kind(inputs)}.")
    for index, value in enumerate(inputs):
        if not isinstance(value, np.ndarray):
            raise TypeError(f"inputs[{index}] is {_kind(value)}; an onnx-mlir model takes numpy arrays.")
        if value.dtype not in NUMBERS:
            known = ", ".join(dtype.name for dtype in NUMBERS)
            raise TypeError(
                f"inputs[{index}] has dtype {value.dtype!s} ({value.dtype.str}), which an onnx-mlir model "
                f"cannot be given; it takes, in the machine's byte order: {known}."
            )


def check(specs: Sequence[TensorSpec] | None, inputs: Sequence[Array]) -> None:
    """Compares inputs with what a signature says.

    A compiled model does not (onnx-mlir's --verifyInputTensors is off by default): it would read past the end
    of arrays that are too small.

    Raises:
        ValueError: there are too many, too few, or of a shape that the model was not compiled for.
        TypeError: one has a dtype with another meaning of its bytes.
    """
    if specs is None:
        return
    if len(inputs) != len(specs):
        names = ", ".join(spec.name for spec in specs)
        raise ValueError(f"The model takes {len(specs)} inputs ({names}), but was given {len(inputs)}.")
    for index, (spec, array) in enumerate(zip(specs, inputs, strict=True)):
        _check_one(index, spec, array)


def no_entry(model: str, name: str | None, known: Iterable[str]) -> str:
    """Error message for an entry point that a model does not have."""
    what = "no default entry point" if name is None else f"no entry point {name!r}"
    return f"{model} has {what}; it has: {', '.join(known)}."


def _check_one(index: int, spec: TensorSpec, array: Array) -> None:
    wanted = _OF_TYPE.get(spec.type)
    what = f"inputs[{index}] ({spec.name}) is {array.dtype}{list(array.shape)}"
    takes = f"but the model takes {spec.type} of shape {spec.shape}".replace("None", "?")
    if wanted is not None and _kin(wanted) != _kin(array.dtype):
        raise TypeError(f"{what}, {takes}.")
    # A tensor of no known rank is written like a scalar: [].
    if spec.shape and not _fits(spec.shape, array.shape):
        raise ValueError(f"{what}, {takes}.")


def _kin(dtype: np.dtype[np.generic]) -> tuple[str, int]:
    """Kind and size of a dtype.  All integers are of one kind: older signatures have no signedness."""
    return "i" if dtype.kind in "biu" else dtype.kind, dtype.itemsize


def _fits(wanted: Sequence[int | str | None], shape: Sequence[int]) -> bool:
    return len(wanted) == len(shape) and all(
        size == given for size, given in zip(wanted, shape, strict=True) if isinstance(size, int)
    )


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
