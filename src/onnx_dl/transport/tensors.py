"""Python values to and from the wire, with arrays in shared memory.

Covers what ``InferenceSession`` takes and returns: arrays of every fixed-size dtype, text arrays, lists,
dicts, numbers, and onnxruntime's own values by their parts (:mod:`onnx_dl.values`).  A value that
onnxruntime would refuse still travels as it is, so that onnxruntime refuses it in its own words.
Where arrays lie is decided by :mod:`onnx_dl.transport.arena`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from onnx_dl import values as ort
from onnx_dl.errors import OnnxDLError, ProtocolError
from onnx_dl.transport.arena import Arena, Block, align
from onnx_dl.transport.messages import Items, Plain, Strings, Tensor, Value

VIEW_FROM: Final = 64 << 10
"""Results of at least this many bytes are handed over as views; smaller ones are copied out.

Copying 64 KiB takes about as long as the bookkeeping of a lease (docs/architecture.md has the figures).
"""

_LONG_LONG: Final = frozenset("qQ") if np.dtype("q").isnative else frozenset()
"""onnxruntime's 64-bit integers are C's long long, of which numpy's text for a dtype says nothing."""

_LIKE_TEXT: Final = (memoryview, bytearray, set, frozenset, range)
"""onnxruntime refuses these in the same words as text, which do not show what is in it."""

_SCALARS: Final = frozenset((type(None), bool, int, float, str, bytes))


class Packer:
    """Encodes the values of one message.  Small arrays share the arena's scratch block.

    Arrays of ``lease_from`` bytes or more get a leased block each; with None, none does.
    """

    def __init__(
        self,
        arena: Arena,
        lease_from: int | None = None,
        moved: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> None:
        """``moved``: where arrays lie, by their ``id``, that the peer sees without a copy."""
        self._arena = arena
        self._moved = moved
        self._lease_from = lease_from
        self._leases: list[Block] = []
        self.scratch: Block | None = None
        """Where the small arrays lie."""
        self.nbytes = 0
        """Bytes of it that are used."""

    def pack(self, values: Iterable[Any]) -> list[Value]:
        """The values for the wire, in order; their arrays are copied into shared memory.

        Raises:
            RuntimeError: a value is of a kind that onnxruntime takes from nobody, in onnxruntime's words.
            UnsupportedValueError: an OrtValue holds what onnxruntime gives no access to.
            SharedMemoryError: the system has no memory for an array.
        """
        values = [_lowered(value) for value in values]
        needed = sum(map(self._scratch_bytes, values))
        if needed:
            self.scratch = self._arena.scratch(needed)
        try:
            return [self._encode(value) for value in values]
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Takes back the leases of a message that will not be sent."""
        for block in self._leases:
            block.leased = False

    def _is_leased(self, array: NDArray[Any]) -> bool:
        return self._lease_from is not None and array.nbytes >= self._lease_from

    def _scratch_bytes(self, value: Any) -> int:
        if id(value) in self._moved:
            return 0
        if isinstance(value, np.ndarray):
            return 0 if value.dtype.kind == "O" or self._is_leased(value) else align(value.nbytes)
        if isinstance(value, np.generic):
            return align(value.nbytes)
        if type(value) in (list, tuple):
            return sum(map(self._scratch_bytes, value))
        if type(value) is dict:
            return sum(map(self._scratch_bytes, value.values()))
        if type(value) is ort.Parts:
            return sum(map(self._scratch_bytes, value.items))
        return 0

    def _encode(self, value: Any) -> Value:
        if moved := self._moved.get(id(value)):
            return moved
        if isinstance(value, np.ndarray):
            return self._encode_array(np.asarray(value))
        if isinstance(value, np.generic):
            return Items("scalar", [self._encode_array(np.asarray(value))])
        if is_plain(value):
            return Plain(value)
        if type(value) in (list, tuple):
            return Items(type(value).__name__, [self._encode(item) for item in value])
        if type(value) is dict:
            return Items("dict", [self._encode(item) for item in chain.from_iterable(value.items())])
        if type(value) is ort.Parts:
            return Items(value.kind, [self._encode(item) for item in value.items])
        raise RuntimeError(f"Unable to handle object of type {type(value)}")

    def _encode_array(self, array: NDArray[Any]) -> Value:
        if array.dtype.kind == "O":
            return Strings(array.shape, [item if type(item) is str else str(item) for item in array.flat])
        dtype = array.dtype.char if array.dtype.char in _LONG_LONG else array.dtype.str
        if not array.nbytes:
            return Tensor(dtype, array.shape, 0, 0)
        block, offset, leased = self._place(array)
        # Bytes are what travels, also of a dtype that only its own package knows (ml_dtypes' bfloat16).
        source = array.view(dtype) if array.dtype.kind == "V" else array
        np.copyto(block.array(dtype, array.shape, offset), source, casting="no")
        return Tensor(dtype, array.shape, block.number, offset, leased)

    def _place(self, array: NDArray[Any]) -> tuple[Block, int, bool]:
        if self._is_leased(array):
            block = self._arena.lease(array.nbytes)
            self._leases.append(block)
            return block, 0, True
        assert self.scratch is not None
        offset = self.nbytes
        self.nbytes += align(array.nbytes)
        return self.scratch, offset, False


def _lowered(value: Any) -> Any:
    """The value with onnxruntime's own objects in it taken apart."""
    if isinstance(value, np.ndarray) or is_plain(value):
        return value
    if isinstance(value, str) and not isinstance(value, np.generic):  # of a subclass
        return str.__str__(value)
    if type(value) in (list, tuple):
        return type(value)(map(_lowered, value))
    if type(value) is dict:
        return {key: _lowered(item) for key, item in value.items()}
    if isinstance(value, _LIKE_TEXT):
        return "text"
    return ort.take_apart(value) or value


def is_plain(value: Any) -> bool:
    """Whether msgpack gives the value back as it was: numbers, text, None, lists and dicts of these."""
    kind = type(value)
    if kind is int:
        return bool(-(1 << 63) <= value < 1 << 64)
    if kind in _SCALARS:
        return True
    if kind is list:
        return all(map(is_plain, value))
    if kind is dict:
        return all(map(is_plain, value.values())) and all(type(key) in _SCALARS for key in value)
    return False


_PLATE: Final = 4096


class Shelf:
    """Where copies of small arrays lie: at multiples of 64 bytes, like onnxruntime's own results.

    Several share a plate of 4 KiB, because to find an aligned place takes ten times as long as to copy.
    Used by one thread at a time.
    """

    def __init__(self) -> None:
        self._plate = np.empty(0, np.uint8)
        self._next = self._end = 0

    def copy(self, array: NDArray[Any]) -> NDArray[Any]:
        """A C-contiguous copy, writable."""
        nbytes = align(array.nbytes)
        if self._next + nbytes > self._end:
            if nbytes > _PLATE // 4:
                return self._laid(array, np.empty(nbytes + 64, np.uint8))
            self._plate = np.empty(_PLATE + 64, np.uint8)
            self._next = _first_place(self._plate)
            self._end = self._next + _PLATE
        made: NDArray[Any] = np.ndarray(array.shape, array.dtype, self._plate, self._next)
        self._next += nbytes
        made[...] = array
        return made

    @staticmethod
    def _laid(array: NDArray[Any], plate: NDArray[np.uint8]) -> NDArray[Any]:
        made: NDArray[Any] = np.ndarray(array.shape, array.dtype, plate, _first_place(plate))
        made[...] = array
        return made


def _first_place(plate: NDArray[np.uint8]) -> int:
    return int(-plate.ctypes.data % 64)


class Unpacker:
    """Decodes values; ``block`` finds a mapped block by its number.

    Arrays in scratch blocks are copied if ``copy``, else they are views that the next message overwrites.
    """

    def __init__(self, block: Callable[[int], Block], *, copy: bool) -> None:
        self._block = block
        self._copy = copy
        self.shelf = Shelf()

    def unpack(self, value: Value) -> Any:
        """The Python value.

        Raises:
            ProtocolError: a tensor lies outside of its block, or a container is of no known kind.
        """
        try:
            return self._unpack(value)
        except OnnxDLError:
            raise
        except (LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
            raise ProtocolError(f"A value contradicts itself: {error}.") from None

    def _unpack(self, value: Value) -> Any:
        if isinstance(value, Tensor):
            return self._array(value)
        if isinstance(value, Plain):
            return value.value
        if isinstance(value, Strings):
            return _text_array(value)
        return self._items(value)

    def _array(self, tensor: Tensor) -> NDArray[Any]:
        if not tensor.block:
            return _nothing(tensor)
        block = self._block(tensor.block)
        if tensor.leased:
            return block.held_array(tensor.dtype, tensor.shape, tensor.offset)
        array = block.array(tensor.dtype, tensor.shape, tensor.offset)
        return self.shelf.copy(array) if self._copy else array

    def _items(self, value: Items) -> Any:
        items = [self._unpack(item) for item in value.items]
        match value.kind:
            case "list":
                return items
            case "tuple":
                return tuple(items)
            case "dict":
                return dict(zip(items[::2], items[1::2], strict=True))
            case "scalar":
                return items[0][()]
        if value.kind in ort.KINDS:
            return ort.put_together(value.kind, items, copy=self._copy)
        raise ProtocolError(f"A container of kind {value.kind!r} is not part of the protocol.")


def _nothing(tensor: Tensor) -> NDArray[Any]:
    """An array without bytes, which lies in no block."""
    dtype = np.dtype(tensor.dtype)
    if dtype.hasobject or dtype.itemsize * math.prod(tensor.shape):
        raise ProtocolError(f"A tensor of dtype {tensor.dtype!r} and shape {tensor.shape} lies in no block.")
    return np.empty(tensor.shape, dtype)


def _text_array(value: Strings) -> NDArray[np.object_]:
    array = np.empty(len(value.items), object)
    array[:] = value.items
    return array.reshape(value.shape)
