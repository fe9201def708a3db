"""Places of the last results of a call.  The next results of the same form are written to the same places and
answered by :class:`~onnx_dl.protocol.lane.SameResult`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from onnx_dl.protocol.lane import Items, Packed, Tensor, Text, Value
from onnx_dl.tensors import packing
from onnx_dl.tensors.arena import Arena
from onnx_dl.tensors.block import Array, Block, align
from onnx_dl.tensors.values import is_plain

Placed: TypeAlias = Tensor | Text | Packed
"""A value with a place in a block."""


def in_one_place(sent: Value) -> list[Placed] | None:
    """Return the values of a result if all have bytes and lie in the scratch block; else None.  Only such a
    result can be answered by SameResult the next time."""
    if not (isinstance(sent, Items) and sent.kind == "list" and sent.items):
        return None
    found = [value for value in sent.items if isinstance(value, Tensor | Text | Packed) and value.block]
    held = any(isinstance(value, Tensor) and value.held for value in found)
    return None if held or len(found) < len(sent.items) else found


def reader_of(value: Placed, block: Block, copy: Callable[[Array], Array]) -> Callable[[], Any]:
    """Return a function that reads the present value at this place.  ``copy``: copies an array."""
    if isinstance(value, Tensor):
        return functools.partial(copy, block.array(value.dtype, value.shape, value.offset))
    if isinstance(value, Text):
        return packing.text_reader(block, value.offset, value.shape)
    return packing.reader(block, value.offset)


class ResultForm:
    """The places of results, and the dtypes and shapes that fit there.  Whether an output of a model is an
    array, text or maps never changes.  Dtypes and shapes may change, and are compared."""

    def __init__(self, sent: Sequence[Placed], block: Block) -> None:
        """``sent``: the places of the results in ``block``, the scratch block."""
        self._block = block
        self._arrays: list[tuple[int, np.dtype[np.generic], tuple[int, ...], Array]] = []
        self._others: list[tuple[int, tuple[int, ...] | None, int]] = []
        """Index, shape if it is text, and offset of the two numbers that locate the bytes."""
        self._nbytes = 0
        """Size of the first part of the block, whose use is fixed."""
        self._count = len(sent)
        for index, value in enumerate(sent):
            self._nbytes = max(self._nbytes, value.offset + self._add(index, value))

    def _add(self, index: int, value: Placed) -> int:
        """Add one value; return the bytes that it has in the fixed part."""
        if isinstance(value, Tensor):
            target = self._block.array(value.dtype, value.shape, value.offset)
            self._arrays.append((index, target.dtype, target.shape, target))
            return align(target.nbytes)
        self._others.append((index, value.shape if isinstance(value, Text) else None, value.offset))
        return packing.PLACE

    def put(self, results: Sequence[Any], arena: Arena) -> bool:
        """Write results to these places.  False: they are of another form, or the arena has another scratch
        block now; they must be sent.  Raises UnicodeEncodeError if a text contains surrogates."""
        if len(results) != self._count:
            return False
        for index, dtype, shaped, _ in self._arrays:
            result = results[index]
            if type(result) is not np.ndarray or result.dtype is not dtype or result.shape != shaped:
                return False
        encoded, nbytes = [], self._nbytes
        for index, shape, offset in self._others:
            data = _encoded_list(results[index]) if shape is None else _text(results[index], shape)
            if data is None:
                return False
            encoded.append((offset, nbytes, data))
            nbytes += len(data)
        if arena.scratch(nbytes) is not self._block:
            return False
        for index, _, _, target in self._arrays:
            target[...] = results[index]
        for offset, start, data in encoded:
            packing.write(self._block, offset, start, data)
        return True


def _text(result: object, shape: tuple[int, ...]) -> bytes | None:
    if type(result) is np.ndarray and result.dtype.char == "O" and result.shape == shape:
        return packing.encode_text(result)
    return None


def _encoded_list(result: object) -> bytes | None:
    """Encode a list of dicts as ZipMap returns it; the values in its first dict were checked the last
    time."""
    if type(result) is not list or not (not result or type(result[0]) is dict or is_plain(result)):
        return None
    try:
        return packing.encode(result)
    except (TypeError, OverflowError):
        return None
