"""Tensors of a request as the values that a session is fed with.

Bytes become arrays where they lie: if that is an arena block, the call does not copy them either.  Each size
is compared, as a Python integer, with what was sent before anything is allocated for it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from onnx_dl.server.inference.checks import check_known, element_count
from onnx_dl.server.v2 import datatypes, text
from onnx_dl.server.v2.datatypes import BYTES
from onnx_dl.server.v2.failures import RequestFailure, invalid
from onnx_dl.server.v2.messages import InputTensor

Array = NDArray[Any]
MakeEmpty = Callable[[int], Array]
"""Makes an array of so many bytes (uint8), in an arena block if it is large."""

_MOST_NESTED: Final = 64
_INT: Final = frozenset((int,))
_FLOATS: Final = frozenset((int, float))
_BOOL: Final = frozenset((bool,))
_STR: Final = frozenset((str,))
_KINDS: Final = {"b": _BOOL, "i": _INT, "u": _INT, "f": _FLOATS}
"""Python types of JSON that the kinds of dtypes take."""
_WORDS: Final = {"b": "true and false", "i": "whole numbers", "u": "whole numbers", "f": "numbers"}
_FROM: Final = 64 << 10
"""Bytes from which on an array that is not aligned is moved to an arena block.  Smaller ones are copied by
the call itself."""


def binary(tensor: InputTensor, data: memoryview | bytes, make_empty: MakeEmpty) -> Array:
    """Return a view of ``data``, which is C-contiguous, with the tensor's dtype and shape.  It is a copy if
    the bytes are not aligned.  Of BF16 the dtype is uint16.

    Raises:
        RequestFailure: 400: the size is not that of such a tensor.
    """
    if tensor.datatype == BYTES:
        return _text_array(tensor, _decoded(tensor, data))
    if (known := _DTYPES.get(tensor.datatype)) is None:
        check_known(tensor.name, tensor.datatype)
        raise AssertionError(tensor.datatype)
    dtype, itemsize = known
    nbytes = data.nbytes if type(data) is memoryview else len(data)
    if (wanted := element_count(tensor.shape) * itemsize) != nbytes:
        raise invalid(
            f"input byte size mismatch for input '{tensor.name}'. Expected {wanted} bytes for shape "
            f"{list(tensor.shape)} of {tensor.datatype}, got {nbytes}"
        )
    if not nbytes:
        return np.empty(tensor.shape, dtype)
    raw = _bytes_of(data)
    array: Array
    if nbytes >= _FROM and raw.__array_interface__["data"][0] % itemsize:
        moved = make_empty(nbytes)
        moved[:] = raw
        raw = moved
    array = raw.view(dtype).reshape(tensor.shape)
    if dtype.kind == "b" and int(raw.max()) > 1:  # other bytes are no bool in C++
        raise invalid(f"input '{tensor.name}' is of BOOL, and has bytes that are neither 0 nor 1")
    return array


_DTYPES: Final = {
    name: (np.dtype(np.uint16) if name == "BF16" else np.dtype(datatypes.to_numpy(name)), size)
    for name, size in datatypes.SIZES.items()
}


def numpy_type(datatype: str) -> np.dtype[Any] | None:
    """Return the dtype of a datatype's arrays here; None for text and unknown ones."""
    known = _DTYPES.get(datatype)
    return None if known is None else known[0]


def _bytes_of(data: memoryview | bytes) -> Array:
    """Return the bytes as an array.  If they are a view of an array, so that it is known in which block they
    lie, then a view of that array."""
    raw: Array = np.frombuffer(data, np.uint8)
    owner: object = data.obj if type(data) is memoryview else None
    if type(owner) is np.ndarray and owner.dtype == np.uint8:
        begin = raw.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
        return owner[begin : begin + raw.size]
    return raw


def _decoded(tensor: InputTensor, data: memoryview | bytes) -> list[str]:
    try:
        return text.decode(data, element_count(tensor.shape))
    except ValueError as error:
        raise invalid(f"input '{tensor.name}' of BYTES {error}") from None


def from_json(tensor: InputTensor, items: list[Any]) -> Array:
    """Return an array with the items of a JSON list, which is nested or flat.

    Raises:
        RequestFailure: 400: the number of items, or the type or size of one, does not fit.
    """
    check_known(tensor.name, tensor.datatype)
    wanted = element_count(tensor.shape)
    flat, kinds = _flat(tensor, items)
    if len(flat) != wanted:
        raise invalid(
            f"input '{tensor.name}' has {len(flat)} items, and its shape {list(tensor.shape)} wants {wanted}"
        )
    if tensor.datatype == BYTES:
        return _text_array(tensor, _checked_text(tensor, flat, kinds))
    dtype = datatypes.to_numpy(tensor.datatype)
    if dtype is None or dtype == np.float16:
        raise invalid(
            f"input '{tensor.name}' of {tensor.datatype} cannot be sent as JSON; send its bytes (binary data)"
        )
    if not kinds <= _KINDS[dtype.kind]:
        raise invalid(
            f"input '{tensor.name}' of {tensor.datatype} takes {_WORDS[dtype.kind]} only; it got "
            f"{_other(flat, _KINDS[dtype.kind])}"
        )
    return _numbers(tensor, flat, dtype).reshape(tensor.shape)


def _numbers(tensor: InputTensor, flat: list[Any], dtype: np.dtype[Any]) -> Array:
    try:
        if dtype.kind in "iu":
            wide = np.array(flat, np.uint64 if dtype == np.uint64 else np.int64)
            made = wide.astype(dtype)
            # numpy 1 makes a large number of a negative one.
            fits = np.array_equal(made, wide) and (dtype != np.uint64 or min(flat, default=0) >= 0)
        else:
            with np.errstate(over="ignore"):
                made = np.array(flat, dtype)
            fits = dtype.kind == "b" or bool(np.isfinite(made).all())
    except OverflowError:
        fits = False
    if not fits:
        raise invalid(
            f"input '{tensor.name}' has a number that is out of the range of {tensor.datatype}"
        ) from None
    return made


def _flat(tensor: InputTensor, items: list[Any]) -> tuple[list[Any], set[type]]:
    """Return the innermost items, in order, and their types."""
    for _ in range(_MOST_NESTED):
        kinds = set(map(type, items))  # of millions of items: nothing in Python for each
        if list not in kinds:
            return items, kinds
        if len(kinds) > 1:
            break
        items = list(chain.from_iterable(items))
    raise invalid(f"the data of input '{tensor.name}' has lists beside items, or too many lists in lists")


def _other(flat: list[Any], allowed: frozenset[type]) -> str:
    """Return words for the first item of another type."""
    item = next(item for item in flat if type(item) not in allowed)
    words = {bool: "true or false", str: "text", float: "a fraction", int: "a number", type(None): "null"}
    return words.get(type(item), "an object")


def _checked_text(tensor: InputTensor, flat: list[Any], kinds: set[type]) -> list[str]:
    if not kinds <= _STR:
        raise invalid(f"input '{tensor.name}' of BYTES takes text only; it got {_other(flat, _STR)}")
    joined = "".join(flat)
    if not joined.isascii():
        try:
            joined.encode()
        except UnicodeEncodeError:
            raise invalid(f"input '{tensor.name}' has text with surrogates, which is not UTF-8") from None
    return flat


def _text_array(tensor: InputTensor, items: list[str]) -> Array:
    array = np.empty(len(items), object)
    array[:] = items
    return array.reshape(tensor.shape)


def unreadable(tensor: InputTensor) -> RequestFailure:
    """Return the failure for an input whose data is of no known form."""
    return invalid(f"input '{tensor.name}' has no data")
