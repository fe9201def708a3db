"""Results of a call that repeats, as they were sent the last time, for others of the same form to take their
place without a word: :class:`~onnx_dl.protocol.lane.Same`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_dl.protocol.lane import Items, Packed, Tensor, Text, Value
from onnx_dl.tensors import packing
from onnx_dl.tensors.arena import Arena, Block, align
from onnx_dl.tensors.values import is_plain


def in_one_place(sent: Value) -> list[Tensor | Text | Packed] | None:
    """The values of a result, if it is a list of such as may be answered by Same: all have bytes, and none is
    leased, so that they lie in the scratch block; None if not."""
    if not (isinstance(sent, Items) and sent.kind == "list" and sent.items):
        return None
    found = [value for value in sent.items if isinstance(value, Tensor | Text | Packed) and value.block]
    leased = any(isinstance(value, Tensor) and value.leased for value in found)
    return None if leased or len(found) < len(sent.items) else found


def reader_of(value: Tensor | Text | Packed, block: Block, copy: Callable[[Any], Any]) -> Callable[[], Any]:
    """Gives what lies there at the time of each call; ``copy``: how an array of numbers is copied."""
    if isinstance(value, Tensor):
        return functools.partial(copy, block.array(value.dtype, value.shape, value.offset))
    if isinstance(value, Text):
        return packing.text_reader(block, value.offset, value.shape)
    return packing.reader(block, value.offset)


class Form:
    """Where results lie, and which others may lie there.

    What an output of a model is, numbers, text or maps, its model decides once and for all; dtypes and shapes
    may differ, and are looked at.
    """

    def __init__(self, sent: Sequence[Tensor | Text | Packed], block: Block) -> None:
        """``sent``: how they lie in ``block``, the scratch block."""
        self._block = block
        self._arrays: list[tuple[int, np.dtype[Any], tuple[int, ...], NDArray[Any]]] = []
        self._others: list[tuple[int, tuple[int, ...] | None, int]] = []
        """Index, shape if it is text, and where it is said where the bytes lie."""
        self._nbytes = 0
        """Of the part of the block whose use is fixed."""
        self._count = len(sent)
        for index, value in enumerate(sent):
            self._nbytes = max(self._nbytes, value.offset + self._add(index, value))

    def _add(self, index: int, value: Tensor | Text | Packed) -> int:
        """Takes in one value; the bytes that it always has."""
        if isinstance(value, Tensor):
            target = self._block.array(value.dtype, value.shape, value.offset)
            self._arrays.append((index, target.dtype, target.shape, target))
            return align(target.nbytes)
        self._others.append((index, value.shape if isinstance(value, Text) else None, value.offset))
        return packing.PLACE

    def put(self, results: Sequence[Any], arena: Arena) -> bool:
        """Puts these where those lay; false if they are of another form, or the arena has another scratch
        block now: then they are to be sent.

        Raises:
            UnicodeEncodeError: there are surrogates in a text.
        """
        if len(results) != self._count:
            return False
        for index, dtype, shaped, _ in self._arrays:
            result = results[index]
            if type(result) is not np.ndarray or result.dtype is not dtype or result.shape != shaped:
                return False
        encoded, nbytes = [], self._nbytes
        for index, shape, offset in self._others:
            data = _listed(results[index]) if shape is None else _text(results[index], shape)
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


def _text(result: Any, shape: tuple[int, ...]) -> bytes | None:
    if type(result) is np.ndarray and result.dtype.char == "O" and result.shape == shape:
        return packing.encode_text(result)
    return None


def _listed(result: Any) -> bytes | None:
    """A list, as ZipMap makes them; that its first row has plain values was seen the last time."""
    if type(result) is not list or not (not result or type(result[0]) is dict or is_plain(result)):
        return None
    try:
        return packing.encode(result)
    except (TypeError, OverflowError):
        return None
