"""Worker processes that never came to be."""

from __future__ import annotations

import gc
import os
import resource

import pytest

from onnx_dl.supervisor.processes.worker_process import WorkerProcess


def descriptors() -> list[str]:
    gc.collect()
    return sorted(os.listdir("/proc/self/fd"))


def limit_that_leaves(count: int) -> int:
    """The limit with which this process can have so many more descriptors."""
    taken = set(map(int, os.listdir("/proc/self/fd")))
    limit = 0
    while limit < 3 or sum(fd not in taken for fd in range(limit)) < count:
        limit += 1
    return limit


def test_a_worker_that_no_template_was_there_for_leaves_no_descriptor() -> None:
    before = descriptors()
    blob = os.memfd_create("blob")
    for number in range(3):
        assert WorkerProcess(number, b"name", {"blob": blob}).release() == ("", b"")
    os.close(blob)
    assert descriptors() == before


def test_a_worker_that_there_are_no_descriptors_for_leaves_none() -> None:
    """Whichever of them is refused."""
    before = descriptors()
    blob = os.memfd_create("blob")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    refused = 0
    try:
        for more in range(12):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit_that_leaves(more), limits[1]))
            try:
                WorkerProcess(1, b"name", {"blob": blob}).release()
            except OSError:
                refused += 1
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    finally:
        os.close(blob)
    assert 0 < refused < 12
    assert descriptors() == before


def test_a_blob_that_is_none() -> None:
    before = descriptors()
    with pytest.raises(OSError):
        WorkerProcess(1, b"name", {"blob": 9_999})
    assert descriptors() == before
