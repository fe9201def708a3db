"""Outputs that are answered in JSON: what it cannot say of them.  Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np

from onnx_dl.server.v2.bounds import MOST_VALUES
from onnx_dl.server.v2.datatypes import BYTES
from onnx_dl.server.v2.failures import RequestFailure, invalid, too_large
from onnx_dl.server.v2.messages import InferRequest, OutputTensor

BINARY_ONLY: Final = frozenset(("FP16", "BF16"))
"""Datatypes that JSON does not have."""


def check_datatype(name: str, datatype: str) -> None:
    """Raise RequestFailure (400) if JSON does not have the datatype."""
    if datatype in BINARY_ONLY:
        raise not_json(name, f"is {datatype}, which JSON does not have")


def check_outputs(request: InferRequest, tensors: Iterable[OutputTensor]) -> None:
    """Check the outputs of a response that are to be answered in JSON.

    Raises:
        RequestFailure: 400: JSON does not have a datatype, or a value.  413: there are too many values.
    """
    left = MOST_VALUES
    for tensor in tensors:
        if tensor.array is None or is_binary(request, tensor.name):
            continue
        left -= tensor.array.size
        if left < 0:
            raise too_large(
                f"The outputs have more than {MOST_VALUES} values, which is the most in JSON.  Ask for "
                "binary_data."
            )
        check_output(tensor)


def is_binary(request: InferRequest, name: str) -> bool:
    """True if an output goes back as bytes."""
    for output in request.outputs:
        if output.name == name:
            return output.is_binary
    return request.is_binary


def check_output(tensor: OutputTensor) -> None:
    """Raise RequestFailure (400) if JSON does not have the datatype, or a value, of one output."""
    check_datatype(tensor.name, tensor.datatype)
    array = tensor.array
    assert array is not None
    if tensor.datatype != BYTES and array.dtype.kind == "f" and not np.isfinite(array).all():
        raise not_json(tensor.name, "has values that are not finite")


def not_json(name: str, why: str) -> RequestFailure:
    """Return the failure for an output that JSON cannot say."""
    return invalid(f"Output {name!r} {why}.  Ask for binary_data.")
