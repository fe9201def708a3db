"""Values that have no fixed size, as msgpack in a block of shared memory: text, and lists and dicts of it.

Two numbers at a fixed place say where the bytes are and how many, so that a value of another length can take
the place of one without a word about it.  Covers writing and reading them; which values go this way is
:mod:`onnx_dl.tensors.values`'s.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from onnx_dl.errors import ProtocolError
from onnx_dl.tensors.arena import HEADER, Block

PLACE: Final = HEADER
"""Bytes that the two numbers take, so that what follows is aligned."""

_NUMBERS: Final = struct.Struct("=QQ")
_JUST_TEXT: Final = {str}
_ENCODER: Final = msgspec.msgpack.Encoder()
_ANYTHING: Final = msgspec.msgpack.Decoder()
_TEXTS: Final = msgspec.msgpack.Decoder(list[str])


def encode(value: Any) -> bytes:
    """A list or dict of plain values as msgpack.

    Raises:
        UnicodeEncodeError: it has text with surrogates.
        OverflowError, TypeError: it has a value that has no form in msgpack.
    """
    return _ENCODER.encode(value)


def encode_text(array: NDArray[Any]) -> bytes:
    """The items of an object array, each as text; raises like :func:`encode`."""
    items = array.tolist() if array.ndim == 1 else array.reshape(-1).tolist()
    if set(map(type, items)) != _JUST_TEXT:
        items = [item if type(item) is str else str(item) for item in items]
    return _ENCODER.encode(items)


def write(block: Block, offset: int, start: int, data: bytes) -> None:
    """Puts bytes at ``start`` and says so at ``offset``."""
    payload, nbytes = block.payload, len(data)
    _NUMBERS.pack_into(payload, offset, start, nbytes)
    payload[start : start + nbytes] = data


def reader(block: Block, offset: int) -> Callable[[], Any]:
    """Gives, at each call, the value whose bytes :func:`write` put there.

    It raises ProtocolError if there is none.
    """
    _check_place(block, offset)
    return lambda: _decoded(_ANYTHING.decode, block, offset)


def text_reader(block: Block, offset: int, shape: tuple[int, ...]) -> Callable[[], NDArray[np.object_]]:
    """Gives, at each call, the array of this shape whose items :func:`write` put there.

    It raises ProtocolError if there is none.
    """
    _check_place(block, offset)
    count, flat, decode = math.prod(shape), len(shape) == 1, _TEXTS.decode
    if min(shape, default=0) < 0:
        raise ProtocolError(f"No array has the shape {shape}.")

    def read() -> NDArray[np.object_]:
        items = _decoded(decode, block, offset)
        if len(items) != count:
            raise ProtocolError(f"{len(items)} strings are no array of the shape {shape}.")
        array = np.array(items, object)
        return array if flat else array.reshape(shape)

    return read


def _check_place(block: Block, offset: int) -> None:
    if not 0 <= offset <= block.size - _NUMBERS.size:
        raise ProtocolError(f"Byte {offset} is not in a block of {block.size} bytes.")


def _decoded(decode: Callable[[bytes], Any], block: Block, offset: int) -> Any:
    payload = block.payload
    start, nbytes = _NUMBERS.unpack_from(payload, offset)
    end = start + nbytes
    if end > block.size:
        raise ProtocolError(f"{nbytes} bytes at byte {start} are not in a block of {block.size} bytes.")
    try:
        return decode(bytes(payload[start:end]))  # of a copy: the peer could change what is being read
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"A value in shared memory is no msgpack ({error}).") from None
