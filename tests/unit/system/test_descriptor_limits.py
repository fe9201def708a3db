"""How many descriptors a process may have, and how many are left."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys

import pytest

from onnx_dl import DescriptorsExhausted, OnnxDLError
from onnx_dl.system import descriptor_limits


def told_by(code: str) -> list[str]:
    """The words that a program prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split()


def test_free_counts_down() -> None:
    before = descriptor_limits.free()
    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(7)]
    try:
        assert descriptor_limits.free() == before - 7
    finally:
        for fd in fds:
            os.close(fd)
    assert descriptor_limits.free() == before


def test_counting_without_proc_tells_the_same() -> None:
    head = "from onnx_dl.system import descriptor_limits as d; "
    code = head + "print(d._open(), sum(map(d.is_open, range(4096))))"
    assert len(set(told_by(code))) == 1


@pytest.mark.parametrize(
    ("soft", "hard", "then"), [(64, 64, 64), (64, 128, 128), (128, 128, 128), (100, 20_000, 20_000)]
)
def test_the_soft_limit_is_raised_to_the_hard_one(soft: int, hard: int, then: int) -> None:
    code = (
        "import resource as r; from onnx_dl.system import descriptor_limits as d; "
        f"r.setrlimit(r.RLIMIT_NOFILE, ({soft}, {hard})); d.raise_limit(); "
        "print(d.limit(), r.getrlimit(r.RLIMIT_NOFILE)[1])"
    )
    assert told_by(code) == [str(then), str(hard)]


def test_the_error_says_what_and_how_many() -> None:
    error = descriptor_limits.exhausted("A worker for m.onnx")
    assert str(error).startswith("A worker for m.onnx needs more file descriptors than process")
    assert f"it may have {descriptor_limits.limit()}." in str(error)
    assert isinstance(error, OnnxDLError) and isinstance(error, OSError)
    assert error.errno == errno.EMFILE
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is DescriptorsExhausted and str(again) == str(error)
