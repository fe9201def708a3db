"""Calls that repeat: the caller's table of calls that its worker remembers too.

A caller that passes arrays of the same names, dtypes and shapes as before copies them to the same places and
names the call by a number.  A worker whose results have the same form as before replies that they lie in the
same places (:mod:`onnx_dl.tensors.result_forms`).  The worker's table is in
:mod:`onnx_dl.workers.prepared_calls`.

Both tables change once per call: the worker's when it has sent the result, the caller's when it has read the
result.  A call that was encoded and never sent, or that failed, changes neither.  A lane on which only one of
the two tables has changed is closed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from onnx_dl.protocol.lane import Call, Items, Packed, PlacedCall, Replay, Tensor, Text, Value
from onnx_dl.tensors import packing
from onnx_dl.tensors.arena import Arena
from onnx_dl.tensors.block import Array, Block, Reference
from onnx_dl.tensors.repeated_call import LARGEST, MOST_DIMENSIONS, RepeatedCall
from onnx_dl.tensors.values import VIEW_FROM, Packer

MOST: Final = 64
"""Calls that one lane remembers.  The next one has number 0, which makes both ends forget all others."""

DEVICE_RUNS: Final = range(1 << 8, 1 << 30)
"""Numbers of runs that are bound to memory on devices (:mod:`onnx_dl.workers.device_calls`).  A lane takes
one in place of a call's."""

EngineValue = Any
"""A value that an engine takes or returns; onnxruntime has no type for it."""
Feed = Mapping[str, EngineValue]
"""Inputs by name."""

_TEXT: Final = frozenset((str,))
_KINDS: Final = frozenset("biufcUO")
"""Kinds of dtypes whose values can differ in their bytes only, and text."""


def key_of(
    outputs: EngineValue, feed: Feed, keep: bool, moved: Iterable[str] | None = None
) -> tuple[object, ...] | None:
    """Key that is equal for calls that differ in bytes only; None: such a call is not remembered.

    ``moved``: names of inputs that lie elsewhere each time.  Names must be plain ``str``: a subclass may be
    equal to a name that onnxruntime takes and be refused by onnxruntime itself.
    """
    if outputs is not None and not (type(outputs) in (list, tuple) and are_text(outputs)):
        return None
    parts: list[object] = [
        keep,
        None if outputs is None else tuple(outputs),
        None if moved is None else tuple(moved),
    ]
    for name, value in feed.items():
        if (type(value) is not np.ndarray and type(value) is not Reference) or type(name) is not str:
            return None
        parts += (name, value.dtype, value.shape)
    return tuple(parts)


def are_text(names: Iterable[object]) -> bool:
    """True if each name is a plain ``str`` and not of a subclass."""
    return _TEXT.issuperset(map(type, names))


def can_repeat(feed: Feed) -> bool:
    """True if later arrays of the same dtypes and shapes can be copied over these."""
    return all(value.dtype.kind in _KINDS for value in feed.values())


class InputLayout:
    """Places in the scratch block of the inputs that a call copies."""

    __slots__ = ("_texts", "block", "nbytes", "targets")

    def __init__(self, packer: Packer, feed: Feed, values: Sequence[Value]) -> None:
        """``values``: what ``packer`` has made of the feed."""
        self.block = block = packer.scratch
        self.nbytes = packer.nbytes
        """Size of the fixed part of the block; the bytes of texts follow it."""
        self.targets: list[Array | None] = [
            block.array(value.dtype, value.shape, value.offset)
            if block is not None and isinstance(value, Tensor) and value.block == block.number
            else None
            for value in values
        ]
        """Array for each input; None for text and for inputs that lie elsewhere or have no bytes."""
        pairs = zip(feed, values, strict=True)
        self._texts = [
            (name, value.offset) for name, value in pairs if isinstance(value, Text) and value.block
        ]
        """Name of each text input, and the offset at which its place and length are written."""

    @property
    def has_texts(self) -> bool:
        return bool(self._texts)

    def fill(self, feed: Feed, arena: Arena) -> bool:
        """Copies the inputs to their places; false if the arena does not have these places any more.  Raises
        UnicodeEncodeError for a text with surrogates."""
        if self._texts:
            return self._fill_with_texts(feed, arena)
        if self.nbytes and arena.scratch(self.nbytes) is not self.block:
            return False
        self._copy(feed)
        return True

    def _fill_with_texts(self, feed: Feed, arena: Arena) -> bool:
        encoded, nbytes = [], self.nbytes
        for name, offset in self._texts:
            data = packing.encode_text(feed[name])
            encoded.append((offset, nbytes, data))
            nbytes += len(data)
        block = arena.scratch(nbytes)
        if block is not self.block:
            return False
        self._copy(feed)
        for offset, start, data in encoded:
            packing.write(block, offset, start, data)
        return True

    def _copy(self, feed: Feed) -> None:
        for target, value in zip(self.targets, feed.values(), strict=True):
            if target is not None:
                target[...] = value


@dataclasses.dataclass(slots=True, eq=False)
class CallPlan:
    """One call that repeats.  As a request, it repeats the call with nothing moved."""

    key: tuple[Any, ...]
    """See :func:`key_of`."""
    number: int
    inputs: InputLayout
    moved: Sequence[tuple[int, str]] = ()
    """Index and name of inputs that lie elsewhere each time."""
    results: list[Tensor | Text | Packed] | None = None
    """Places of the last results, if the next ones may lie there too."""
    readers: list[Callable[[], EngineValue]] = dataclasses.field(default_factory=list)
    """One for each of these, made at the first read: returns the value that lies there now."""
    repeated: RepeatedCall | None = None
    """Made with the readers; None: the call takes the usual steps."""

    def forget_results(self) -> None:
        """Forgets where the results lie."""
        self.results, self.readers, self.repeated = None, [], None

    def prepare_repeating(self, block: Callable[[int], Block]) -> None:
        """Sets :attr:`repeated`, but not for a call with text, with large arrays, which may lie in shared
        memory, or with several results of one name, which share their memory.

        ``block``: returns the worker's block of a number.
        """
        keep, outputs, moved, *parts = self.key
        results = [value for value in self.results or [] if isinstance(value, Tensor)]
        is_unique = outputs is None or len(set(outputs)) == len(outputs)
        sizes = [d.itemsize * math.prod(shape) for d, shape in zip(parts[1::3], parts[2::3], strict=True)]
        if keep or moved is not None or self.inputs.has_texts or max(sizes, default=0) >= VIEW_FROM:
            return
        if not (is_unique and results and results == self.results):
            return
        if any(len(value.shape) > MOST_DIMENSIONS for value in results):
            return
        scratch = self.inputs.block, self.inputs.nbytes
        made = RepeatedCall(self.key, self.inputs.targets, scratch, results, block(results[0].block))
        self.repeated = made if made.nbytes <= LARGEST else None


class EncodedCall(NamedTuple):
    """A call as a message, and its plan, which joins the lane's table when it is answered."""

    message: Call | Replay | PlacedCall
    plan: CallPlan | None


def in_place(value: Value) -> list[Tensor] | None:
    """The tensors of a result that is a list of tensors which all have bytes; None for other results."""
    if not (isinstance(value, Items) and value.kind == "list" and value.items):
        return None
    tensors = [item for item in value.items if isinstance(item, Tensor) and item.block]
    return tensors if len(tensors) == len(value.items) else None


class CallPlans:
    """The calls that one lane remembers."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets all calls."""
        self._plans: dict[tuple[object, ...] | None, CallPlan] = {}
        self.latest: CallPlan | None = None
        """The plan of the last call, if that can be made as a :class:`RepeatedCall`."""
        self._next = 0
        self._block: Block | None = None
        """The scratch block with the inputs of all of them."""

    def get(self, key: tuple[object, ...] | None) -> CallPlan | None:
        return self._plans.get(key)

    def next_number(self, block: Block | None) -> int:
        """Return the number for the next call to remember, whose inputs lie in this scratch block.  0: it
        will be the only one.  Inputs that lay in another scratch block are gone."""
        another = block is not None and self._block is not None and block is not self._block
        return 0 if another or self._next >= MOST else self._next

    def forget_results(self, has: Callable[[int], bool]) -> None:
        """Forgets results in blocks that the worker dropped: they would never be freed.  ``has``: whether the
        block of this number is still there."""
        for plan in self._plans.values():
            if plan.results and not all(has(value.block) for value in plan.results):
                plan.forget_results()
                self.latest = None

    def remember(self, plan: CallPlan) -> None:
        """Adds a call that the worker has answered, and so remembers too."""
        if self._plans.get(plan.key) is plan:
            return
        if not plan.number:
            self.clear()
        self._plans[plan.key] = plan
        self._next = plan.number + 1
        self._block = plan.inputs.block or self._block
