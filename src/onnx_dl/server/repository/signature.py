"""Inputs and outputs of a model, read from its file: no session, no worker, no package ``onnx``.

Field numbers as in onnx.proto.  What onnxruntime's ``get_inputs()`` leaves out is left out here: inputs that
are initializers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from onnx_dl.core.status import ModelDescription, TensorSpec
from onnx_dl.core.wire import BYTES, Field, NotAMessage, WireReader
from onnx_dl.server.interfaces import TensorInfo
from onnx_dl.server.v2 import datatypes
from onnx_dl.system import small_files

_GRAPH: Final = 7
_INITIALIZER, _INPUT, _OUTPUT, _SPARSE = 5, 11, 12, 15
_TENSOR, _SEQUENCE, _MAP, _OPAQUE, _SPARSE_TENSOR, _OPTIONAL = 1, 4, 5, 7, 8, 9
_KINDS: Final = {
    _SEQUENCE: "a sequence",
    _MAP: "a map",
    _OPAQUE: "an opaque value",
    _SPARSE_TENSOR: "a sparse tensor",
    _OPTIONAL: "an optional value",
}
_MOST_TENSORS: Final = 100_000
_MOST_SIZES: Final = 64
"""Sizes in one shape."""
_DEEPEST: Final = 4
"""Optional values within each other."""


class Unservable(ValueError):
    """The file is no model, or the protocol has no words for one of its inputs and outputs."""


class ModelSignature(msgspec.Struct, frozen=True):
    """Inputs and outputs of a model.

    Attributes:
        outputs: those that are tensors of a datatype that the protocol has.
        overridable: initializers that a request may replace.
        problems: why the other outputs cannot be served, by their names.
    """

    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()
    overridable: tuple[TensorInfo, ...] = ()
    problems: dict[str, str] = {}


def is_ort_format(path: str) -> bool:
    """True for a file in onnxruntime's own format, as onnxruntime decides: by its name."""
    return path.lower().endswith(".ort")


def read(path: str) -> ModelSignature:
    """The signature of an ONNX file.  External data is not opened.

    Raises:
        Unservable: it is no model, or cannot be served; the message says why.
        OSError: it cannot be read.
    """
    with small_files.opened(path) as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        # Not mapped: reading a page of a file that is cut off meanwhile would end the process.
        reader = WireReader(lambda count, offset: os.pread(descriptor, count, offset), size)
        try:
            return _model(reader)
        except NotAMessage as error:
            raise Unservable(f"it is not an ONNX model: {error}") from None


def of_description(description: ModelDescription) -> ModelSignature:
    """The signature as a worker described it after a load.  Raises Unservable."""
    problems: dict[str, str] = {}
    outputs = [_tried(problems, spec.name, _described, spec, "output") for spec in description.outputs]
    return ModelSignature(
        tuple(_described(spec, "input") for spec in description.inputs),
        tuple(each for each in outputs if each is not None),
        problems=problems,
    )


def _tried(
    problems: dict[str, str], name: str, make: Callable[..., TensorInfo], *args: object
) -> TensorInfo | None:
    """The result of ``make``; None: it raised Unservable, which is noted."""
    try:
        return make(*args)
    except Unservable as error:
        problems[name] = str(error)
        return None


def _model(reader: WireReader) -> ModelSignature:
    if not reader.size:
        raise NotAMessage("it is empty")
    graphs = [
        field for field in reader.fields(0, reader.size) if field.number == _GRAPH and field.wire == BYTES
    ]
    if not graphs:
        raise NotAMessage("it has no graph")
    inputs: list[Field] = []
    outputs: list[Field] = []
    initializers: list[Field] = []
    lists = {_INPUT: inputs, _OUTPUT: outputs, _INITIALIZER: initializers, _SPARSE: initializers}
    for graph in graphs:  # protobuf merges a message that comes twice
        for field in reader.fields(graph.start, graph.end):
            if field.number in lists and field.wire == BYTES:
                lists[field.number].append(field)
    if len(inputs) + len(outputs) > _MOST_TENSORS:
        raise NotAMessage(f"it has more than {_MOST_TENSORS} inputs and outputs")
    if not outputs:
        raise NotAMessage("it has no outputs")
    known = _names(reader, initializers) if inputs else set()
    named = [(name, field) for field in inputs if (name := _name(reader, field))]
    problems: dict[str, str] = {}
    found = [_tried(problems, _name(reader, field), _value, reader, field, "output") for field in outputs]
    return ModelSignature(
        tuple(_value(reader, field, "input") for name, field in named if name not in known),
        tuple(each for each in found if each is not None),
        tuple(_value(reader, field, "input") for name, field in named if name in known),
        problems,
    )


def _names(reader: WireReader, initializers: Iterable[Field]) -> set[str]:
    """Names of initializers: field 8 of a tensor; of a sparse one, of its values (field 1)."""
    found = set()
    for field in initializers:
        tensor: Field | None = field
        if field.number == _SPARSE:
            tensor = _first(reader, field, 1)
        if tensor is not None and (name := _first(reader, tensor, 8)) is not None:
            found.add(reader.text(name))
    return found


def _first(reader: WireReader, message: Field, number: int) -> Field | None:
    """The first field of this number; what is behind it, the weights for one, is not looked at."""
    for field in reader.fields(message.start, message.end):
        if field.number == number and field.wire == BYTES:
            return field
    return None


def _name(reader: WireReader, info: Field) -> str:
    name = _first(reader, info, 1)
    return "" if name is None else reader.text(name)


def _value(reader: WireReader, info: Field, role: str) -> TensorInfo:
    name = _name(reader, info)
    kind = _first(reader, info, 2)
    if kind is None:
        raise Unservable(f"its {role} '{name}' has no type")
    return _typed(reader, kind, name, role, 0)


def _typed(reader: WireReader, kind: Field, name: str, role: str, depth: int) -> TensorInfo:
    for field in reader.fields(kind.start, kind.end):
        if field.number == _TENSOR and field.wire == BYTES:
            return _tensor(reader, field, name, role, is_optional=depth > 0)
        if field.number == _OPTIONAL and role == "input" and depth < _DEEPEST:
            inner = _first(reader, field, 1)
            if inner is not None:
                return _typed(reader, inner, name, role, depth + 1)
        if field.number in _KINDS:
            raise Unservable(f"its {role} '{name}' is {_KINDS[field.number]}: the protocol has tensors only")
    raise Unservable(f"its {role} '{name}' has no type")


def _tensor(reader: WireReader, field: Field, name: str, role: str, *, is_optional: bool) -> TensorInfo:
    elements = 0
    shape: tuple[int, ...] | None = None
    for part in reader.fields(field.start, field.end):
        if part.number == 1:
            elements = part.value
        elif part.number == 2 and part.wire == BYTES:
            shape = _shape(reader, part)
    datatype = datatypes.ONNX.get(elements)
    if datatype is None:
        raise Unservable(
            f"its {role} '{name}' has elements that the protocol has no datatype for ({elements})"
        )
    return TensorInfo(name, datatype, shape or (), is_optional, is_unranked=shape is None)


def _shape(reader: WireReader, field: Field) -> tuple[int, ...]:
    sizes: list[int] = []
    for dim in reader.fields(field.start, field.end):
        if dim.number == 1 and dim.wire == BYTES:
            sizes.append(_size(reader, dim))
        if len(sizes) > _MOST_SIZES:
            raise NotAMessage(f"a shape has more than {_MOST_SIZES} sizes")
    return tuple(sizes)


def _size(reader: WireReader, dim: Field) -> int:
    found = -1
    for part in reader.fields(dim.start, dim.end):
        if part.number == 1 and part.wire == 0:
            found = part.value if part.value < 2**63 else -1
        elif part.number == 2:
            found = -1
    return found


def _described(spec: TensorSpec, role: str) -> TensorInfo:
    kind = spec.type
    is_optional = role == "input" and kind.startswith("optional(") and kind.endswith(")")
    datatype = datatypes.of_onnxruntime(kind[9:-1] if is_optional else kind)
    if datatype is None:
        raise Unservable(f"its {role} '{spec.name}' is {kind}: the protocol has no datatype for it")
    shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in spec.shape)
    return TensorInfo(spec.name, datatype, shape, is_optional)
