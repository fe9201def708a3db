"""Calls that repeat: what of a call need not be said again.

A caller that gives arrays of the same names, dtypes and shapes as before copies them to where they lay before
and names the call by a number; a worker whose results have the same dtypes and shapes as before answers that
they lie where they lay.  Covers the caller's table of such calls.  The worker's is
:mod:`onnx_dl.workers.repeats`; messages and blocks are :mod:`onnx_dl.transport.lane`'s.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from onnx_dl.transport.arena import Block, Reference
from onnx_dl.transport.messages import Items, Tensor, Value

MOST: Final = 64
"""Calls that one lane remembers; one more, and it forgets all."""

_PLAIN_KINDS: Final = frozenset("biufc")


def key_of(outputs: Any, feed: Mapping[Any, Any], keep: bool) -> tuple[Any, ...] | None:
    """What two calls have in common that differ in their bytes only; None if no such call is remembered."""
    parts: list[Any] = [keep, None if outputs is None else tuple(outputs)]
    for name, value in feed.items():
        if (type(value) is not np.ndarray and type(value) is not Reference) or type(name) is not str:
            return None
        parts += (name, value.dtype, value.shape)
    return tuple(parts)


def can_repeat(feed: Mapping[Any, Any]) -> bool:
    """Whether the bytes of these arrays are all that could differ the next time."""
    return all(value.dtype.kind in _PLAIN_KINDS for value in feed.values())


class Plan:
    """One call, as it was made the first time."""

    __slots__ = ("block", "moved", "nbytes", "number", "results", "targets")

    def __init__(
        self,
        number: int,
        block: Block | None,
        nbytes: int,
        targets: list[NDArray[Any] | None],
        moved: list[tuple[int, Any]],
    ) -> None:
        """``block``: the scratch block, of which ``nbytes`` are used; ``targets``: where the inputs lie in
        it, None for those that lie elsewhere or nowhere; ``moved``: index and name of those elsewhere."""
        self.number = number
        self.block = block
        self.nbytes = nbytes
        self.targets = targets
        self.moved = moved
        self.results: list[tuple[Block, Tensor]] | None = None
        """Where they lay the last time, if the next ones may lie there too."""

    def fill(self, feed: Mapping[Any, Any]) -> None:
        """Copies the inputs to where the worker expects them."""
        for target, value in zip(self.targets, feed.values(), strict=True):
            if target is not None:
                target[...] = value


def in_place(value: Value) -> list[Tensor] | None:
    """The tensors of a result, if it is a list of tensors that all have bytes; None if not."""
    if not (isinstance(value, Items) and value.kind == "list" and value.items):
        return None
    tensors = [item for item in value.items if isinstance(item, Tensor) and item.block]
    return tensors if len(tensors) == len(value.items) else None


class Plans:
    """The calls that one lane remembers."""

    def __init__(self) -> None:
        self._plans: dict[Hashable, Plan] = {}
        self._block: Block | None = None

    def find(self, key: Hashable) -> Plan | None:
        return self._plans.get(key)

    def next_number(self, block: Block | None) -> int:
        """A number for a call whose inputs lie in this scratch block.  Another block than before: what lay
        in that is gone, and all plans with it."""
        if block is not None and block is not self._block:
            self._plans.clear()
            self._block = block
        if len(self._plans) >= MOST:
            self._plans.clear()
        return len(self._plans)

    def remember(self, key: Hashable, plan: Plan) -> None:
        """The worker has answered this call, so it remembers it too."""
        self._plans[key] = plan


def targets_of(values: Sequence[Value], block: Block | None) -> list[NDArray[Any] | None]:
    """The arrays in ``block`` that a packed feed lies in."""
    return [
        block.array(value.dtype, value.shape, value.offset)
        if block is not None and isinstance(value, Tensor) and value.block == block.number
        else None
        for value in values
    ]
