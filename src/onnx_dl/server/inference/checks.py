"""Checks of a request against the inputs and outputs of the version that it is for.  Pure.

Messages have the words of Triton's where its clients may compare them.  Shapes are plain integers here, as
they were sent: nothing is allocated for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from onnx_dl.client.short_calls import Patience
from onnx_dl.server.interfaces import Served, TensorInfo
from onnx_dl.server.v2 import datatypes, json_outputs
from onnx_dl.server.v2.bounds import MOST_TEXTS
from onnx_dl.server.v2.failures import RequestFailure, invalid, too_large
from onnx_dl.server.v2.messages import InferRequest, InputTensor, RequestedOutput

_SEQUENCES: Final = ("sequence_id", "sequence_start", "sequence_end")
_MOST_DIMENSIONS: Final = 32
"""Dimensions of a tensor; numpy 1 has no more."""
_NOTE: Final = (
    ". The first dimension is the batch, because max_batch_size is above 0: it stands before those in the "
    "model's configuration"
)


class Signature:
    """Inputs and outputs of one version, prepared for the checks of many requests.

    ``is_known`` is False if neither is known: then onnxruntime alone decides.
    """

    __slots__ = (
        "binary_only",
        "entry",
        "has_bfloat16",
        "inputs",
        "is_known",
        "max_batch_size",
        "model",
        "names",
        "outputs",
        "patience",
        "required",
    )

    def __init__(self, entry: Served) -> None:
        self.entry = entry
        self.model = entry.name
        self.max_batch_size = entry.max_batch_size
        self.inputs = {info.name: info for info in entry.inputs}
        self.required = frozenset(info.name for info in entry.inputs if not info.is_optional)
        self.outputs = {info.name: info for info in entry.outputs}
        self.names = [info.name for info in entry.outputs]
        """Names of all outputs, in the model's order."""
        self.has_bfloat16 = any(info.datatype == "BF16" for info in entry.outputs)
        self.binary_only = [info for info in entry.outputs if info.datatype in json_outputs.BINARY_ONLY]
        """Outputs that JSON does not have."""
        self.patience = Patience()
        self.is_known = bool(entry.inputs or entry.outputs)


def check_inputs(signature: Signature, tensors: Sequence[InputTensor]) -> int:
    """Return the number of rows: the batch size if the version has one, else 1.

    Raises:
        RequestFailure: 400: an input is unknown, missing or there twice, or has another datatype or shape.
            413: there are too many texts.
    """
    known, batch, seen, texts = signature.inputs, None, set(), 0
    for tensor in tensors:
        name = tensor.name
        if name in seen:
            raise invalid(f"input '{name}' already exists in request for model '{signature.model}'")
        seen.add(name)
        check_shape(name, tensor.shape)
        if tensor.datatype == datatypes.BYTES and (texts := texts + element_count(tensor.shape)) > MOST_TEXTS:
            raise _too_many_texts(name)
        if (info := known.get(name)) is None:
            if signature.is_known:
                raise invalid(f"unexpected inference input '{name}' for model '{signature.model}'")
            continue
        if tensor.datatype != info.datatype:
            raise invalid(
                f"inference input '{name}' data-type is '{tensor.datatype}', but model "
                f"'{signature.model}' expects '{info.datatype}'"
            )
        if not (info.is_unranked or fits(tensor.shape, info.shape)):
            raise _wrong_shape(signature, info, tensor.shape)
        if signature.max_batch_size:
            if not tensor.shape:
                raise invalid(
                    f"input '{name}' of model '{signature.model}' needs a first dimension: the batch"
                )
            batch = _batch_of(signature, name, tensor.shape[0], batch)
    if not signature.required <= seen:
        raise _missing(signature, seen)
    return 1 if batch is None else batch


def _too_many_texts(name: str) -> RequestFailure:
    """Return the failure for inputs of BYTES, up to ``name``, that have too many items."""
    return too_large(
        f"input '{name}' of BYTES: the request has more than {MOST_TEXTS} texts. Send several requests."
    )


def check_shape(name: str, shape: Sequence[int]) -> None:
    """Raise RequestFailure (400) if no tensor can have this shape."""
    for size in shape:
        if type(size) is not int or not 0 <= size < 1 << 63:
            raise invalid(
                f"shape {_text(shape)} of input '{name}' is not valid: a dimension is a whole number that is "
                "not negative"
            )
    if len(shape) > _MOST_DIMENSIONS:
        raise invalid(f"input '{name}' has {len(shape)} dimensions, and the most is {_MOST_DIMENSIONS}")


def fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """True if a tensor of this shape may be fed where ``wanted`` is; -1 is any size."""
    if len(shape) != len(wanted):
        return False
    return all(size == want or want < 0 for size, want in zip(shape, wanted, strict=True))


def _batch_of(signature: Signature, name: str, size: int, batch: int | None) -> int:
    if batch is not None and size != batch:
        raise invalid(f"input '{name}' batch size does not match other inputs for '{signature.model}'")
    if size > signature.max_batch_size:
        raise invalid(
            f"inference request batch-size must be <= {signature.max_batch_size} for '{signature.model}'"
        )
    return size


def check_outputs(signature: Signature, outputs: Sequence[RequestedOutput]) -> list[str]:
    """Return the names of the outputs to compute: those that are asked for, or all.

    Raises:
        RequestFailure: 400: one is unknown, is there twice, or wants what is not built.
    """
    if not outputs:
        if not signature.is_known:
            raise invalid(f"the outputs of model '{signature.model}' are not known; name those to compute")
        return signature.names
    names: list[str] = []
    for output in outputs:
        name = output.name
        if name not in signature.outputs and signature.is_known:
            raise invalid(f"unexpected inference output '{name}' for model '{signature.model}'")
        if name in names:
            raise invalid(f"output '{name}' already requested from model '{signature.model}'")
        if output.parameters.get("classification"):
            raise invalid(f"output '{name}' asks for a classification, which this server does not have")
        names.append(name)
    return names


def check_forms(signature: Signature, request: InferRequest) -> None:
    """Raise RequestFailure (400) if the request wants an output in JSON that JSON does not have."""
    if not signature.binary_only or (request.is_binary and not request.outputs):
        return
    named = {output.name: output for output in request.outputs}
    for info in signature.binary_only:
        if named:
            output = named.get(info.name)
            is_json = output is not None and not output.is_binary and output.region is None
        else:
            is_json = not request.is_binary
        if is_json:
            json_outputs.check_datatype(info.name, info.datatype)


def check_parameters(parameters: Mapping[str, object]) -> float | None:
    """Return the seconds that the request's parameter ``timeout`` (microseconds) allows; None: no limit.

    Raises:
        RequestFailure: 400: a parameter is not valid, or asks for what is not built.
    """
    for name in _SEQUENCES:
        if parameters.get(name):
            raise invalid(f"parameter '{name}' is for sequences of requests, which this server does not have")
    for name in ("priority", "timeout"):
        value = parameters.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 64:
            raise invalid(f"parameter '{name}' must be a whole number that is not negative")
    timeout = parameters.get("timeout", 0)
    assert isinstance(timeout, int)
    return timeout / 1e6 if timeout else None


def element_count(shape: Sequence[int]) -> int:
    """Return the number of items of a tensor, as a Python integer of any size."""
    count = 1
    for size in shape:
        count *= size
    return count


def check_known(name: str, datatype: str) -> None:
    """Raise RequestFailure (400) if the protocol has no such datatype."""
    if not datatypes.is_known(datatype):
        raise invalid(f"input '{name}' has the data-type '{datatype}', which is not known")


def _wrong_shape(signature: Signature, info: TensorInfo, shape: Sequence[int]) -> RequestFailure:
    note = _NOTE if signature.max_batch_size else ""
    return invalid(
        f"unexpected shape for input '{info.name}' for model '{signature.model}'. Expected "
        f"{_text(info.shape)}, got {_text(shape)}{note}"
    )


def _missing(signature: Signature, seen: set[str]) -> RequestFailure:
    missing = [name for name in signature.inputs if name in signature.required - seen]
    got = [name for name in signature.inputs if name in seen]
    return invalid(
        f"expected {len(signature.required)} inputs but got {len(seen)} inputs for model "
        f"'{signature.model}'. Got input(s) {got}, but missing required input(s) {missing}. Please provide "
        "all required input(s)."
    )


def _text(shape: Sequence[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"
