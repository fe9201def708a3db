"""Results of a run as tensors of the protocol."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from onnx_dl.server.inference import memory
from onnx_dl.server.inference.checks import Signature
from onnx_dl.server.inference.preparation import Prepared
from onnx_dl.server.v2 import datatypes
from onnx_dl.server.v2.datatypes import BYTES
from onnx_dl.server.v2.failures import internal
from onnx_dl.server.v2.messages import InferRequest, OutputTensor
from onnx_dl.tensors.foreign import Written

_DATATYPES: Final[dict[np.dtype[Any], str]] = {
    dtype: name for name in datatypes.SIZES if (dtype := datatypes.to_numpy(name)) is not None
}


def tensor_of(prepared: Prepared, name: str, value: object, request: InferRequest) -> OutputTensor:
    """Return the tensor of one result, which is written to its region if it has one.

    Raises:
        RequestFailure: 500: the model gave no tensor, or one of a type that the protocol does not have.
            400: the region has no room for it.
    """
    if type(value) is Written:
        where = next(output.region for output in request.outputs if output.name == name)
        datatype = _datatype(prepared.signature, name, value.dtype)
        return OutputTensor(name, datatype, value.shape, None, where)
    tensor = array_tensor(prepared.signature, name, value)
    if (copy := prepared.copies.get(name)) is not None:
        return memory.write(tensor, *copy)
    return tensor


def array_tensor(signature: Signature, name: str, value: object) -> OutputTensor:
    """Return the tensor of one result that is an array; raises like :func:`tensor_of`."""
    if type(value) is not np.ndarray:
        raise internal(f"output '{name}' of model '{signature.model}' is no tensor")
    array: NDArray[Any] = value
    return OutputTensor(name, _datatype(signature, name, array.dtype), array.shape, array)


def _datatype(signature: Signature, name: str, dtype: np.dtype[Any]) -> str:
    datatype = _DATATYPES.get(dtype)
    if datatype is None:
        if dtype.kind != "O":
            raise internal(
                f"output '{name}' of model '{signature.model}' has the type {dtype}, which the protocol does "
                "not have"
            )
        return BYTES
    if datatype == "UINT16" and (info := signature.outputs.get(name)) is not None:
        return info.datatype  # BF16 has the same size, and numpy has no dtype for it
    return datatype
