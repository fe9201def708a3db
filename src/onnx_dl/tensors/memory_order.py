"""In which order another process sees what this one writes to shared memory.

A system call orders what was written before it: whoever is woken by a bell, a socket or the end of a process
sees all of it.  Almost everything in shared memory is read after such a call.  One word is not: the lease of
a block, which its holder clears without telling anybody.  It must not be seen as clear before the holder's
last write to the block, or that write could land on what the owner puts there next.  x86-64 keeps the order
of writes; other machines (aarch64, POWER, RISC-V) do not, unless the last of them is a *store-release*.

The owner needs nothing of the kind: it reads the word, branches, and only then writes, and a write does not
overtake a branch on any of these machines.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from typing import Final

_KEEPS_ORDER: Final = frozenset({"x86_64", "AMD64", "i686"})
"""Machines of the total store order, by ``platform.machine()``."""


def release_for(machine: str) -> Callable[[int], object] | None:
    """What clears the four bytes at an address, after all that was written before.

    None: on this machine any store does.  Elsewhere it is ``pthread_spin_unlock``: POSIX lists it among the
    functions that synchronize memory (XBD 4.12), and glibc implements it as a store-release of zero on all
    machines but x86 (``stlr wzr, [x0]`` on aarch64).  The interpreter's lock is held meanwhile, so a
    finalizer that calls it is not interrupted.
    """
    if machine in _KEEPS_ORDER:
        return None
    unlock = ctypes.PyDLL(None).pthread_spin_unlock
    unlock.argtypes = [ctypes.c_void_p]
    return unlock


release: Final = release_for(platform.machine())
