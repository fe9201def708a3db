"""The external form of a model: the same model, with its large weights in one file beside it.

onnxruntime parses and copies weights that lie in the model's own file; weights in a file of their own are
mapped.  The model is rewritten as bytes: fields are copied as they are, and only initializers change, whose
bytes move to the other file.  So opsets, names, metadata, functions and the order of nodes are the same by
construction, and onnxruntime makes the same optimizations.  :func:`is_same` compares all of it once more,
with code of its own.

Field numbers as in onnx.proto.  Initializers of the graph and of graphs in nodes move, those in functions do
not.  The file may have any content.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import IO, Final, TypeAlias

from onnx_dl.core.wire import BYTES, VARINT, Field, NotAMessage, WireReader
from onnx_dl.linux_only import pread

SMALLEST: Final = 16 << 10
"""Bytes of an initializer that moves.  Mapping a smaller one costs more than copying it, and constants that
decide shapes stay where they were."""

_INSIDE: Final[dict[str, dict[int, str]]] = {
    "model": {7: "graph"},
    "graph": {1: "node", 5: "tensor"},
    "node": {5: "attribute"},
    "attribute": {6: "graph", 11: "graph"},
}
"""The way to initializers: message -> field -> type of the message in it."""
_TYPE, _RAW, _EXTERNAL, _PLACE = 2, 9, 13, 14
"""Fields of a tensor: element type, its bytes, entries about the other file, where its bytes are."""
_PLAIN: Final = frozenset({1, _TYPE, 8, _RAW, 12, 16})
"""Fields of a tensor that may move: these, shape, name, documentation and metadata."""
_STRING: Final = 8
"""Element type whose items are no plain bytes."""
_IN_ANOTHER_FILE: Final = 1
"""Value of :data:`_PLACE`."""
_KEYS: Final = ("location", "offset", "length")
_ALIGNMENT: Final = 4096
"""Bytes: of a page, so that weights can be mapped."""
_DEEPEST: Final = 100
"""Deepest nesting of messages; protobuf's own parsers refuse more."""
_CHUNK: Final = 1 << 22

_Piece: TypeAlias = bytes | tuple[int, int]
"""Bytes of the new model, or start and end of a part of the old one."""


def write(source: int, model: str, weights: str) -> int:
    """Writes the external form of a model; returns the bytes of weights that moved.

    Args:
        source: descriptor of the model.
        model: path of the new model.
        weights: path of the file with its weights, in the same folder.

    Raises:
        NotAMessage: the file is no model.
        OSError: the disk is full, for example.
    """
    with open(model, "xb") as model_file, open(weights, "xb") as weights_file:
        rewriter = _Rewriter(source, weights_file, os.path.basename(weights))
        rewriter.write_model(model_file)
        return rewriter.moved


def is_same(source: int, model: str, weights: str) -> bool:
    """Tells whether the form that :func:`write` wrote is the same model with the same bytes of weights.

    Raises:
        NotAMessage: the model or its form is none.
        OSError: a file cannot be read.
    """
    location = os.path.basename(weights)
    with open(model, "rb") as model_file, open(weights, "rb") as weights_file:
        return _Comparison(source, model_file.fileno(), weights_file.fileno(), location).is_same()


class _Rewriter:
    """Writes one model's form."""

    def __init__(self, source: int, weights: IO[bytes], location: str) -> None:
        self._source = source
        self._reader = _reader(source)
        self._weights = weights
        self._location = location.encode()
        self.moved = 0

    def write_model(self, target: IO[bytes]) -> None:
        size = self._reader.size
        for piece in self._message(0, size, "model", 0) or [(0, size)]:
            if isinstance(piece, bytes):
                target.write(piece)
            else:
                self._copy(*piece, target)

    def _message(self, start: int, end: int, kind: str, depth: int) -> list[_Piece] | None:
        """The pieces of a message; None: it stays as it is."""
        if depth > _DEEPEST:
            raise NotAMessage(f"messages are nested deeper than {_DEEPEST}")
        inside, pieces, copied, head = _INSIDE[kind], list[_Piece](), start, start
        for field in self._reader.fields(start, end):
            kind_inside = inside.get(field.number) if field.wire == BYTES else None
            if kind_inside is not None:
                if kind_inside == "tensor":
                    new = self._tensor(field)
                else:
                    new = self._message(field.start, field.end, kind_inside, depth + 1)
                if new is not None:
                    pieces += [(copied, head), _head(field.number, sum(map(_size, new))), *new]
                    copied = field.end
            head = field.end
        return [*pieces, (copied, end)] if pieces else None

    def _tensor(self, message: Field) -> list[_Piece] | None:
        """Moves the bytes of an initializer; None: it stays as it is."""
        if message.end - message.start < SMALLEST:
            return None
        raw: list[Field] = []
        kept: list[_Piece] = []
        at = message.start
        for field in self._reader.fields(message.start, message.end):
            if field.number not in _PLAIN or (field.number, field.value) == (_TYPE, _STRING):
                return None  # external already, of another form of numbers, or unknown
            if field.number == _RAW:
                raw.append(field)
            else:
                kept.append((at, field.end))
            at = field.end
        if len(raw) != 1 or raw[0].wire != BYTES or raw[0].end - raw[0].start < SMALLEST:
            return None
        offset = -(-self._weights.tell() // _ALIGNMENT) * _ALIGNMENT
        self._weights.seek(offset)
        length = self._copy(raw[0].start, raw[0].end, self._weights)
        self.moved += length
        values = (self._location, b"%d" % offset, b"%d" % length)
        entries = [
            _bytes(_EXTERNAL, _bytes(1, key.encode()) + _bytes(2, value))
            for key, value in zip(_KEYS, values, strict=True)
        ]
        return [*kept, *entries, _varint(_PLACE << 3 | VARINT) + _varint(_IN_ANOTHER_FILE)]

    def _copy(self, start: int, end: int, target: IO[bytes]) -> int:
        for data in _chunks(self._source, start, end):
            target.write(data)
        return end - start


class _Comparison:
    """Compares a model with its form."""

    def __init__(self, source: int, form: int, weights: int, location: str) -> None:
        self._source, self._form, self._weights = source, form, weights
        self._old, self._new = _reader(source), _reader(form)
        self._location = location

    def is_same(self) -> bool:
        return self._messages((0, self._old.size), (0, self._new.size), "model", 0)

    def _messages(self, old: tuple[int, int], new: tuple[int, int], kind: str, depth: int) -> bool:
        if depth > _DEEPEST:
            raise NotAMessage(f"messages are nested deeper than {_DEEPEST}")

        def is_equal(one: Field, other: Field) -> bool:
            inside = _INSIDE[kind].get(one.number) if one.wire == BYTES else None
            if inside is None or _length(one) == _length(other):  # one that changed became shorter
                return self._contents(one, other)
            if inside == "tensor":
                return self._is_moved(one, other)
            return self._messages((one.start, one.end), (other.start, other.end), inside, depth + 1)

        return _all_pairs(is_equal, self._old.fields(*old), self._new.fields(*new))

    def _is_moved(self, one: Field, other: Field) -> bool:
        """Tells whether a tensor is another one, whose bytes are in the other file."""
        old = list(self._old.fields(one.start, one.end))
        new = list(self._new.fields(other.start, other.end))
        raw = [field for field in old if field.number == _RAW]
        places = [field.value for field in new if field.number == _PLACE]
        entries = [self._entry(field) for field in new if field.number == _EXTERNAL]
        if places != [_IN_ANOTHER_FILE] or len(raw) != 1 or [key for key, _ in entries] != [*_KEYS]:
            return False
        location, offset, length = (value for _, value in entries)
        start, end = int(offset), int(offset) + int(length)
        return (
            location == self._location
            and _all_pairs(
                self._contents,
                [field for field in old if field.number != _RAW],
                [field for field in new if field.number not in (_EXTERNAL, _PLACE)],
            )
            and _are_equal((self._source, raw[0].start, raw[0].end), (self._weights, start, end))
        )

    def _entry(self, entry: Field) -> tuple[str, str]:
        texts = {field.number: self._new.text(field) for field in self._new.fields(entry.start, entry.end)}
        return texts.get(1, ""), texts.get(2, "")

    def _contents(self, one: Field, other: Field) -> bool:
        return _are_equal((self._source, one.start, one.end), (self._form, other.start, other.end))


def _all_pairs(is_equal: Callable[[Field, Field], bool], old: Iterable[Field], new: Iterable[Field]) -> bool:
    """Tells whether all fields are the same, in the same order."""
    return all(
        one is not None
        and other is not None
        and (one.number, one.wire, one.value) == (other.number, other.wire, other.value)
        and is_equal(one, other)
        for one, other in zip_longest(old, new)
    )


def _are_equal(one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    """Compares two parts of files: descriptor, start and end."""
    if one[2] - one[1] != other[2] - other[1]:
        return False
    return all(a == b for a, b in zip(_chunks(*one), _chunks(*other), strict=True))


def _chunks(descriptor: int, start: int, end: int) -> Iterator[bytes]:
    """The bytes of a part of a file.  Raises OSError where it ends early."""
    while start < end:
        data = pread(descriptor, min(_CHUNK, end - start), start)
        if not data:
            raise OSError("The file became shorter.")
        yield data
        start += len(data)


def _reader(descriptor: int) -> WireReader:
    # Not mapped: reading a page of a file that is cut off meanwhile would end the process.
    return WireReader(lambda count, offset: pread(descriptor, count, offset), os.fstat(descriptor).st_size)


def _length(field: Field) -> int:
    return field.end - field.start


def _size(piece: _Piece) -> int:
    return len(piece) if isinstance(piece, bytes) else piece[1] - piece[0]


def _head(number: int, length: int) -> bytes:
    return _varint(number << 3 | BYTES) + _varint(length)


def _bytes(number: int, value: bytes) -> bytes:
    return _head(number, len(value)) + value


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])
