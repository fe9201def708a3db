"""Results of inferences as answers: JSON, and binary tensors behind it as they lie in memory.  Pure."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from onnx_dl.server.http.answers import BINARY, JSON, HttpAnswer, Part
from onnx_dl.server.http.infer import Wanted
from onnx_dl.server.v2 import text
from onnx_dl.server.v2.bounds import AT_ONCE_TEXTS, AT_ONCE_VALUES
from onnx_dl.server.v2.datatypes import BYTES
from onnx_dl.server.v2.json_outputs import check_output, not_json
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


def takes_long(response: InferResponse, wanted: Wanted) -> bool:
    """True if :func:`infer_answer` would keep an event loop waiting."""
    values = texts = 0
    for output in response.outputs:
        if output.array is None:
            continue
        if output.datatype == BYTES:
            texts += output.array.size
        elif not wanted.binary(output.name):
            values += output.array.size
    return values > AT_ONCE_VALUES or texts > AT_ONCE_TEXTS


def binary_data(output: OutputTensor) -> Part:
    """An output in the protocol's binary form: a view of its memory, but for text."""
    array = output.array
    assert array is not None
    if output.datatype == BYTES:
        return text.encode(array)
    return array.reshape(-1).view(np.uint8).data


def json_data(output: OutputTensor) -> list[Any] | msgspec.Raw:
    """An output's items in JSON's types, flat; of many, their JSON.  Numbers read back equal."""
    array = output.array
    assert array is not None
    check_output(output)
    flat = array.ravel()
    if flat.size <= AT_ONCE_VALUES:
        return _items(output, flat)
    # In steps: each is one of C, in which no other thread runs, and makes an object of each item.
    parts = [
        msgspec.json.encode(_items(output, flat[begin : begin + AT_ONCE_VALUES]))[1:-1]
        for begin in range(0, flat.size, AT_ONCE_VALUES)
    ]
    return msgspec.Raw(b"[" + b",".join(parts) + b"]")


def _items(output: OutputTensor, flat: NDArray[Any]) -> list[Any]:
    items: list[Any] = flat.tolist()
    if output.datatype != BYTES:
        return items
    try:
        return [item if isinstance(item, str) else bytes(item).decode() for item in items]
    except UnicodeDecodeError:
        raise not_json(output.name, "has bytes that are not UTF-8") from None
