"""Results of a run as tensors of the protocol."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from onnx_dl.server.inference.checks import Signature
from onnx_dl.server.v2 import datatypes
from onnx_dl.server.v2.datatypes import BYTES
from onnx_dl.server.v2.failures import internal
from onnx_dl.server.v2.messages import OutputTensor

_DATATYPES: Final[dict[np.dtype[Any], str]] = {
    dtype: name for name in datatypes.SIZES if (dtype := datatypes.to_numpy(name)) is not None
}


def tensor_of(signature: Signature, name: str, value: object) -> OutputTensor:
    """Return the tensor of one result.

    Raises:
        RequestFailure: 500: the model gave no tensor, or one of a type that the protocol does not have.
    """
    if type(value) is not np.ndarray:
        raise internal(f"output '{name}' of model '{signature.model}' is no tensor")
    array: NDArray[Any] = value
    datatype = _DATATYPES.get(array.dtype)
    if datatype is None:
        if array.dtype.kind != "O":
            raise internal(
                f"output '{name}' of model '{signature.model}' has the type {array.dtype}, which the "
                "protocol does not have"
            )
        datatype = BYTES
    elif datatype == "UINT16" and (info := signature.outputs.get(name)) is not None:
        datatype = info.datatype  # BF16 has the same size, and numpy has no dtype for it
    return OutputTensor(name, datatype, array.shape, array)
