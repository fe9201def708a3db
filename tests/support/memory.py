"""Memory that several processes have at once, read from outside."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import psutil


def held(pid: int, kind: str = "uss") -> int:
    """Bytes of a process, by psutil's name for them; 0 if it is gone."""
    with contextlib.suppress(psutil.Error):
        return int(getattr(psutil.Process(pid).memory_full_info(), kind))
    return 0


def held_together(processes: Iterable[tuple[int, str]]) -> int:
    """Bytes that these processes have together: of each its id and the kind of memory.

    They are read one after another.  If this process has to wait in between, one may end and another take its
    room, and both would count.  So each is read again, and the smaller figure counts.
    """
    wanted = list(processes)
    before, after = ([held(*each) for each in wanted] for _ in range(2))
    return sum(map(min, before, after))
