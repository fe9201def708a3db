"""Bodies of requests to infer, as inferences.  Pure.

Only what is of HTTP and JSON is checked here.  Names, types, shapes and the values of the protocol's
parameters are checked where the inference is made.

Source: the Open Inference Protocol, Triton's extensions of binary tensors, parameters and shared memory.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Final, NamedTuple

import msgspec

from onnx_dl.server.http.depth import check_json
from onnx_dl.server.http.head import json_too_large
from onnx_dl.server.http.limits import JSON_BYTES, JSON_DEPTH
from onnx_dl.server.interfaces import Served, TensorInfo
from onnx_dl.server.v2 import text
from onnx_dl.server.v2.datatypes import BYTES, SIZES
from onnx_dl.server.v2.failures import invalid
from onnx_dl.server.v2.messages import InferRequest, InputTensor, RegionSlice, RequestedOutput


class _Tensor(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: list[Any] | None = None
    parameters: dict[str, Any] | None = None


class _Output(msgspec.Struct):
    name: str
    parameters: dict[str, Any] | None = None


class _Sent(msgspec.Struct):
    inputs: list[_Tensor]
    id: str = ""
    outputs: list[_Output] | None = None
    parameters: dict[str, Any] | None = None


class Wanted(NamedTuple):
    """Forms in which the outputs go back.  ``by_name`` overrides ``is_binary``."""

    is_binary: bool
    by_name: dict[str, bool]

    def binary(self, name: str) -> bool:
        return self.by_name.get(name, self.is_binary)


_KEPT_BYTES: Final = 1024
"""Bytes of JSON whose layout is kept, because the next request may have the same."""
_DECODER: Final = msgspec.json.Decoder(_Sent)
_MOST_NAMED: Final = 4096
"""Inputs, outputs, parameters of one request: each costs microseconds in which nothing else is done."""
_SHM: Final = "shared_memory_region"
_SOURCES: Final[tuple[str, ...]] = ("binary_data_size", _SHM)


class _Layout(NamedTuple):
    """Content of a request's JSON.  ``inputs``: data of a slice are those bytes of the body.  Requests
    share it: nobody changes it."""

    id: str
    inputs: list[tuple[str, str, tuple[int, ...], slice | list[Any] | RegionSlice, dict[str, Any]]]
    outputs: list[RequestedOutput]
    parameters: dict[str, Any]
    wanted: Wanted

    def request(self, model: str, version: str, body: memoryview) -> InferRequest:
        inputs = [
            InputTensor(name, datatype, shape, body[data] if type(data) is slice else data, parameters)
            for name, datatype, shape, data, parameters in self.inputs
        ]
        return InferRequest(
            model, version, self.id, inputs, self.outputs, self.parameters,
            nbytes=len(body), is_binary=self.wanted.is_binary,
        )  # fmt: skip


def read_request(
    model: str, version: str, body: memoryview, header_length: int | None
) -> tuple[InferRequest, Wanted]:
    """Read a body: JSON, and behind it the binary tensors, which are not copied.

    Raises:
        RequestFailure: 400; 413: too much JSON.
    """
    end = json_length(body, header_length)
    if end > len(body):
        raise invalid(f"Inference-Header-Content-Length is {end}, the body has {len(body)} bytes.")
    if end > JSON_BYTES:
        raise json_too_large(JSON_BYTES)
    is_kept = header_length is not None and end <= _KEPT_BYTES
    read = _kept_layout if is_kept else _layout
    layout = read(bytes(body[:end]), len(body), header_length is not None, model)
    return layout.request(model, version, body), layout.wanted


def json_length(body: memoryview, header_length: int | None) -> int:
    """Bytes of the JSON in a body; more than the body has if its head lies."""
    return len(body) if header_length is None else header_length


def _layout(json: bytes, nbytes: int, has_binary: bool, model: str) -> _Layout:
    """The layout of a body of ``nbytes`` that begins with this JSON.  Raises RequestFailure."""
    sent = _decode(json)
    parameters = _parameters(sent.parameters, "The request")
    reader = _Inputs(nbytes, len(json), has_binary, model)
    inputs = [reader.read(tensor) for tensor in sent.inputs]
    reader.end()
    is_binary = _flag(parameters, "binary_data_output", "The request")
    outputs = [_requested(output, is_binary) for output in sent.outputs or ()]
    wanted = Wanted(is_binary, {output.name: output.is_binary for output in outputs})
    return _Layout(sent.id, inputs, outputs, parameters, wanted)


_kept_layout: Final = functools.lru_cache(128)(_layout)
"""Clients send the same JSON for each call, if the tensors are binary."""


def _decode(json: bytes) -> _Sent:
    check_json(json, JSON_DEPTH)
    try:
        sent = _DECODER.decode(json)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise invalid(f"The request is not valid: {error}") from None
    except RecursionError:
        raise invalid("The JSON of the request is nested too deeply.") from None
    if max(len(sent.inputs), len(sent.outputs or ()), len(sent.parameters or ())) > _MOST_NAMED:
        raise invalid(f"The request has more than {_MOST_NAMED} inputs, outputs or parameters.")
    return sent


class _Inputs:
    """Reads inputs in the order in which they were sent, and finds their bytes behind the JSON."""

    def __init__(self, nbytes: int, at: int, has_binary: bool, model: str) -> None:
        self._nbytes = nbytes
        self._at = at
        self._has_binary = has_binary
        self._model = model

    def read(
        self, tensor: _Tensor
    ) -> tuple[str, str, tuple[int, ...], slice | list[Any] | RegionSlice, dict[str, Any]]:
        whose = f"Input {tensor.name!r}"
        parameters = _parameters(tensor.parameters, whose)
        sources = [name for name in _SOURCES if name in parameters]
        if tensor.data is not None:
            sources.append("data")
        if len(sources) != 1:
            raise invalid(f"{whose} needs one of data, binary_data_size and shared_memory_region.")
        data: slice | list[Any] | RegionSlice
        if sources[0] == "data":
            assert tensor.data is not None
            data = tensor.data
        elif sources[0] == _SHM:
            data = _region(parameters, whose)
        else:
            data = self._binary(whose, _count(parameters, "binary_data_size", whose))
        return tensor.name, tensor.datatype, tuple(tensor.shape), data, parameters

    def _binary(self, whose: str, nbytes: int) -> slice:
        if not self._has_binary:
            raise invalid(f"{whose} is binary, and the header Inference-Header-Content-Length is missing.")
        begin, end = self._at, self._at + nbytes
        if end > self._nbytes:
            raise invalid(
                f"{whose} has a binary_data_size of {nbytes}, and {self._nbytes - begin} bytes follow "
                f"(model {self._model!r})."
            )
        self._at = end
        return slice(begin, end)

    def end(self) -> None:
        """Raises RequestFailure if bytes are left."""
        if self._at != self._nbytes:
            raise invalid(
                f"The body has {self._nbytes - self._at} bytes more than its inputs (model {self._model!r})."
            )


def _requested(output: _Output, is_binary: bool) -> RequestedOutput:
    whose = f"Output {output.name!r}"
    parameters = _parameters(output.parameters, whose)
    region = _region(parameters, whose) if _SHM in parameters else None
    binary = _flag(parameters, "binary_data", whose, is_binary and region is None)
    if binary and region is not None:
        raise invalid(f"{whose} has both shared_memory_region and binary_data.")
    return RequestedOutput(output.name, region, binary, parameters)


def _region(parameters: dict[str, Any], whose: str) -> RegionSlice:
    name = parameters[_SHM]
    if not isinstance(name, str):
        raise invalid(f"{whose}: shared_memory_region is not text.")
    if "shared_memory_byte_size" not in parameters:
        raise invalid(f"{whose}: shared_memory_region needs shared_memory_byte_size.")
    nbytes = _count(parameters, "shared_memory_byte_size", whose)
    return RegionSlice(name, _count(parameters, "shared_memory_offset", whose), nbytes)


def _parameters(sent: dict[str, Any] | None, whose: str) -> dict[str, Any]:
    """Parameters are text, numbers and truth values."""
    if not sent:
        return {}
    for name, value in sent.items():
        if not isinstance(value, str | int | float):
            raise invalid(f"{whose}: the parameter {name!r} is not text, a number, true or false.")
        if name.startswith("triton_"):
            raise invalid(f"{whose}: names of parameters that begin with triton_ are reserved.")
    return sent


def _flag(parameters: dict[str, Any], name: str, whose: str, default: bool = False) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise invalid(f"{whose}: {name} is not true or false.")
    return value


def _count(parameters: dict[str, Any], name: str, whose: str) -> int:
    value = parameters.get(name, 0)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise invalid(f"{whose}: {name} is not a number of bytes.")
    return value


def header_timeout(value: bytes | None) -> float | None:
    """Seconds of the header ``X-Request-Timeout-Ms``; None: it was not sent."""
    if value is None:
        return None
    if not value.isdigit() or len(value) > 15 or not int(value):
        raise invalid("X-Request-Timeout-Ms is not a number of milliseconds.")
    return int(value) / 1e3


def read_raw_request(served: Served, version: str, body: memoryview) -> tuple[InferRequest, Wanted]:
    """Read a body that is nothing but the bytes of the only input: one row if the model has a batch.

    Raises:
        RequestFailure: 400: the model has more inputs, or the shape does not follow from the size.
    """
    if len(served.inputs) != 1:
        raise invalid(f"Model {served.name!r} has {len(served.inputs)} inputs; a raw request has one.")
    (info,) = served.inputs
    shape = raw_shape(info, len(body), has_batch=served.max_batch_size > 0)
    data: memoryview | bytes = body
    if info.datatype == BYTES:
        data = text.encode([body])
    tensor = InputTensor(info.name, info.datatype, shape, data)
    request = InferRequest(served.name, version, "", [tensor], [], {}, nbytes=len(body))
    return request, Wanted(True, {})


def raw_shape(info: TensorInfo, nbytes: int, *, has_batch: bool) -> tuple[int, ...]:
    """The shape of an input of which only the size is known."""
    if info.is_unranked:
        raise invalid(
            f"The shape of {info.name!r} does not follow from the size of a raw request: the model does not "
            "say how many dimensions it has."
        )
    shape = [1, *info.shape[1:]] if has_batch else list(info.shape)
    free = [axis for axis, size in enumerate(shape) if size < 0]
    if info.datatype == BYTES:
        if [size if size >= 0 else 1 for size in shape[has_batch:]] != [1]:
            raise invalid(f"A raw request needs an input of one text; {info.name!r} has another shape.")
        return (1,) * len(shape)
    if len(free) > 1:
        raise invalid(f"The shape of {info.name!r} does not follow from the size of a raw request.")
    row = math.prod(size for size in shape if size >= 0) * SIZES[info.datatype]
    if free:
        if not row or nbytes % row:
            raise invalid(f"{nbytes} bytes are no {info.datatype} tensor of shape {info.shape}.")
        shape[free[0]] = nbytes // row
    return tuple(shape)
