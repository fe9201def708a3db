"""Values without a fixed size, as msgpack in a block of shared memory: text, and lists and dicts of it.

Two numbers at a fixed place give the offset and the number of the bytes, so that a value of another length
can replace the last one without a message about it.  :mod:`onnx_dl.tensors.values` decides which values
are stored like this.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from onnx_dl.errors import ProtocolError
from onnx_dl.tensors.block import HEADER, Array, Block

PLACE: Final = HEADER
"""Bytes reserved for the two numbers, so that the next value is aligned."""

_T = TypeVar("_T")
_NUMBERS: Final = struct.Struct("=QQ")
_JUST_TEXT: Final = {str}
_ENCODER: Final = msgspec.msgpack.Encoder()
_ANYTHING: Final = msgspec.msgpack.Decoder()
_TEXTS: Final = msgspec.msgpack.Decoder(list[str])


def encode(value: object) -> bytes:
    """Encode a list or dict of plain values as msgpack.

    Raises:
        UnicodeEncodeError: a text contains surrogates.
        OverflowError, TypeError: msgpack cannot express a value in it.
    """
    return _ENCODER.encode(value)


def encode_text(array: Array) -> bytes:
    """Encode the items of an object array, each as text.  Raises like :func:`encode`."""
    items = array.tolist() if array.ndim == 1 else array.reshape(-1).tolist()
    if set(map(type, items)) != _JUST_TEXT:
        items = [item if type(item) is str else str(item) for item in items]
    return _ENCODER.encode(items)


def write(block: Block, offset: int, start: int, data: bytes) -> None:
    """Write ``data`` at ``start``, and its place and length at ``offset``."""
    payload, nbytes = block.payload, len(data)
    _NUMBERS.pack_into(payload, offset, start, nbytes)
    payload[start : start + nbytes] = data


def reader(block: Block, offset: int) -> Callable[[], Any]:
    """Return a function that decodes the value that lies there at the time of its call.  It raises
    ProtocolError if there is none."""
    _check_place(block, offset)
    return lambda: _decoded(_ANYTHING.decode, block, offset)


def text_reader(block: Block, offset: int, shape: tuple[int, ...]) -> Callable[[], NDArray[np.object_]]:
    """Return a function that decodes the array of this shape that lies there at the time of its call.  It
    raises ProtocolError if there is none."""
    _check_place(block, offset)
    count, flat, decode = math.prod(shape), len(shape) == 1, _TEXTS.decode
    if min(shape, default=0) < 0:
        raise ProtocolError(f"An array cannot have the shape {shape}.")

    def read() -> NDArray[np.object_]:
        items = _decoded(decode, block, offset)
        if len(items) != count:
            raise ProtocolError(f"{len(items)} strings do not fill an array of shape {shape}.")
        array = np.array(items, object)
        return array if flat else array.reshape(shape)

    return read


def _check_place(block: Block, offset: int) -> None:
    if not 0 <= offset <= block.size - _NUMBERS.size:
        raise ProtocolError(f"Byte {offset} is outside a block of {block.size} bytes.")


def _decoded(decode: Callable[[bytes], _T], block: Block, offset: int) -> _T:
    payload = block.payload
    start, nbytes = _NUMBERS.unpack_from(payload, offset)
    end = start + nbytes
    if end > block.size:
        raise ProtocolError(f"{nbytes} bytes at byte {start} reach beyond a block of {block.size} bytes.")
    try:
        return decode(bytes(payload[start:end]))  # a copy: the peer could change the bytes meanwhile
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"A value in shared memory is not msgpack ({error}).") from None
