"""Valid frames, damaged in the ways that find faults: seeded, so that each can be had again."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

NUMBERS: Final = (
    -(2**63),
    -1,
    0,
    1,
    2,
    7,
    64,
    4096,
    65536,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63 - 1,
    2**64 - 1,
)
_LEAVES: Final[tuple[Any, ...]] = (
    None,
    True,
    b"",
    b"\xff\0",
    "",
    "\0",
    "x" * 300,
    "é",
    0.0,
    -1.5,
    float("nan"),
    float("inf"),
    [],
    {},
    [[]],
    *NUMBERS,
)
_DEEP: Final = (50, 50, 50, 200, 200, 200, 2_000, 2_000, 20_000)


class Mutator:
    """``encode`` and ``decode``: between bytes and plain values; without them only bytes are changed."""

    def __init__(
        self,
        rng: random.Random,
        corpus: Sequence[bytes],
        encode: Callable[[Any], bytes] | None = None,
        decode: Callable[[bytes], Any] | None = None,
    ) -> None:
        self.rng = rng
        self.corpus = list(corpus)
        self._encode, self._decode = encode, decode
        self._plain = [decode(data) for data in self.corpus] if decode else []
        self._ways = [
            self._flip,
            self._flip,
            self._byte,
            self._cut,
            self._grow,
            self._repeat,
            self._remove,
            self._splice,
            self._swap,
            self._number,
            self._nest,
            self._noise,
        ]

    def frame(self) -> bytes:
        """The next one: mostly damaged, sometimes whole."""
        rng = self.rng
        roll = rng.random()
        if roll < 0.02:
            return rng.choice(self.corpus)
        if self._encode is not None and roll < 0.55:
            try:
                data = self._encode(self._changed(rng.choice(self._plain)))
            except (TypeError, ValueError, OverflowError, RecursionError):
                data = rng.choice(self.corpus)
            if roll < 0.5:
                return data
        else:
            data = rng.choice(self.corpus)
        for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
            data = rng.choice(self._ways)(data)
        return data

    # --- values -------------------------------------------------------------------------------------------

    def _changed(self, value: Any, depth: int = 0) -> Any:
        """The same with one part, or a few, replaced, left out, doubled or moved."""
        rng = self.rng
        if isinstance(value, dict) and value and rng.random() < 0.9:
            key = rng.choice(list(value))
            copy = dict(value)
            self._change_at(copy, key, depth)
            return copy
        if isinstance(value, list) and value and rng.random() < 0.9:
            copy_ = list(value)
            at = rng.randrange(len(copy_))
            way = rng.random()
            if way < 0.1:
                del copy_[at]
            elif way < 0.2:
                copy_.insert(at, self._other())
            elif way < 0.25:
                copy_ += copy_
            else:
                copy_[at] = self._changed(copy_[at], depth + 1)
            return copy_
        return self._other(value)

    def _change_at(self, copy: dict[Any, Any], key: Any, depth: int) -> None:
        way = self.rng.random()
        if way < 0.08:
            del copy[key]
        elif way < 0.12:
            copy[self.rng.choice(list(copy))] = copy[key]
        elif way < 0.15:
            copy["unknown"] = self._other()
        else:
            copy[key] = self._changed(copy[key], depth + 1)

    def _other(self, value: Any = None) -> Any:
        rng = self.rng
        roll = rng.random()
        if isinstance(value, int) and not isinstance(value, bool) and roll < 0.7:
            return rng.choice((value + 1, value - 1, -value, value * 2, rng.choice(NUMBERS)))
        if isinstance(value, str) and roll < 0.4:
            return rng.choice((value * 2, value[:-1], value.upper(), value + "\0", self._text()))
        if isinstance(value, float) and roll < 0.5:
            return rng.choice((-value, value * 1e300, float("nan"), float("-inf")))
        if roll < 0.85:
            return rng.choice(_LEAVES)
        deep: Any = rng.choice(_LEAVES)
        for _ in range(rng.choice((3, 30, 300))):
            deep = [deep] if rng.random() < 0.5 else {"cause": deep}
        return deep if roll > 0.95 else self._part()

    def _part(self) -> Any:
        """Something of another frame."""
        value = self.rng.choice(self._plain)
        while isinstance(value, dict | list) and value and self.rng.random() < 0.7:
            value = self.rng.choice(list(value.values()) if isinstance(value, dict) else value)
        return value

    def _text(self) -> str:
        return "".join(chr(self.rng.choice((32, 47, 65, 120, 233, 0x2028, 0x1F600))) for _ in range(5))

    # --- bytes --------------------------------------------------------------------------------------------

    def _flip(self, data: bytes) -> bytes:
        if not data:
            return data
        changed = bytearray(data)
        changed[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
        return bytes(changed)

    def _byte(self, data: bytes) -> bytes:
        if not data:
            return data
        changed = bytearray(data)
        changed[self.rng.randrange(len(data))] = self.rng.choice(
            (0, 0x7F, 0x80, 0xC1, 0xDD, 0xDF, 0xC6, 0xFF)
        )
        return bytes(changed)

    def _cut(self, data: bytes) -> bytes:
        return data[: self.rng.randrange(len(data) + 1)]

    def _grow(self, data: bytes) -> bytes:
        return data + self.rng.randbytes(self.rng.choice((1, 3, 8, 100)))

    def _span(self, data: bytes) -> tuple[int, int]:
        a, b = self.rng.randrange(len(data) + 1), self.rng.randrange(len(data) + 1)
        return min(a, b), max(a, b)

    def _repeat(self, data: bytes) -> bytes:
        a, b = self._span(data)
        return data[:b] + data[a:b] * self.rng.choice((1, 2, 5)) + data[b:]

    def _remove(self, data: bytes) -> bytes:
        a, b = self._span(data)
        return data[:a] + data[b:]

    def _splice(self, data: bytes) -> bytes:
        other = self.rng.choice(self.corpus)
        return data[: self._span(data)[0]] + other[self._span(other)[0] :]

    def _swap(self, data: bytes) -> bytes:
        a, b = self._span(data)
        middle = (a + b) // 2
        return data[:a] + data[middle:b] + data[a:middle] + data[b:]

    def _number(self, data: bytes) -> bytes:
        """A length, or what may be one, is another."""
        at = self.rng.randrange(len(data) + 1)
        number = self.rng.choice(NUMBERS) & (2**64 - 1)
        form = self.rng.choice((">B", ">H", ">I", ">Q", "<Q", "<I"))
        packed = struct.pack(form, number & ((1 << 8 * struct.calcsize(form)) - 1))
        return data[:at] + packed + data[at + len(packed) :]

    def _nest(self, data: bytes) -> bytes:
        opening, closing = self.rng.choice(
            ((b"\x91", b""), (b"\x81\xa1a", b""), (b"[", b"]"), (b'{"a":', b"}"), (b"\xdd\0\0\0\1", b""))
        )
        at, deep = self.rng.randrange(len(data) + 1), self.rng.choice(_DEEP)
        return data[:at] + opening * deep + data[at:] + closing * deep

    def _noise(self, data: bytes) -> bytes:
        return self.rng.randbytes(self.rng.choice((0, 1, 2, 9, 64, 1000)))


def msgpack(rng: random.Random, corpus: Sequence[bytes]) -> Mutator:
    return Mutator(rng, corpus, msgspec.msgpack.encode, msgspec.msgpack.decode)


def json(rng: random.Random, corpus: Sequence[bytes]) -> Mutator:
    return Mutator(rng, corpus, msgspec.json.encode, msgspec.json.decode)
