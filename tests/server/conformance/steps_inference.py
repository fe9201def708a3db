"""Inferences that succeed."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from tests.server.conformance.clients import Kit
from tests.server.conformance.models import TYPES
from tests.server.conformance.plain import post
from tests.server.conformance.registry import pair, row, step


@step
def infer(kit: Kit) -> Any:
    return kit.infer("simple", pair(kit))


@step
def infer_with_an_id(kit: Kit) -> Any:
    return kit.infer("simple", pair(kit), request_id="my request")


@step
def infer_a_version(kit: Kit) -> Any:
    return [kit.infer("versions", pair(kit), model_version=version) for version in ("1", "3", "")]


@step
def infer_some_outputs(kit: Kit) -> Any:
    return kit.infer("simple", pair(kit), outputs=[kit.output("OUTPUT1")])


@step
def infer_a_batch(kit: Kit) -> Any:
    return kit.infer("simple", pair(kit, 8))


@step
def infer_text(kit: Kit) -> Any:
    rows = np.array([["a"], ["ä β 漢"], [""]], dtype=np.object_)
    return kit.infer("text", [kit.input("INPUT", rows, "BYTES")])


def _values(datatype: str, shape: tuple[int, int]) -> np.ndarray:
    count = shape[0] * shape[1]
    if datatype == "BYTES":
        return np.array([f"t{i}" for i in range(count)], dtype=np.object_).reshape(shape)
    if datatype == "BOOL":
        return (np.arange(count) % 2 == 0).reshape(shape)
    kind = {"FP16": "float16", "FP32": "float32", "FP64": "float64"}.get(datatype, datatype.lower())
    values = np.arange(count, dtype=kind).reshape(shape)
    if np.issubdtype(values.dtype, np.integer):
        values.flat[-1:] = np.iinfo(values.dtype).max
        values.flat[:1] = np.iinfo(values.dtype).min
    return values


@step
def infer_all_datatypes(kit: Kit) -> Any:
    inputs = [kit.input(f"x_{name}", _values(name, (2, 3)), name) for name in TYPES]
    return kit.infer("types", inputs)


@step
def infer_empty_tensors(kit: Kit) -> Any:
    inputs = [kit.input(f"x_{name}", _values(name, (0, 3)), name) for name in TYPES]
    return kit.infer("types", inputs)


@step
def infer_json(kit: Kit) -> Any:
    if not kit.is_http:
        return None
    outputs = [kit.output(f"OUTPUT{i}", binary_data=False) for i in range(2)]
    return kit.infer("simple", pair(kit, binary_data=False), outputs=outputs)


@step
def infer_json_and_binary_mixed(kit: Kit) -> Any:
    if not kit.is_http:
        return None
    inputs = [kit.input(f"INPUT{i}", row(i), "INT32", binary_data=bool(i)) for i in range(2)]
    outputs = [kit.output("OUTPUT1", binary_data=False), kit.output("OUTPUT0", binary_data=True)]
    return kit.infer("simple", inputs, outputs=outputs)


@step
def infer_compressed(kit: Kit) -> Any:
    if not kit.is_http:
        return [kit.infer("simple", pair(kit), compression_algorithm=how) for how in ("gzip", "deflate")]
    return [
        kit.infer("simple", pair(kit), request_compression_algorithm=how, response_compression_algorithm=how)
        for how in ("gzip", "deflate")
    ]


@step
def infer_in_the_background(kit: Kit) -> Any:
    return None if kit.is_async else kit.async_infer("simple", pair(kit))


@step
def infer_over_a_stream(kit: Kit) -> Any:
    return None if kit.is_http else kit.streamed("simple", pair(kit), 3)


@step
def infer_an_error_over_a_stream(kit: Kit) -> Any:
    return None if kit.is_http else ["error" in one for one in kit.streamed("unknown", pair(kit), 2)]


@step
def infer_by_a_body_that_the_client_makes(kit: Kit) -> Any:
    if not kit.is_http:
        return None
    kit.used |= {"generate_request_body", "parse_response_body"}
    kind = type(kit.client)
    body, length = kind.generate_request_body(pair(kit))
    head = {} if length is None else {"Inference-Header-Content-Length": str(length)}
    status, headers, answer = post(kit.address, "/v2/models/simple/infer", body, head)
    length = headers.get("Inference-Header-Content-Length")
    result = kind.parse_response_body(answer, header_length=None if length is None else int(length))
    return [status, kit.told(result)]


@step
def infer_with_a_plugin(kit: Kit) -> Any:
    kit.used |= {"register_plugin", "unregister_plugin", "plugin"}
    kit.client.register_plugin(
        importlib.import_module(f"tritonclient.{kit.kind}.auth").BasicAuth("me", "word")
    )
    assert kit.client.plugin() is not None
    try:
        return kit.infer("simple", pair(kit))
    finally:
        kit.client.unregister_plugin()
