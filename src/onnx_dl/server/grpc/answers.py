"""An ``InferResponse`` as the bytes of a message.  Pure.

    ModelInferResponse       = model_name 1, model_version 2, id 3, parameters 4, outputs 5,
                               raw_output_contents 6
    ModelStreamInferResponse = error_message 1, infer_response 2

Fields may stand in any order.  What answers of one model have in common is encoded once.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from onnx_dl.server.grpc import wire
from onnx_dl.server.grpc.messages import Message, ModelInferResponse
from onnx_dl.server.v2 import text
from onnx_dl.server.v2.datatypes import BYTES
from onnx_dl.server.v2.failures import internal
from onnx_dl.server.v2.messages import InferResponse, OutputTensor

_ID, _RAW = 3, 6
_ERROR, _ANSWER = 1, 2
_LARGEST: Final = 0x7FFFFFFF
"""Bytes of a message; protobuf has no larger ones."""

_SMALL: Final = 4 << 10
"""Bytes of an array that are copied sooner than a view of them is made."""


def encode(response: InferResponse) -> bytes:
    """A ModelInferResponse.  Each tensor is copied once.

    Raises:
        RequestFailure: 500: the answer is larger than a message can be.
    """
    return b"".join(_parts(response, is_final=False))


def encode_streamed(response: InferResponse) -> bytes:
    """A ModelStreamInferResponse with this answer, which is the last one of its request."""
    parts = _parts(response, is_final=True)
    return b"".join((wire.head(_ANSWER, wire.nbytes(parts)), *parts))


def encode_failed(reason: str, request_id: str) -> bytes:
    """A ModelStreamInferResponse that says why a request failed."""
    answer = wire.field(_ID, request_id.encode()) if request_id else b""
    return wire.field(_ERROR, reason.encode() or b"failed") + wire.field(_ANSWER, answer)


def _parts(response: InferResponse, *, is_final: bool) -> list[bytes | memoryview]:
    outputs = tuple((output.name, output.datatype, output.shape) for output in response.outputs)
    parameters = response.parameters
    if is_final:
        parameters = {**parameters, "triton_final_response": True}
    parts: list[bytes | memoryview] = [
        _common(
            response.model,
            response.version,
            outputs,
            tuple((key, type(value), value) for key, value in parameters.items()),
        )
    ]
    if response.id:
        parts.append(wire.field(_ID, response.id.encode()))
    for output in response.outputs:
        data = raw(output)
        # Outputs in a client's region have an empty item, so that the others are found by their place.
        parts += (wire.head(_RAW, len(data)), data)
    if (size := wire.nbytes(parts)) > _LARGEST - 64:
        raise internal(f"the answer has {size} bytes, and a message of gRPC has {_LARGEST} at most")
    return parts


def raw(output: OutputTensor) -> memoryview | bytes:
    """The output in the protocol's binary form; empty if it is in a client's region."""
    array = output.array
    if array is None or array.size == 0:
        return b""
    if output.datatype == BYTES:
        return text.encode(array)
    if array.nbytes < _SMALL and array.dtype.isnative:
        return array.tobytes()
    return _bytes(array).data


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """A view of the array's bytes; a copy if they are not contiguous, or of the other byte order."""
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


@functools.lru_cache(256)
def _common(
    model: str,
    version: str,
    outputs: tuple[tuple[str, str, tuple[int, ...]], ...],
    parameters: tuple[tuple[str, type, Any], ...],
) -> bytes:
    """The part of an answer that does not depend on the request's id and tensors."""
    message: Message = ModelInferResponse(model_name=model, model_version=version)
    for name, datatype, shape in outputs:
        message.outputs.add(name=name, datatype=datatype, shape=shape)
    for key, kind, value in parameters:  # the kind: as keys of the cache, 1 and True are one
        setattr(message.parameters[key], _KINDS[kind], value)
    encoded: bytes = message.SerializeToString()
    return encoded


_KINDS: Final = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
