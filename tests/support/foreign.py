"""Shared memory as other processes make it: not sealed, and theirs to change."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from onnx_dl import InferenceSessionProxy
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.session import placed_runs
from onnx_dl.tensors.foreign import ForeignArray, ForeignMemory, ForeignPlace
from tests.support.waiting import DEADLINE

F4 = np.dtype(np.float32)
LARGE = 1 << 16
"""Items; more bytes than this process copies itself."""
SMALL = 64
X = np.arange(LARGE, dtype=np.float32)
TURNS = np.array(3)
FOR_EVER = np.array(1 << 50)


@contextlib.contextmanager
def file(nbytes: int, *, is_mapped: bool) -> Iterator[tuple[ForeignMemory, int]]:
    """A memory that is not sealed, and a descriptor of what its maker has."""
    fd = os.memfd_create("foreign-test")
    os.ftruncate(fd, nbytes)
    with contextlib.closing(ForeignMemory(os.dup(fd), nbytes, is_mapped=is_mapped)) as memory:
        try:
            yield memory, fd
        finally:
            os.close(fd)


def run(
    session: InferenceSessionProxy, array: ForeignArray, place: ForeignPlace, turns: NDArray[np.int64] = TURNS
) -> object:
    feed = {"x": array, "n": turns}
    (result,) = placed_runs.run(session, ["y"], feed, {"y": place}, Deadline(DEADLINE))
    return result


def pid_of(session: InferenceSessionProxy) -> int:
    (pid,) = [s.pid for s in session._handle.host.snapshot().models if s.key == session._handle.spec.key]
    assert pid is not None
    return pid


def held(pid: int) -> int:
    """Descriptors and mappings of such memories in a process."""
    found = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found += "foreign-test" in os.readlink(f"/proc/{pid}/fd/{fd}")
    with open(f"/proc/{pid}/maps") as maps:
        return found + sum("foreign-test" in line for line in maps)
