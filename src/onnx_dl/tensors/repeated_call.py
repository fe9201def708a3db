"""The usual repeated call, in as few steps as possible: small arrays in, small arrays out.

All else about calls that repeat is in :mod:`onnx_dl.tensors.call_plans`.  Between two calls of a model, the
model evicts our code and data from the processor's caches, so each step costs several times what it costs
alone.  So what a call needs is prepared once and lies in one object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from onnx_dl.core.types import Value
from onnx_dl.protocol.lane import Tensor
from onnx_dl.tensors.arena import Arena
from onnx_dl.tensors.block import Array, Block, align

MOST_DIMENSIONS: Final = 31
"""Dimensions of a result: memory for several results has one more, and numpy 1.26 allows 32."""
LARGEST: Final = 2048
"""Bytes of all results of a call.  A result that is kept keeps the memory of some calls."""
_TEXT: Final = frozenset((str,))
_AT_ONCE: Final = 4096
_CALLS: Final = 8
"""Bytes of memory for results that is made at once, or for so many calls, if that is more."""


class RepeatedCall:
    """A call whose inputs and results are small arrays with places in scratch blocks."""

    __slots__ = ("_block", "_inputs", "_nbytes", "_outputs", "_places", "_ready", "_source")

    def __init__(
        self,
        key: tuple[Value, ...],
        targets: Sequence[Array | None],
        scratch: tuple[Block | None, int],
        results: Sequence[Tensor],
        block: Block,
    ) -> None:
        """
        Args:
            key: see :func:`~onnx_dl.tensors.call_plans.key_of`.
            targets: the place of each input; None: it has no bytes.
            scratch: the block of these, and the bytes of it that they take.
            results: places in ``block``, the worker's scratch block.
        """
        _, outputs, _, *inputs = key
        self._outputs = None if outputs is None else list(outputs)
        self._block, self._nbytes = scratch
        self._inputs = list(zip(inputs[::3], inputs[1::3], inputs[2::3], targets, strict=True))
        arrays = [block.array(value.dtype, value.shape, value.offset) for value in results]
        first = min(value.offset for value in results)
        end = max(value.offset + array.nbytes for value, array in zip(results, arrays, strict=True))
        self._source = block.array("|u1", (end - first,), first)
        """The bytes of all results.  They lie close together, and one copy takes less time than several."""
        self._places = [
            (array.shape, array.dtype, array.strides, value.offset - first)
            for value, array in zip(results, arrays, strict=True)
        ]
        self._ready: list[tuple[Array, list[Array]]] = []
        """Memory for the results of the next calls, and these results in it."""

    @property
    def nbytes(self) -> int:
        """Bytes of all results of one call."""
        return self._source.nbytes

    def fill(self, outputs: Value, feed: Mapping[str, Value], arena: Arena) -> bool:
        """Copies the inputs to their places.  False: it is another call, or the places are gone; some inputs
        may have been copied."""
        if outputs is not self._outputs and not (
            # Types first: other objects may refuse to be compared.
            type(outputs) is list and _TEXT.issuperset(map(type, outputs)) and outputs == self._outputs
        ):
            return False
        inputs = self._inputs
        if len(feed) != len(inputs) or (self._nbytes and arena.scratch(self._nbytes) is not self._block):
            return False
        try:
            for (name, value), (known, dtype, shape, target) in zip(feed.items(), inputs, strict=True):
                if name is not known and not (type(name) is str and name == known):
                    return False
                if type(value) is not np.ndarray or value.shape != shape:
                    return False
                if value.dtype is not dtype and value.dtype != dtype:  # numpy has one object for most dtypes
                    return False
                if target is not None:
                    target[...] = value
        except RuntimeError:  # another thread has changed the feed: the usual way tells so
            return False
        return True

    def results(self) -> list[Value]:
        """Copies of the present results: writable, C-contiguous, aligned to 64 bytes."""
        if not self._ready:
            self._prepare()
        target, results = self._ready.pop()
        target[...] = self._source
        return results

    def _prepare(self) -> None:
        """Makes memory for some calls at once: finding an aligned address takes longer than the copy, and
        many arrays made in one step take less time than one after the other."""
        nbytes = self._source.nbytes
        each = align(nbytes)
        count = max(_AT_ONCE // each, _CALLS)
        chunk = np.empty(count * each + 64, np.uint8)
        first = -chunk.__array_interface__["data"][0] % 64
        targets = np.ndarray((count, nbytes), np.uint8, chunk, first, (each, 1))
        arrays = [
            np.ndarray((count, *shape), dtype, chunk, first + offset, (each, *strides))
            for shape, dtype, strides, offset in self._places
        ]
        rows = [list(array) if array.ndim > 1 else [array[i, ...] for i in range(count)] for array in arrays]
        self._ready.extend(zip(targets, map(list, zip(*rows, strict=True)), strict=True))
