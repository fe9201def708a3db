"""Tensors that a request carries as numbers (``InferTensorContents``), in the protocol's binary form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from onnx_dl.server.grpc import wire
from onnx_dl.server.grpc.messages import Message
from onnx_dl.server.inference.checks import element_count
from onnx_dl.server.v2 import datatypes, text
from onnx_dl.server.v2.failures import invalid

_FIELDS: Final = {
    "BOOL": "bool_contents",
    "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents", "INT64": "int64_contents",
    "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents", "FP64": "fp64_contents",
    datatypes.BYTES: "bytes_contents",
}  # fmt: skip
"""The field for each datatype.  FP16 and BF16 have none."""
_SAME_BYTES: Final = frozenset(("BOOL", "FP32", "FP64"))
"""Datatypes whose packed numbers are the tensor's bytes."""
_AT_ONCE: Final = 1 << 16
"""Numbers that become Python's objects at one time.  Between two steps other threads run."""
MOST_ITEMS: Final = 1_000_000
"""Items of an input that become Python's objects.  A text takes one byte or two of a message, and a hundred
here."""


def to_bytes(name: str, datatype: str, shape: Sequence[int], contents: Message) -> bytes | memoryview:
    """The items of a typed input in the binary form of its datatype.

    Args:
        name: of the input, for errors.
        contents: an ``InferTensorContents``.

    Raises:
        RequestFailure: 400: the datatype has no typed form, numbers stand in a field of another datatype, a
            number does not fit, or there are more or fewer items than the shape has, or too many.
    """
    field = _FIELDS.get(datatype)
    if field is None:
        if datatypes.is_known(datatype):
            raise invalid(f"input '{name}' of {datatype} must be sent in raw_input_contents")
        raise invalid(f"input '{name}' has the unknown datatype '{datatype}'")
    for descriptor, _ in contents.ListFields():
        if descriptor.name != field:
            raise invalid(f"input '{name}' of {datatype} has {descriptor.name}; expected {field}")
    items = getattr(contents, field)
    if min(shape, default=0) >= 0 and len(items) != (wanted := element_count(shape)):
        raise invalid(
            f"input '{name}' has {len(items)} items in {field}, and its shape {list(shape)} has {wanted}"
        )
    if datatype in _SAME_BYTES:
        return _packed(contents)
    if len(items) > MOST_ITEMS:
        raise invalid(
            f"input '{name}' has {len(items)} items in {field}, which takes {MOST_ITEMS}; "
            "send raw_input_contents"
        )
    if datatype == datatypes.BYTES:
        return text.encode(items)
    return _numbers(name, datatype, items)


def _packed(contents: Message) -> bytes | memoryview:
    """The packed numbers of the only field."""
    contents.DiscardUnknownFields()
    data: bytes = contents.SerializeToString()
    if not data:
        return b""
    _, at = wire.read_varint(data, 0)
    length, at = wire.read_varint(data, at)
    assert at + length == len(data), "one field, and it is packed"
    return memoryview(data)[at:]


def _numbers(name: str, datatype: str, items: Sequence[float]) -> bytes:
    dtype = datatypes.to_numpy(datatype)
    assert dtype is not None
    array = np.empty(len(items), dtype.newbyteorder("<"))
    for begin in range(0, len(items), _AT_ONCE):
        part = items[begin : begin + _AT_ONCE]
        if dtype.kind in "iu" and dtype.itemsize < 4:  # protobuf has no numbers of one and two bytes
            limits = np.iinfo(dtype.name)
            if min(part) < limits.min or max(part) > limits.max:
                raise invalid(f"input '{name}' has a number that {datatype} does not have")
        array[begin : begin + _AT_ONCE] = part
    return array.tobytes()
