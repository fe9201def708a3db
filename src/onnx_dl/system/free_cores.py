"""Free cores: whether a thread that only polls takes a core from one that has work."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import Final

from onnx_dl.concurrency import primitives
from onnx_dl.linux_only import usable_processors
from onnx_dl.system import resources

_LOAD: Final = "/proc/loadavg"


def running_threads(path: str | Path = _LOAD) -> int | None:
    """Return how many threads of the machine run or wait for a core now, the calling one included; None: not
    known.  It is the fourth figure of ``/proc/loadavg`` (proc_loadavg(5)).  Takes a few microseconds."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            running = int(os.read(fd, 128).split()[3].split(b"/")[0])
        finally:
            primitives.close(fd)
        return running or None
    return None


@functools.cache
def _most_processors() -> int:
    """Processors that affinity and cgroups leave to this process; reading the cgroups takes a while."""
    return resources.processors()


def have_one() -> bool:
    """Return whether no more threads want to run than this process may use cores.

    The threads are those of the whole machine.  So this is right where the process may use all cores, and too
    careful where it may use some, or has a quota: there, others that are busy elsewhere count, too.  False if
    the threads cannot be counted, or if this process may use the time of one core only.
    """
    running, cores = running_threads(), min(_most_processors(), usable_processors())
    return cores > 1 and running is not None and running <= cores
