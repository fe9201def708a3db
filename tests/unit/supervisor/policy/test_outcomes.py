"""Wait statuses in words."""

from __future__ import annotations

import signal

import pytest

from onnx_dl.errors import CapacityError, MemoryLimitExceeded, SharedMemoryError
from onnx_dl.protocol import failures
from onnx_dl.supervisor.policy.outcomes import memory_exceeded, ran_out_of_memory, worker_died
from onnx_dl.supervisor.processes.worker_process import exit_status


def died(status: int, stderr: str = "", reason: str = "crash", loading: bool = False):
    return worker_died("m.onnx", 42, exit_status(status), stderr, reason=reason, loading=loading)


@pytest.mark.parametrize("code", [0, 1, 70, 255])
def test_exit_code(code):
    error = died(code << 8)
    assert (error.exit_code, error.signal) == (code, None)
    assert f"exit code {code}" in str(error)


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (signal.SIGKILL, "ran out of memory"),
        (signal.SIGSEGV, "native code accessed invalid memory"),
        (signal.SIGABRT, "native code aborted"),
        (signal.SIGBUS, "shared memory ran out"),
        (signal.SIGTERM, "SIGTERM"),
    ],
)
def test_signal(number, hint):
    error = died(int(number))
    assert (error.exit_code, error.signal) == (None, int(number))
    assert number.name in str(error)
    assert hint in str(error)


def test_core_dump_flag_is_no_part_of_the_signal():
    assert died(signal.SIGSEGV | 0x80).signal == signal.SIGSEGV


def test_real_time_signal_has_a_number():
    assert "signal 40" in str(died(40))


def test_text():
    assert str(died(7 << 8, "line 1\nline 2\n")) == (
        "The worker of m.onnx (pid 42) ended before it answered: exit code 7. The next call loads the "
        "model again. Its last lines on stderr:\nline 1\nline 2"
    )
    error = died(7 << 8, " \n", loading=True)
    assert "while it loaded" in str(error)
    assert "stderr" not in str(error)
    assert (error.pid, error.stderr, error.reason, error.retry_after) == (42, " \n", "crash", 0.0)


def test_ends_that_were_asked_for():
    forced = died(signal.SIGKILL, reason="request")
    assert "unload(force=True) was called" in str(forced)
    assert "memory" not in str(forced) and "again" not in str(forced)
    assert forced.reason == "request"
    assert "its host shut down" in str(died(signal.SIGKILL, reason="exit"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("std::bad_alloc"), True),
        (SharedMemoryError("The system has no shared memory left."), True),
        (
            RuntimeError("[ONNXRuntimeError] : 6 : BFCArena: Failed to allocate memory for requested buffer"),
            True,
        ),
        (RuntimeError("CUDA failure 2: out of memory ; GPU=0 ; hostname=h"), True),
        (RuntimeError("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (ValueError("not a model"), False),
        (RuntimeError("No such file or directory"), False),
        (CapacityError("a model of that name is out of memory"), False),  # ours are not read for words
    ],
    ids=repr,
)
def test_loads_that_say_that_memory_ran_out(error: Exception, expected: bool) -> None:
    assert ran_out_of_memory(failures.describe(error), exit_status(0), "") is expected


@pytest.mark.parametrize(
    ("status", "stderr", "expected"),
    [
        (signal.SIGKILL, "", True),
        (signal.SIGABRT, "terminate called after throwing an instance of 'std::bad_alloc'", True),
        (signal.SIGABRT, "double free", False),
        (signal.SIGSEGV, "std::bad_alloc", False),
        (1 << 8, "MemoryError", False),
        (0, "", False),
    ],
)
def test_loads_that_died(status: int, stderr: str, expected: bool) -> None:
    assert ran_out_of_memory(None, exit_status(status), stderr) is expected


def test_too_much_memory():
    error = memory_exceeded(
        "m.onnx", 42, exit_status(75 << 8), "line 1\n", limit=150_000_000, used=163_400_000
    )
    assert type(error) is MemoryLimitExceeded
    assert str(error) == (
        "The worker of m.onnx (pid 42) ended itself during a run: its own memory was 163.4 MB, and "
        "max_memory_hard is 150.0 MB. Raise max_memory_hard, or use smaller inputs. The next call loads the "
        "model again. Its last lines on stderr:\nline 1"
    )
    assert (error.limit, error.used, error.pid, error.exit_code) == (150_000_000, 163_400_000, 42, 75)
    assert (error.signal, error.stderr, error.reason, error.retry_after) == (None, "line 1\n", "crash", 0.0)
