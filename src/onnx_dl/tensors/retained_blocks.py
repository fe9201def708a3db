"""Shared memory that arrays of the application keep, and how a fork divides it.

Before a fork, every block that an array of the application lies in becomes this process's own: it stays at
its address with its bytes, but is mapped copy-on-write, and the block's header tells its owner that it never
comes back.  Afterwards parent and child each have the memory for themselves, as they have all other memory.
Nothing is copied and nobody waits.

That needs the block's descriptor.  A block that has closed it is copied by the child right after the fork.
Such a block is not released before that, and the parent waits for it.
"""

from __future__ import annotations

import os
import select
import weakref
from typing import ClassVar, Final, Generic, NamedTuple, Protocol, TypeAlias, TypeVar

from onnx_dl.concurrency import primitives
from onnx_dl.linux_only import register_at_fork
from onnx_dl.system.owned_descriptors import keep_for_ever
from onnx_dl.tensors.segment import Mapping

_COPY_TIMEOUT: Final = 10.0
"""Seconds that a parent waits for a child to copy.  A block that is not copied by then is kept for ever."""


class _Retainable(Protocol):
    """The part of a block that matters here."""

    mapping: Mapping

    def release(self) -> None: ...
    def give_away(self) -> bool: ...


_B = TypeVar("_B", bound=_Retainable, covariant=True)


class RetainedBlock(Generic[_B]):
    """The base object of an array in a held block.  numpy keeps it alive as long as any view of the array;
    then it releases the block."""

    __slots__ = ("__array_interface__", "__weakref__", "block")

    def __init__(self, block: _B, dtype: str, shape: tuple[int, ...], address: int) -> None:
        self.block = block
        self.__array_interface__ = {"version": 3, "typestr": dtype, "shape": shape, "data": (address, False)}
        self._living[id(self)] = weakref.ref(self)
        if _forks:  # a fork is under way, which may not have seen this block
            block.give_away()

    def __del__(self) -> None:
        self._living.pop(id(self), None)
        self.block.release()

    _living: ClassVar[dict[int, weakref.ref[_Retained]]] = {}


_Retained: TypeAlias = RetainedBlock[_Retainable]


class _Fork(NamedTuple):
    """A fork that is under way."""

    thread: int
    shared: list[_Retained]
    """Blocks that the child has to copy."""
    pipe: tuple[int, int] | None
    """Its reading end tells the parent that the child has copied them, or is gone."""


_forks: Final[list[_Fork]] = []


def _living() -> list[_Retained]:
    return [retained for ref in list(RetainedBlock._living.values()) if (retained := ref()) is not None]


def _before() -> None:
    shared: list[_Retained] = []
    _forks.append(fork := _Fork(primitives.get_ident(), shared, None))
    shared += [retained for retained in _living() if not retained.block.give_away()]
    if shared:
        _forks[_forks.index(fork)] = fork._replace(pipe=_pipe())


def _pipe() -> tuple[int, int] | None:
    try:
        return os.pipe()
    except OSError:  # this process may have no more descriptors
        return None


def _after_in_parent() -> None:
    fork = _take_fork()
    if fork is not None and fork.shared and not _is_copied(fork.pipe):
        for retained in fork.shared:
            keep_for_ever(retained)


def _take_fork() -> _Fork | None:
    """Remove and return this thread's latest fork: a signal handler may fork while its thread is about to."""
    for fork in reversed(_forks):
        if fork.thread == primitives.get_ident():
            _forks.remove(fork)
            return fork
    return None


def _is_copied(pipe: tuple[int, int] | None) -> bool:
    if pipe is None:
        return False
    read_end, write_end = pipe
    primitives.close(write_end)
    poll = primitives.poll()
    poll.register(read_end, select.POLLIN)
    try:
        return bool(poll.poll(_COPY_TIMEOUT * 1000))
    finally:
        primitives.close(read_end)


def _after_in_child() -> None:
    """Copy the memory that the child shares with its parent.  If several forks were under way, the child does
    this for all of them."""
    forks = _forks.copy()
    _forks.clear()
    try:
        for retained in _living():
            if not retained.block.mapping.is_private:
                try:
                    retained.block.mapping.make_copy()
                except BaseException:  # the parent has the memory for itself until this process releases it
                    keep_for_ever(retained)
                    raise
    finally:
        for fd in [fd for fork in forks for fd in fork.pipe or ()]:
            primitives.close(fd)


register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
