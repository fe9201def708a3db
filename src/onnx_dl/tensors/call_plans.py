"""Calls that repeat: what of a call need not be said again.

A caller that gives arrays of the same names, dtypes and shapes as before copies them to where they lay before
and names the call by a number; a worker whose results are of the same form as before answers that they lie
where they lay (:mod:`onnx_dl.tensors.result_forms`).  Covers the caller's table of such calls.  The worker's is
:mod:`onnx_dl.workers.prepared_calls`; messages and blocks are :mod:`onnx_dl.transport.client_lane`'s.

Both tables change once per call: the worker's when it has sent the result, the caller's when it has read it.
A call that was prepared and never sent, or that failed, has changed neither.  A lane on which one has changed
and the other not is closed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnx_dl.protocol.lane import Again, Call, Items, Packed, Tensor, Text, Value
from onnx_dl.tensors import packing
from onnx_dl.tensors.arena import Arena
from onnx_dl.tensors.block import Block, Reference

MOST: Final = 64
"""Calls that one lane remembers; the next one has number 0, with which both ends forget all others."""

_TEXT: Final = frozenset((str,))
_KINDS: Final = frozenset("biufcUO")
"""Of arrays whose bytes are all that could differ the next time, and of text."""


def key_of(
    outputs: Any, feed: Mapping[Any, Any], keep: bool, moved: Iterable[Any] | None = None
) -> tuple[Any, ...] | None:
    """What two calls have in common that differ in their bytes only; None if no such call is remembered.

    ``moved``: names of inputs that lie elsewhere each time.  Names are text and nothing else, because what is
    equal to a text need not be one to onnxruntime.
    """
    if outputs is not None and not (type(outputs) in (list, tuple) and are_text(outputs)):
        return None
    parts: list[Any] = [
        keep,
        None if outputs is None else tuple(outputs),
        None if moved is None else tuple(moved),
    ]
    for name, value in feed.items():
        if (type(value) is not np.ndarray and type(value) is not Reference) or type(name) is not str:
            return None
        parts += (name, value.dtype, value.shape)
    return tuple(parts)


def are_text(names: Iterable[Any]) -> bool:
    """Whether each is a plain ``str``, and nothing that only equals one."""
    return _TEXT.issuperset(map(type, names))


def can_repeat(feed: Mapping[Any, Any]) -> bool:
    """Whether arrays like these may take their place the next time."""
    return all(value.dtype.kind in _KINDS for value in feed.values())


class Plan:
    """One call, as it was made the first time."""

    __slots__ = ("block", "key", "moved", "nbytes", "number", "readers", "results", "targets", "texts")

    def __init__(
        self,
        key: Hashable,
        number: int,
        block: Block | None,
        nbytes: int,
        targets: list[NDArray[Any] | None],
        texts: list[tuple[Any, int]],
        moved: list[tuple[int, Any]],
    ) -> None:
        """``key``: see :func:`key_of`; ``block``: the scratch block, whose fixed part has ``nbytes``;
        ``targets``: where the inputs lie in it, None for text and for those that lie elsewhere or nowhere;
        ``texts``: name and offset of text; ``moved``: index and name of those elsewhere."""
        self.key = key
        self.number = number
        self.block = block
        self.nbytes = nbytes
        self.targets = targets
        self.texts = texts
        self.moved = moved
        self.results: list[Tensor | Text | Packed] | None = None
        """What they were the last time, if the next ones may lie there too."""
        self.readers: list[Callable[[], Any]] = []
        """One for each of these, once they are read: gives the value that lies there now."""

    def fill(self, feed: Mapping[Any, Any], arena: Arena) -> bool:
        """Puts the inputs where the worker expects them; false if the arena has no such place any more.

        Raises:
            UnicodeEncodeError: there are surrogates in a text.
        """
        if self.texts:
            return self._fill_with_texts(feed, arena)
        if self.nbytes and arena.scratch(self.nbytes) is not self.block:
            return False
        self._copy(feed)
        return True

    def _fill_with_texts(self, feed: Mapping[Any, Any], arena: Arena) -> bool:
        encoded, nbytes = [], self.nbytes
        for name, offset in self.texts:
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

    def _copy(self, feed: Mapping[Any, Any]) -> None:
        for target, value in zip(self.targets, feed.values(), strict=True):
            if target is not None:
                target[...] = value


class Asked(NamedTuple):
    """A request that was prepared, and the plan that it is of.  Until it is answered, the lane knows nothing
    of it.  A :class:`Plan` alone is the request to make that call again with nothing moved."""

    message: Call | Again
    plan: Plan | None


def in_place(value: Value) -> list[Tensor] | None:
    """The tensors of a result, if it is a list of tensors that all have bytes; None if not."""
    if not (isinstance(value, Items) and value.kind == "list" and value.items):
        return None
    tensors = [item for item in value.items if isinstance(item, Tensor) and item.block]
    return tensors if len(tensors) == len(value.items) else None


class Plans:
    """The calls that one lane remembers.  Changed by :meth:`remember` alone."""

    def __init__(self) -> None:
        self._plans: dict[Hashable, Plan] = {}
        self._next = 0
        self._block: Block | None = None
        """The scratch block that the inputs of all of them lie in."""

    def find(self, key: Hashable) -> Plan | None:
        return self._plans.get(key)

    def next_number(self, block: Block | None) -> int:
        """The number of the next call that is remembered, if its inputs lie in this scratch block.  0: it
        will be the only one.  What lay in another block is gone."""
        another = block is not None and self._block is not None and block is not self._block
        return 0 if another or self._next >= MOST else self._next

    def let_go(self, has: Callable[[int], bool]) -> None:
        """The worker dropped blocks: what lay in them would never be freed.  ``has``: whether one is left."""
        for plan in self._plans.values():
            if plan.results and not all(has(value.block) for value in plan.results):
                plan.results, plan.readers = None, []

    def remember(self, plan: Plan) -> None:
        """The worker has answered this call, so it remembers it too."""
        if self._plans.get(plan.key) is plan:
            return
        if not plan.number:
            self._plans.clear()
            self._block = None
        self._plans[plan.key] = plan
        self._next = plan.number + 1
        self._block = plan.block or self._block


def targets_of(values: Sequence[Value], block: Block | None) -> list[NDArray[Any] | None]:
    """The arrays in ``block`` that a packed feed lies in."""
    return [
        block.array(value.dtype, value.shape, value.offset)
        if block is not None and isinstance(value, Tensor) and value.block == block.number
        else None
        for value in values
    ]


def texts_of(names: Iterable[Any], values: Sequence[Value]) -> list[tuple[Any, int]]:
    """Name and offset of the texts in a packed feed that has these names."""
    pairs = zip(names, values, strict=True)
    return [(name, value.offset) for name, value in pairs if isinstance(value, Text) and value.block]
