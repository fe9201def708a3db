"""Encodes Python values for messages and decodes them, with arrays in shared memory.

Covers the values that ``InferenceSession`` takes and returns: arrays of every fixed-size dtype, text arrays,
lists, dicts, numbers, and onnxruntime's own values by their parts (:mod:`onnx_dl.ort.ortvalues`).  A value
that onnxruntime would reject is sent unchanged, so that onnxruntime rejects it with its own message.
:mod:`onnx_dl.tensors.arena` provides the memory.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnx_dl.errors import OnnxDLError, ProtocolError
from onnx_dl.ort import ortvalues as ort
from onnx_dl.protocol.lane import Items, Packed, Plain, Tensor, Text, Value
from onnx_dl.tensors import packing
from onnx_dl.tensors.arena import Arena
from onnx_dl.tensors.block import Array, Block, align
from onnx_dl.tensors.foreign import SharedDescriptor

VIEW_FROM: Final = 64 << 10
"""Results of at least this many bytes become views; smaller ones are copied.  Copying 64 KiB takes about as
long as the bookkeeping of a held block (figures in docs/architecture.md)."""

_LONG_LONG: Final = frozenset("qQ") if np.dtype("q").isnative else frozenset()
"""onnxruntime's 64-bit integers are C's long long, which numpy's dtype strings cannot express."""

_LIKE_TEXT: Final = (memoryview, bytearray, set, frozenset, range)
"""onnxruntime rejects these with the same message as text, which does not show their content."""

DEVICE: Final = "device"
"""Kind of a handle of memory on a device (:mod:`onnx_dl.tensors.device_values`)."""
_CONTAINERS: Final = (list, dict)
_SCALARS: Final = frozenset((type(None), bool, int, float, str, bytes))

_Node: TypeAlias = "NDArray[Any] | _Encoded | ort.Parts | Value"
"""A value half way to the wire.  The items of its parts are nodes."""


class _Encoded(NamedTuple):
    """A value as msgpack; ``shape`` is that of a text array."""

    data: bytes
    shape: tuple[int, ...] | None


class Packer:
    """Encodes the values of one message.

    Small arrays and other values share the arena's scratch block: first everything whose size depends on
    types and shapes only, then the bytes of the rest.  Arrays of ``take_from`` bytes or more get a block
    each, as long as the message can announce new ones; None: no array does.
    """

    def __init__(
        self,
        arena: Arena,
        take_from: int | None = None,
        moved: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> None:
        """``moved``: places of arrays that the peer sees without a copy, by ``id`` of the array."""
        self._arena = arena
        self._moved = moved
        self._take_from = take_from
        self._taken: list[Block] = []
        self._homes: deque[Block | None] = deque()
        """Block of each array in order; None: scratch."""
        self._bytes = self._start = self._offset = 0
        self.scratch: Block | None = None
        """The block with the small arrays."""
        self.nbytes = 0
        """Size of its first part, which depends on types and shapes only."""
        self.names_devices = False
        """True if a value names memory on a device."""

    def pack(self, values: Iterable[object], *, from_engine: bool = False) -> list[Value]:
        """Encode the values in order; their arrays are copied into shared memory.

        ``from_engine``: they are an engine's results.  The dicts in one of its lists have the same types, so
        only the first is checked.

        Raises:
            RuntimeError: onnxruntime accepts no values of this kind; the message is onnxruntime's.
            UnsupportedValueError: onnxruntime gives no access to the content of an OrtValue.
            UnicodeEncodeError: a text contains surrogates.
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
        """Release the blocks of a message that will not be sent."""
        for block in self._taken:
            block.release()

    def _node(self, value: object) -> _Node:
        """Convert a value to a node: an array, encoded bytes, parts, or a value that the message contains."""
        if moved := self._moved.get(id(value)):
            return moved
        if isinstance(value, np.ndarray):
            return _text(value) if value.dtype.kind == "O" else np.asarray(value)
        if isinstance(value, np.generic):
            return ort.Parts("scalar", [self._node(np.asarray(value))])
        if isinstance(value, Plain):
            return value
        if isinstance(value, SharedDescriptor):
            return Plain(self._arena.memories.number(value))
        if is_plain(value):
            return _Encoded(packing.encode(value), None) if type(value) in _CONTAINERS else Plain(value)
        if isinstance(value, str):  # of a subclass
            return Plain(str.__str__(value))
        if type(value) is list or type(value) is tuple:
            return ort.Parts(type(value).__name__, list(map(self._node, value)))
        if type(value) is dict:
            return ort.Parts("dict", list(map(self._node, chain.from_iterable(value.items()))))
        if isinstance(value, _LIKE_TEXT):
            return Plain("text")
        parts = value if type(value) is ort.Parts else ort.take_apart(value)
        if parts is None:
            raise RuntimeError(f"Unable to handle object of type {type(value)}")
        if parts.kind == DEVICE and not self.names_devices:
            self.names_devices = True
            self._arena.memories.next_message()
        return parts._replace(items=list(map(self._node, parts.items)))

    def _measure(self, node: _Node) -> None:
        if isinstance(node, np.ndarray):
            if node.nbytes:
                self._homes.append(home := self._take(node))
                self.nbytes += 0 if home else align(node.nbytes)
        elif type(node) is _Encoded:
            self.nbytes += packing.PLACE
            self._bytes += len(node.data)
        elif type(node) is ort.Parts:
            for item in node.items:
                self._measure(item)

    def _take(self, array: Array) -> Block | None:
        if self._take_from is None or array.nbytes < self._take_from:
            return None
        block = self._arena.take(array.nbytes)
        if block is not None:
            self._taken.append(block)
        return block

    def _place(self, node: _Node) -> Value:
        if isinstance(node, np.ndarray):
            return self._place_array(node)
        if isinstance(node, _Encoded):
            return self._write(node)
        if isinstance(node, ort.Parts):
            return Items(node.kind, list(map(self._place, node.items)))
        return node

    def _place_array(self, array: Array) -> Tensor:
        dtype = array.dtype.char if array.dtype.char in _LONG_LONG else array.dtype.str
        if not array.nbytes:
            return Tensor(dtype, array.shape, 0, 0)
        home = self._homes.popleft()
        block, offset = (home, 0) if home else (self.scratch, self._next_place(align(array.nbytes)))
        assert block is not None
        # As bytes: another package may define the dtype (ml_dtypes' bfloat16).
        source = array.view(dtype) if array.dtype.kind == "V" else array
        np.copyto(block.array(dtype, array.shape, offset), source, casting="no")
        return Tensor(dtype, array.shape, block.number, offset, home is not None)

    def _write(self, node: _Encoded) -> Value:
        assert self.scratch is not None
        offset = self._next_place(packing.PLACE)
        packing.write(self.scratch, offset, self._start, node.data)
        self._start += len(node.data)
        number = self.scratch.number
        return Packed(number, offset) if node.shape is None else Text(node.shape, number, offset)

    def _next_place(self, nbytes: int) -> int:
        offset, self._offset = self._offset, self._offset + nbytes
        return offset


def _text(array: Array) -> _Encoded | Text:
    return _Encoded(packing.encode_text(array), array.shape) if array.size else Text(array.shape, 0, 0)


def _maps(value: object) -> _Encoded | None:
    """Encode the list of dicts that ZipMap returns, of which the first is checked; None: it is no such
    list."""
    if type(value) is list and value and type(value[0]) is dict and is_plain(value[0]):
        with contextlib.suppress(TypeError, OverflowError):
            return _Encoded(packing.encode(value), None)
    return None


def as_it_is(value: object) -> object:
    """Wrap a value for :meth:`Packer.pack`, so that the message itself contains it if possible."""
    return Plain(value) if is_plain(value) else value


def is_plain(value: Any) -> bool:
    """True if msgpack returns the same value: numbers, text, None, lists and dicts of these."""
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


_CHUNK: Final = 4096


class AlignedCopies:
    """Memory for copies of small arrays, aligned to 64 bytes like onnxruntime's own results.  Several copies
    share a chunk of 4 KiB, because finding an aligned address takes ten times as long as copying.  Used by
    one thread at a time."""

    def __init__(self) -> None:
        self._chunk = np.empty(0, np.uint8)
        self._next = self._end = 0

    def copy(self, array: Array) -> Array:
        """Return a copy, C-contiguous and writable."""
        nbytes = align(array.nbytes)
        chunk, start = self._chunk, self._next
        if start + nbytes <= self._end:
            self._next += nbytes
        else:
            is_shared = nbytes <= _CHUNK // 4
            chunk = np.empty((_CHUNK if is_shared else nbytes) + 64, np.uint8)
            start = int(-chunk.ctypes.data % 64)
            if is_shared:
                self._chunk, self._next, self._end = chunk, start + nbytes, start + _CHUNK
        made: Array = np.ndarray(array.shape, array.dtype, chunk, start)
        made[...] = array
        return made


class Unpacker:
    """Decodes values; ``block`` returns the mapped block of a number.  ``copy``: arrays in scratch blocks are
    copied; else they are views that the next message overwrites."""

    def __init__(
        self,
        block: Callable[[int], Block],
        *,
        copy: bool,
        device: Callable[[list[Any]], object] | None = None,
    ) -> None:
        """``device`` returns the value of a handle of memory on a device; None: the peer may send none."""
        self._block = block
        self.device = device
        self._copy = copy
        self.copies = AlignedCopies()

    def unpack(self, value: Value) -> Any:
        """Return the Python value; raises ProtocolError if a tensor lies outside its block, or a container
        is of an unknown kind."""
        try:
            return self._unpack(value)
        except OnnxDLError:
            raise
        except Exception as error:  # raised by onnxruntime or numpy for parts that a peer made up
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
            raise ProtocolError(f"Text of shape {text.shape} lies in no block.")
        return np.empty(text.shape, object)

    def _array(self, tensor: Tensor) -> Array:
        if not tensor.block:
            dtype = np.dtype(tensor.dtype)
            if dtype.hasobject or dtype.itemsize * math.prod(tensor.shape):
                raise ProtocolError(f"A tensor of {dtype} and shape {tensor.shape} lies in no block.")
            return np.empty(tensor.shape, dtype)
        block = self._block(tensor.block)
        if tensor.held:
            return block.held_array(tensor.dtype, tensor.shape, tensor.offset)
        array = block.array(tensor.dtype, tensor.shape, tensor.offset)
        return self.copies.copy(array) if self._copy else array

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
            case "device" if self.device is not None:
                return self.device(items)
        if value.kind in ort.KINDS:
            return ort.put_together(value.kind, items, copy=self._copy)
        raise ProtocolError(f"A container of kind {value.kind!r} is not part of the protocol.")
