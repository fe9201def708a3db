"""Python values to and from the wire, with arrays in shared memory.

Covers what ``InferenceSession`` takes and returns: arrays of every fixed-size dtype, text arrays, lists,
dicts, numbers, and onnxruntime's own values by their parts (:mod:`onnx_dl.ort.ortvalues`).  A value that
onnxruntime would refuse still travels as it is, so that onnxruntime refuses it in its own words.
Where arrays lie is decided by :mod:`onnx_dl.tensors.arena`.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnx_dl.errors import OnnxDLError, ProtocolError
from onnx_dl.ort import ortvalues as ort
from onnx_dl.protocol.lane import Items, Packed, Plain, Tensor, Text, Value
from onnx_dl.tensors import packing
from onnx_dl.tensors.arena import Arena, Block, align

VIEW_FROM: Final = 64 << 10
"""Results of at least this many bytes are handed over as views; smaller ones are copied out.

Copying 64 KiB takes about as long as the bookkeeping of a lease (docs/architecture.md has the figures).
"""

_LONG_LONG: Final = frozenset("qQ") if np.dtype("q").isnative else frozenset()
"""onnxruntime's 64-bit integers are C's long long, of which numpy's text for a dtype says nothing."""

_LIKE_TEXT: Final = (memoryview, bytearray, set, frozenset, range)
"""onnxruntime refuses these in the same words as text, which do not show what is in it."""

_CONTAINERS: Final = (list, dict)
_SCALARS: Final = frozenset((type(None), bool, int, float, str, bytes))


class _Written(NamedTuple):
    """A value that is msgpack already; of a text array, with its shape."""

    data: bytes
    shape: tuple[int, ...] | None


class Packer:
    """Encodes the values of one message.  Small arrays, and what is no array, share the arena's scratch
    block: first everything whose size the types decide, then the bytes of the rest.

    Arrays of ``lease_from`` bytes or more get a leased block each, as long as the message has room to
    announce new ones; with None, none does.
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
        self._homes: deque[Block | None] = deque()
        """The blocks of the arrays, in order; None: scratch."""
        self._bytes = self._start = self._offset = 0
        self.scratch: Block | None = None
        """Where the small arrays lie."""
        self.nbytes = 0
        """Bytes of it whose use the types of the values decide."""

    def pack(self, values: Iterable[Any], *, from_engine: bool = False) -> list[Value]:
        """The values for the wire, in order; their arrays are copied into shared memory.

        ``from_engine``: they are an engine's results, whose lists of dicts are of one kind throughout, so
        that the first tells what the others are.

        Raises:
            RuntimeError: a value is of a kind that onnxruntime takes from nobody, in onnxruntime's words.
            UnsupportedValueError: an OrtValue holds what onnxruntime gives no access to.
            UnicodeEncodeError: there are surrogates in a text.
            SharedMemoryError: the system has no memory for an array.
        """
        nodes = [(from_engine and _maps(value)) or self._node(value) for value in values]
        try:
            for node in nodes:
                self._measure(node)
            if self.nbytes:
                self.scratch = self._arena.scratch(self.nbytes + self._bytes)
            self._start = self.nbytes
            return [self._place(node) for node in nodes]
        except BaseException:
            self.abandon()
            raise

    def abandon(self) -> None:
        """Takes back the leases of a message that will not be sent."""
        for block in self._leases:
            block.end_lease()

    def _node(self, value: Any) -> Any:
        """The value as one of: array, _Written, Parts of these, or what may travel in the message itself."""
        if moved := self._moved.get(id(value)):
            return moved
        if isinstance(value, np.ndarray):
            return _text(value) if value.dtype.kind == "O" else np.asarray(value)
        if isinstance(value, np.generic):
            return ort.Parts("scalar", [self._node(np.asarray(value))])
        if isinstance(value, Plain):
            return value
        if is_plain(value):
            return _Written(packing.encode(value), None) if type(value) in _CONTAINERS else Plain(value)
        if isinstance(value, str):  # of a subclass
            return Plain(str.__str__(value))
        if type(value) in (list, tuple):
            return ort.Parts(type(value).__name__, list(map(self._node, value)))
        if type(value) is dict:
            return ort.Parts("dict", list(map(self._node, chain.from_iterable(value.items()))))
        if isinstance(value, _LIKE_TEXT):
            return Plain("text")
        parts = value if type(value) is ort.Parts else ort.take_apart(value)
        if parts is None:
            raise RuntimeError(f"Unable to handle object of type {type(value)}")
        return parts._replace(items=list(map(self._node, parts.items)))

    def _measure(self, node: Any) -> None:
        if isinstance(node, np.ndarray):
            if node.nbytes:
                self._homes.append(home := self._lease(node))
                self.nbytes += 0 if home else align(node.nbytes)
        elif type(node) is _Written:
            self.nbytes += packing.PLACE
            self._bytes += len(node.data)
        elif type(node) is ort.Parts:
            for item in node.items:
                self._measure(item)

    def _lease(self, array: NDArray[Any]) -> Block | None:
        if self._lease_from is None or array.nbytes < self._lease_from:
            return None
        block = self._arena.lease(array.nbytes)
        if block is not None:
            self._leases.append(block)
        return block

    def _place(self, node: Any) -> Value:
        if isinstance(node, np.ndarray):
            return self._place_array(node)
        if type(node) is _Written:
            return self._write(node)
        if type(node) is ort.Parts:
            return Items(node.kind, list(map(self._place, node.items)))
        value: Value = node
        return value

    def _place_array(self, array: NDArray[Any]) -> Tensor:
        dtype = array.dtype.char if array.dtype.char in _LONG_LONG else array.dtype.str
        if not array.nbytes:
            return Tensor(dtype, array.shape, 0, 0)
        home = self._homes.popleft()
        block, offset = (home, 0) if home else (self.scratch, self._take(align(array.nbytes)))
        assert block is not None
        # Bytes are what travels, also of a dtype that only its own package knows (ml_dtypes' bfloat16).
        source = array.view(dtype) if array.dtype.kind == "V" else array
        np.copyto(block.array(dtype, array.shape, offset), source, casting="no")
        return Tensor(dtype, array.shape, block.number, offset, home is not None)

    def _write(self, node: _Written) -> Value:
        assert self.scratch is not None
        offset = self._take(packing.PLACE)
        packing.write(self.scratch, offset, self._start, node.data)
        self._start += len(node.data)
        number = self.scratch.number
        return Packed(number, offset) if node.shape is None else Text(node.shape, number, offset)

    def _take(self, nbytes: int) -> int:
        offset, self._offset = self._offset, self._offset + nbytes
        return offset


def _text(array: NDArray[Any]) -> _Written | Text:
    return _Written(packing.encode_text(array), array.shape) if array.size else Text(array.shape, 0, 0)


def _maps(value: Any) -> _Written | None:
    """What ZipMap made, looked at by its first row only; None: it is something else."""
    if type(value) is list and value and type(value[0]) is dict and is_plain(value[0]):
        with contextlib.suppress(TypeError, OverflowError):
            return _Written(packing.encode(value), None)
    return None


def as_it_is(value: Any) -> Any:
    """The value for :meth:`Packer.pack`, to travel in the message itself if it can."""
    return Plain(value) if is_plain(value) else value


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
        except Exception as error:  # whatever onnxruntime and numpy think of parts that a peer made up
            raise ProtocolError(f"A value contradicts itself: {error}.") from None

    def _unpack(self, value: Value) -> Any:
        if isinstance(value, Tensor):
            return self._array(value)
        if isinstance(value, Plain):
            return value.value
        if isinstance(value, Text):
            return self._text(value)
        if isinstance(value, Packed):
            return packing.reader(self._block(value.block), value.offset)()
        return self._items(value)

    def _text(self, text: Text) -> NDArray[np.object_]:
        if text.block:
            return packing.text_reader(self._block(text.block), text.offset, text.shape)()
        if math.prod(text.shape):
            raise ProtocolError(f"Text of the shape {text.shape} lies in no block.")
        return np.empty(text.shape, object)

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
