"""What the application holds of shared memory, and what becomes of it at a fork.

Before a fork, every block that an array of the application lies in becomes this process's own: it stays where
it is, with the bytes that it has, but is mapped copy-on-write, and its owner is told in the block's header
that it never comes back.  Parent and child then have it as they have all their memory, each its own, and the
end of an array in either is the other's concern no more.  Nothing is copied and nobody waits.

That needs the block's descriptor.  Blocks that have given it up are copied by the child, right after the
fork; their leases do not end before that, and the parent waits for it.
"""

from __future__ import annotations

import os
import select
import weakref
from typing import Any, Final, NamedTuple

from onnx_dl.concurrency import primitives
from onnx_dl.system.owned_descriptors import keep_for_ever

_PATIENCE: Final = 10.0
"""Seconds that a parent waits for a child to copy; what it has not copied by then is kept for ever."""


class Lease:
    """The base of a leased array: numpy keeps it alive for as long as any view of the array lives."""

    __slots__ = ("__array_interface__", "__weakref__", "block")

    def __init__(self, block: Any, dtype: str, shape: tuple[int, ...], address: int) -> None:
        self.block = block
        self.__array_interface__ = {"version": 3, "typestr": dtype, "shape": shape, "data": (address, False)}
        self._living[id(self)] = weakref.ref(self)
        if _forks:  # it may come too late to be seen before the fork
            block.give_away()

    def __del__(self) -> None:
        self._living.pop(id(self), None)
        self.block.end_lease()

    _living: dict[int, weakref.ref[Lease]] = {}


class _Fork(NamedTuple):
    """One that is under way."""

    thread: int
    shared: list[Lease]
    """Leases of blocks that the child has to copy."""
    pipe: tuple[int, int] | None
    """Its reading end tells the parent that the child has, or is gone."""


_forks: Final[list[_Fork]] = []


def _living() -> list[Lease]:
    return [lease for ref in list(Lease._living.values()) if (lease := ref()) is not None]


def _before() -> None:
    shared: list[Lease] = []
    _forks.append(fork := _Fork(primitives.get_ident(), shared, None))
    shared += [lease for lease in _living() if not lease.block.give_away()]
    if shared:
        _forks[_forks.index(fork)] = fork._replace(pipe=_pipe())


def _pipe() -> tuple[int, int] | None:
    try:
        return os.pipe()
    except OSError:  # no descriptor is left for it
        return None


def _after_in_parent() -> None:
    fork = _take_fork()
    if fork is not None and fork.shared and not _is_copied(fork.pipe):
        for lease in fork.shared:
            keep_for_ever(lease)


def _take_fork() -> _Fork | None:
    """This thread's; the last one, because a signal handler may fork while its thread is about to."""
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
        return bool(poll.poll(_PATIENCE * 1000))
    finally:
        primitives.close(read_end)


def _after_in_child() -> None:
    """Copies what the child shares with its parent.  Where it was forked while another fork was under way,
    both are its own concern."""
    forks = _forks.copy()
    _forks.clear()
    try:
        for lease in _living():
            if not lease.block.mapping.is_private:
                _copy(lease)
    finally:
        for fd in [fd for fork in forks for fd in fork.pipe or ()]:
            primitives.close(fd)


def _copy(lease: Lease) -> None:
    try:
        lease.block.mapping.make_copy()
    except BaseException:  # the parent has it to itself as long as this lease does not end
        keep_for_ever(lease)
        raise


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
