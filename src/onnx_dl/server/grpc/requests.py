"""A ModelInferRequest as an ``InferRequest``."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

from google.protobuf.message import DecodeError

from onnx_dl.server.grpc import typed, wire
from onnx_dl.server.grpc.messages import Message, ModelInferRequest
from onnx_dl.server.v2.failures import RequestFailure, invalid, passed
from onnx_dl.server.v2.messages import InferRequest, InputTensor, RegionSlice, RequestedOutput

LARGE: Final = 64 << 10
"""Bytes from which on copies of a request cost more than our own look at it."""
_EXPENSIVE: Final = 1 << 20
"""Bytes without raw tensors from which on requests are read one at a time: a parser's objects take up to 16
times that, and Python's more."""
_LONGEST_WAIT: Final = 60.0
_MOST_SIZES: Final = 64
"""Sizes of a shape, as in numpy."""
_one_at_a_time: Final = threading.Lock()
EMPTY_FINAL: Final = "triton_enable_empty_final_response"
"""The one parameter of the prefix ``triton_`` that clients may set.  Each of our answers is a final one, so
there is nothing to enable."""

_REGION: Final = "shared_memory_region"
_SIZE: Final = "shared_memory_byte_size"
_OFFSET: Final = "shared_memory_offset"


def read(
    data: bytes, time_left: float | None, find: Callable[[str, str], object] | None = None
) -> InferRequest:
    """The request in the bytes of a message.

    Args:
        time_left: seconds that the call has; None: no limit.
        find: called with the model's name and version before memory is made for its inputs.  May raise.

    Raises:
        RequestFailure: 400: the bytes are no ModelInferRequest, or contradict themselves.
    """
    request = _large(data, time_left, find) if len(data) >= LARGE else _read(data, None, time_left, find)
    request.nbytes = len(data)
    return request


def _large(data: bytes, time_left: float | None, find: Callable[[str, str], object] | None) -> InferRequest:
    try:
        rest, raw = wire.split(data)
    except wire.WireError as error:
        raise _no_message(error) from error
    if len(rest) <= _EXPENSIVE:
        return _read(rest, raw, time_left, find)
    if not _one_at_a_time.acquire(timeout=_LONGEST_WAIT if time_left is None else time_left):
        raise passed("the call's deadline passed while other requests with large typed tensors were read")
    try:
        return _read(rest, raw, time_left, find)
    finally:
        _one_at_a_time.release()


def _read(
    data: bytes,
    raw: list[memoryview] | None,
    time_left: float | None,
    find: Callable[[str, str], object] | None,
) -> InferRequest:
    """``raw``: what was taken out of ``data``; None: nothing was."""
    try:
        message = ModelInferRequest.FromString(data)
    except DecodeError as error:
        raise _no_message(error) from error
    if find is not None:
        find(message.model_name, message.model_version)
    if raw is None:
        raw = [memoryview(item) for item in message.raw_input_contents]
    parameters = parameters_of(message.parameters) if message.parameters else {}
    return InferRequest(
        message.model_name,
        message.model_version,
        message.id,
        _inputs(message, raw),
        [_output(output) for output in message.outputs],
        parameters,
        _timeout(parameters, time_left),
    )


def _no_message(error: Exception) -> RequestFailure:
    return invalid(f"the message is not a ModelInferRequest: {error}")


def parameters_of(values: Message) -> dict[str, Any]:
    """Parameters as Python's values.

    Args:
        values: a map of text to ``InferParameter`` or ``ModelRepositoryParameter``.
    """
    found = {}
    for name, value in values.items():
        choice = value.WhichOneof("parameter_choice")
        if choice is None:
            raise invalid(f"the parameter '{name}' has no value")
        found[name] = getattr(value, choice)
    return found


def id_of(data: bytes) -> str:
    """The ``id`` of a request that was refused, so that its client knows which; empty: it cannot be read,
    or only at great expense."""
    try:
        rest = data if len(data) < LARGE else wire.split(data)[0]
        found: str = ModelInferRequest.FromString(rest).id if len(rest) <= _EXPENSIVE else ""
    except (wire.WireError, DecodeError):
        return ""
    return found


def _timeout(parameters: dict[str, Any], time_left: float | None) -> float | None:
    for name in parameters:
        if name.startswith("triton_") and name != EMPTY_FINAL:
            raise invalid(
                "parameter keys starting with 'triton_' are reserved for Triton usage. "
                f"Only the following keys starting with 'triton_' are allowed: {EMPTY_FINAL}"
            )
    if not isinstance(parameters.get(EMPTY_FINAL, False), bool):
        raise invalid(f"invalid value type for '{EMPTY_FINAL}' parameter, expected bool_param.")
    if "timeout" not in parameters:
        return time_left
    microseconds = parameters["timeout"]
    if type(microseconds) is not int or microseconds < 0:
        raise invalid(
            "invalid value for 'timeout' parameter, expected int64_param of microseconds, at least 0."
        )
    if not microseconds:
        return time_left
    return microseconds / 1e6 if time_left is None else min(microseconds / 1e6, time_left)


def _inputs(message: Message, raw: list[memoryview]) -> list[InputTensor]:
    inputs = []
    following = iter(raw)
    used = 0
    for tensor in message.inputs:
        name = tensor.name
        if len(tensor.shape) > _MOST_SIZES:
            raise _about(message, name, f"more than {_MOST_SIZES} sizes in the shape of input")
        parameters = parameters_of(tensor.parameters) if tensor.parameters else {}
        has_contents = tensor.HasField("contents")
        data: memoryview | bytes | RegionSlice | None = _region(parameters, f"input '{name}'")
        if data is not None:
            if has_contents:
                raise _about(
                    message, name, "unexpected 'content' provided when using shared memory for input"
                )
        elif has_contents:
            if raw:
                raise _about(
                    message, name, "contents field must not be specified when using raw_input_contents for"
                )
            data = typed.to_bytes(name, tensor.datatype, tensor.shape, tensor.contents)
        else:
            data = next(following, None)
            used += 1
            if data is None:
                raise _about(message, name, "unable to find data for input tensor")
        inputs.append(InputTensor(name, tensor.datatype, tuple(tensor.shape), data, parameters))
    if len(raw) != used and raw:
        raise invalid(
            f"raw_input_contents has {len(raw)} items, and {used} inputs need one, "
            f"for model '{message.model_name}'"
        )
    return inputs


def _about(message: Message, name: str, what: str) -> RequestFailure:
    return invalid(f"{what} '{name}' for model '{message.model_name}'")


def _output(output: Message) -> RequestedOutput:
    parameters = parameters_of(output.parameters) if output.parameters else {}
    region = _region(parameters, f"output '{output.name}'")
    return RequestedOutput(output.name, region, True, parameters)


def _region(parameters: dict[str, Any], what: str) -> RegionSlice | None:
    """The slice that the parameters name; None: they name none.  Takes them out of the parameters."""
    if not parameters:
        return None
    region = parameters.pop(_REGION, None)
    nbytes = parameters.pop(_SIZE, None)
    offset = parameters.pop(_OFFSET, None)
    if region is None:
        if nbytes is None and offset is None:
            return None
        raise invalid(f"{_SIZE} and {_OFFSET} of {what} need {_REGION}")
    if nbytes is None:
        raise invalid(f"{_SIZE} must be specified when using shared memory for {what}")
    if not isinstance(region, str) or not region:
        raise invalid(f"{_REGION} of {what} must be a name")
    offset = 0 if offset is None else offset
    for name, value in ((_SIZE, nbytes), (_OFFSET, offset)):
        if type(value) is not int or value < 0:
            raise invalid(f"{name} of {what} must be a number of bytes, at least 0")
    return RegionSlice(region, offset, nbytes)
