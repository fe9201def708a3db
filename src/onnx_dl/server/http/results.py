"""Results of inferences as answers: JSON, and binary tensors behind it as they lie in memory.  Pure."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from onnx_dl.server.http.answers import BINARY, JSON, HttpAnswer, Part
from onnx_dl.server.http.infer import Wanted
from onnx_dl.server.v2.datatypes import BYTES
from onnx_dl.server.v2.failures import RequestFailure, invalid
from onnx_dl.server.v2.messages import InferResponse, OutputTensor


def infer_answer(response: InferResponse, wanted: Wanted) -> HttpAnswer:
    """The answer with a result.  Arrays stay where they are until it is sent.

    Raises:
        RequestFailure: 400: an output cannot be written in JSON; the client can ask for binary data.
    """
    parts: list[Part] = [b""]
    outputs = []
    is_binary = False
    for output in response.outputs:
        entry: dict[str, Any] = {
            "name": output.name, "datatype": output.datatype, "shape": output.shape,
        }  # fmt: skip
        if output.array is not None:
            if wanted.binary(output.name):
                data = binary_data(output)
                entry["parameters"] = {"binary_data_size": len(data)}
                parts.append(data)
                is_binary = True
            else:
                entry["data"] = json_data(output)
        outputs.append(entry)
    body: dict[str, Any] = {"id": response.id} if response.id else {}
    body |= {"model_name": response.model, "model_version": response.version}
    if response.parameters:
        body["parameters"] = response.parameters
    body["outputs"] = outputs
    parts[0] = json = msgspec.json.encode(body)
    if not is_binary:
        return HttpAnswer(200, parts, JSON)
    return HttpAnswer(200, parts, BINARY, [(b"Inference-Header-Content-Length", b"%d" % len(json))])


def binary_data(output: OutputTensor) -> Part:
    """An output in the protocol's binary form: a view of its memory, but for text."""
    array = output.array
    assert array is not None
    if output.datatype == BYTES:
        return _text_bytes(array)
    return array.reshape(-1).view(np.uint8).data


def _text_bytes(array: NDArray[Any]) -> bytes:
    parts: list[bytes] = []
    for item in array.ravel().tolist():
        data = item.encode() if isinstance(item, str) else bytes(item)
        parts += (struct.pack("<I", len(data)), data)
    return b"".join(parts)


def json_data(output: OutputTensor) -> list[Any]:
    """An output's items in JSON's types, flat.  Numbers read back equal."""
    array = output.array
    assert array is not None
    if output.datatype in ("FP16", "BF16"):
        raise _not_json(output.name, f"is {output.datatype}, which JSON does not have")
    if output.datatype == BYTES:
        try:
            return [
                item if isinstance(item, str) else bytes(item).decode() for item in array.ravel().tolist()
            ]
        except UnicodeDecodeError:
            raise _not_json(output.name, "has bytes that are not UTF-8") from None
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise _not_json(output.name, "has values that are not finite")
    items: list[Any] = array.ravel().tolist()
    return items


def _not_json(name: str, why: str) -> RequestFailure:
    return invalid(f"Output {name!r} {why}.  Ask for binary_data.")
