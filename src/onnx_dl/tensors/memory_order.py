"""The order in which another process sees what this one writes to shared memory.

A system call orders the writes before it: a process that is woken by a bell, a socket or the end of another
process sees all of them.  Almost everything in shared memory is read after such a call.  One word is not: the
first word of a block's header, which the holder clears without a message.  It must not be seen as clear
before the holder's last write to the block, or that write could overwrite the owner's next data.  x86-64
keeps the order of writes.  Other machines (aarch64, POWER, RISC-V) do not, unless the last write is a
*store-release*.

The owner needs no such instruction: it reads the word, branches, and only then writes, and on none of these
machines does a write overtake a branch.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from typing import Final

_KEEPS_ORDER: Final = frozenset({"x86_64", "AMD64", "i686"})
"""Machines with total store order, by ``platform.machine()``."""


def store_release_for(machine: str) -> Callable[[int], object] | None:
    """Return the function that clears the four bytes at an address after all earlier writes.

    None: on this machine a plain store does.  Elsewhere it is ``pthread_spin_unlock``: POSIX lists it among
    the functions that synchronize memory (XBD 4.12), and glibc implements it as a store-release of zero on
    all machines but x86 (``stlr wzr, [x0]`` on aarch64).  It runs with the interpreter's lock held, so a
    finalizer that calls it is not interrupted.
    """
    if machine in _KEEPS_ORDER:
        return None
    unlock = ctypes.PyDLL(None).pthread_spin_unlock
    unlock.argtypes = [ctypes.c_void_p]
    return unlock


clear_word: Final = store_release_for(platform.machine())
