"""Decides which steps of an inference would keep an event loop waiting: a thread does these.  Pure."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from onnx_dl.server.inference.preparation import Prepared
from onnx_dl.server.v2.bounds import AT_ONCE_BYTES, AT_ONCE_COPIED, AT_ONCE_TEXTS
from onnx_dl.server.v2.datatypes import BYTES
from onnx_dl.server.v2.messages import InferRequest, RegionSlice

_TEXTS_BYTES = 4 * AT_ONCE_TEXTS
"""Bytes of BYTES that have no more items."""


def has_long_inputs(request: InferRequest) -> bool:
    """True if the inputs take long to become arrays.  Shapes are not looked at: they may be lies."""
    for tensor in request.inputs:
        data = tensor.data
        if type(data) is list:
            if request.nbytes > AT_ONCE_BYTES:
                return True
            continue
        is_here = type(data) is RegionSlice
        nbytes = data.nbytes if isinstance(data, RegionSlice | memoryview) else len(data)
        if tensor.datatype == BYTES:
            if nbytes > _TEXTS_BYTES:
                return True
        elif nbytes > AT_ONCE_COPIED and (not is_here or tensor.datatype == "BF16"):
            return True
    return False


def has_long_results(prepared: Prepared, results: Iterable[object]) -> bool:
    """True if results that this process writes to regions take long to be written."""
    if not prepared.copies:
        return False
    for name, value in zip(prepared.names, results, strict=True):
        if name in prepared.copies and isinstance(value, np.ndarray):
            most = AT_ONCE_TEXTS if value.dtype.kind == "O" else AT_ONCE_COPIED // value.itemsize
            if value.size > most:
                return True
    return False
