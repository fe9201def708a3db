"""Wait statuses, in words that help."""

from __future__ import annotations

import os
import signal

from onnx_dl.errors import MemoryLimitExceeded, ProcessesExhausted, SharedMemoryError, WorkerDied
from onnx_dl.protocol.failures import Failure

_HINTS: dict[int, str] = {
    signal.SIGKILL: "nobody inside asked for that: most likely the kernel ran out of memory, see dmesg",
    signal.SIGSEGV: "native code touched memory that is not its own",
    signal.SIGABRT: "native code gave up",
    signal.SIGBUS: "a mapped file shrank, or shared memory ran out",
}

_OUT_OF_MEMORY = (
    "std::bad_alloc",
    "failed to allocate memory",
    "cannot allocate memory",
    "out of memory",
    "cuda_error_out_of_memory",
    "_status_alloc_failed",
)
"""What the standard library, onnxruntime, the kernel, CUDA, cuDNN and cuBLAS say, in lower case."""


def ran_out_of_memory(failure: Failure | None, status: int, stderr: str) -> bool:
    """Whether a load that nobody ended failed for lack of memory, so that it may work with more of it.

    Args:
        failure: what the worker said; None: it died before it could.
        status, stderr: its wait status and last lines.
    """
    if failure is None:
        code = os.waitstatus_to_exitcode(status)
        return code == -signal.SIGKILL or (code == -signal.SIGABRT and _tells(stderr))
    if (failure.family, failure.name) in (("builtin", "MemoryError"), ("onnx_dl", SharedMemoryError.code)):
        return True
    return failure.family != "onnx_dl" and any(isinstance(arg, str) and _tells(arg) for arg in failure.args)


def wants_more_memory(status: int) -> bool:
    """Whether a saver ended with this wait status because it may not take what it needs."""
    return os.waitstatus_to_exitcode(status) == os.EX_TEMPFAIL


def _tells(text: str) -> bool:
    return any(phrase in text.lower() for phrase in _OUT_OF_MEMORY)


def lacked_a_process(status: int) -> bool:
    """Whether a worker ended with this wait status because there was no thread or process for it."""
    return os.waitstatus_to_exitcode(status) == os.EX_OSERR


def lacked(model: str, stderr: str) -> ProcessesExhausted:
    """The error for such a worker, in its own words."""
    said = [line for line in stderr.splitlines() if line.strip()]
    return ProcessesExhausted(f"{model} was not loaded. {said[-1] if said else ''}".rstrip())


def worker_died(model: str, pid: int, status: int, stderr: str, *, reason: str, loading: bool) -> WorkerDied:
    """The error for a worker that ended with this wait status."""
    code, number = _ended(status)
    when = "while it loaded" if loading else "before it answered"
    text = f"The worker of {model} (pid {pid}) ended {when}: {_how(number, code, reason)}."
    if reason == "crash":
        text += " The next call loads the model afresh."
    text += _last_lines(stderr)
    return WorkerDied(text, pid=pid, exit_code=code, signal=number, stderr=stderr, reason=reason)


def memory_exceeded(
    model: str, pid: int, status: int, stderr: str, *, limit: int, used: int
) -> MemoryLimitExceeded:
    """The error for a worker that ended itself, with this wait status, for having ``used`` bytes."""
    code, number = _ended(status)
    text = (
        f"The worker of {model} (pid {pid}) ended itself during a run: it had {used / 1e6:.1f} MB of its "
        f"own, and max_memory_hard allows {limit / 1e6:.1f} MB. Allow more, or feed it less at a time. "
        f"The next call loads the model afresh.{_last_lines(stderr)}"
    )
    return MemoryLimitExceeded(
        text, limit=limit, used=used, pid=pid, exit_code=code, signal=number, stderr=stderr
    )


def _ended(status: int) -> tuple[int | None, int | None]:
    """Exit code and number of the signal, one of which is None."""
    code = os.waitstatus_to_exitcode(status)
    return (code, None) if code >= 0 else (None, -code)


def _last_lines(stderr: str) -> str:
    return f" Its last lines on stderr:\n{stderr.strip()}" if stderr.strip() else ""


def _how(number: int | None, code: int | None, reason: str) -> str:
    if reason == "request":
        return "unload(force=True) was called"
    if reason == "exit":
        return "its host shut down"
    if number is None:
        return f"exit code {code}"
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    hint = _HINTS.get(number)
    return f"{name}, {hint}" if hint else name
