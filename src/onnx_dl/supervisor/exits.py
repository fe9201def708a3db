"""Wait statuses, in words that help."""

from __future__ import annotations

import os
import signal

from onnx_dl.errors import WorkerDied

_HINTS: dict[int, str] = {
    signal.SIGKILL: "nobody inside asked for that: most likely the kernel ran out of memory, see dmesg",
    signal.SIGSEGV: "native code touched memory that is not its own",
    signal.SIGABRT: "native code gave up",
    signal.SIGBUS: "a mapped file shrank, or shared memory ran out",
}


def worker_died(model: str, pid: int, status: int, stderr: str, *, reason: str, loading: bool) -> WorkerDied:
    """The error for a worker that ended with this wait status."""
    code: int | None = os.waitstatus_to_exitcode(status)
    number = None
    if code is not None and code < 0:
        number, code = -code, None
    when = "while it loaded" if loading else "before it answered"
    text = f"The worker of {model} (pid {pid}) ended {when}: {_how(number, code, reason)}."
    if reason == "crash":
        text += " The next call loads the model afresh."
    if stderr.strip():
        text += f" Its last lines on stderr:\n{stderr.strip()}"
    return WorkerDied(text, pid=pid, exit_code=code, signal=number, stderr=stderr, reason=reason)


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
