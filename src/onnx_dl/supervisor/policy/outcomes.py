"""Outcomes of workers: the errors that explain their ends, remembered for callers that lost their worker."""

from __future__ import annotations

import collections
from typing import Final, NamedTuple

from onnx_dl.errors import MemoryLimitExceeded, ProcessesExhausted, SharedMemoryError, WorkerDied
from onnx_dl.protocol import control, failures
from onnx_dl.protocol.failures import Failure
from onnx_dl.supervisor.policy.orders import Outbox
from onnx_dl.supervisor.policy.records import ModelRecord, WorkerRecord

_REMEMBERED: Final = 256
_EX_OSERR: Final = 71
_EX_TEMPFAIL: Final = 75
"""Status as in the module ``os``."""

_HINTS: dict[str, str] = {
    "SIGKILL": "onnx-dl did not send it: most likely the system ran out of memory, see dmesg",
    "SIGSEGV": "native code accessed invalid memory",
    "SIGABRT": "native code aborted",
    "SIGBUS": "a mapped file shrank, or shared memory ran out",
}

_OUT_OF_MEMORY = (
    "std::bad_alloc",
    "failed to allocate memory",
    "cannot allocate memory",
    "out of memory",
    "cuda_error_out_of_memory",
    "_status_alloc_failed",
)
"""Messages of the standard library, onnxruntime, the kernel, CUDA, cuDNN and cuBLAS, in lower case."""


class ExitStatus(NamedTuple):
    """End of a process: by an exit code, or by a signal, and then ``code`` is None."""

    code: int | None = 0
    signal: int | None = None
    signal_name: str = ""


class Outcomes:
    """Outcomes of the workers that were reaped last.  None stands for a worker that had drained."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._outcomes: collections.OrderedDict[int, Failure | None] = collections.OrderedDict()
        self._askers: dict[int, list[tuple[bytes, int]]] = {}

    def of(self, worker_id: int) -> Failure | None:
        """Outcome of a worker that is reaped."""
        return self._outcomes.get(worker_id)

    def wait(self, worker_id: int, client: bytes, ticket: int) -> None:
        """Notes a client that is to be told when the worker is reaped."""
        self._askers.setdefault(worker_id, []).append((client, ticket))

    def note(self, worker_id: int, outcome: Failure | None) -> None:
        """Stores the outcome of a worker that is reaped, and answers those who asked."""
        self._outcomes[worker_id] = outcome
        if len(self._outcomes) > _REMEMBERED:
            self._outcomes.popitem(last=False)
        for client, ticket in self._askers.pop(worker_id, []):
            self._outbox.answer(client, control.Outcome(ticket=ticket, failure=outcome))


def exit_failure(model: ModelRecord, worker: WorkerRecord, status: ExitStatus, stderr: str) -> Failure:
    """Failure for callers whose call ran, and for those who waited for the load."""
    about = (model.spec.name, worker.pid or 0, status, stderr)
    if worker.exceeded:
        limit = model.spec.max_memory_hard or 0
        return failures.describe(memory_exceeded(*about, limit=limit, used=worker.exceeded))
    if worker.ready is None and lacked_a_process(status):
        return failures.describe(no_process(model.spec.name, stderr))
    reason = worker.reason if worker.killed else "crash"
    if worker.early and worker.ready is None:
        return failures.describe(early_died(*about, reason=reason))
    return failures.describe(worker_died(*about, reason=reason, loading=worker.ready is None))


def ran_out_of_memory(failure: Failure | None, status: ExitStatus, stderr: str) -> bool:
    """True if a load that nobody ended failed for lack of memory, so that it may work with more of it.
    ``failure``: of the worker; None: it died before it could report one."""
    if failure is None:
        aborted = status.signal_name == "SIGABRT" and _mentions_memory(stderr)
        return status.signal_name == "SIGKILL" or aborted
    if (failure.family, failure.name) in (("builtin", "MemoryError"), ("onnx_dl", SharedMemoryError.code)):
        return True
    texts = [arg for arg in failure.args if isinstance(arg, str)]
    return failure.family != "onnx_dl" and any(map(_mentions_memory, texts))


def wants_more_memory(status: ExitStatus) -> bool:
    """True if a saver ended because it may not take the memory that it needs."""
    return status.code == _EX_TEMPFAIL


def _mentions_memory(text: str) -> bool:
    return any(phrase in text.lower() for phrase in _OUT_OF_MEMORY)


def lacked_a_process(status: ExitStatus) -> bool:
    """True if a worker ended because it could not have a thread or process."""
    return status.code == _EX_OSERR


def no_process(model: str, stderr: str) -> ProcessesExhausted:
    """Makes the error for such a worker, with the last line that it wrote."""
    said = [line for line in stderr.splitlines() if line.strip()]
    return ProcessesExhausted(f"{model} was not loaded. {said[-1] if said else ''}".rstrip())


def worker_died(
    model: str, pid: int, status: ExitStatus, stderr: str, *, reason: str, loading: bool
) -> WorkerDied:
    """Makes the error for a worker that ended."""
    when = "while it loaded" if loading else "before it answered"
    text = f"The worker of {model} (pid {pid}) ended {when}: {_how(status, reason)}."
    if reason == "crash":
        text += " The next call loads the model again."
    text += _last_lines(stderr)
    return WorkerDied(
        text, pid=pid, exit_code=status.code, signal=status.signal, stderr=stderr, reason=reason
    )


def early_died(model: str, pid: int, status: ExitStatus, stderr: str, *, reason: str) -> WorkerDied:
    """Makes the error for a worker that had started early, and ended before its load began."""
    text = f"The worker of {model} (pid {pid}) ended before its load began: {_how(status, reason)}."
    text += f" The load begins in another process.{_last_lines(stderr)}"
    return WorkerDied(
        text, pid=pid, exit_code=status.code, signal=status.signal, stderr=stderr, reason=reason
    )


def memory_exceeded(
    model: str, pid: int, status: ExitStatus, stderr: str, *, limit: int, used: int
) -> MemoryLimitExceeded:
    """Makes the error for a worker that ended itself because it had ``used`` bytes."""
    text = (
        f"The worker of {model} (pid {pid}) ended itself during a run: its own memory was {used / 1e6:.1f} "
        f"MB, and max_memory_hard is {limit / 1e6:.1f} MB. Raise max_memory_hard, or use smaller inputs. "
        f"The next call loads the model again.{_last_lines(stderr)}"
    )
    code, number = status.code, status.signal
    return MemoryLimitExceeded(
        text, limit=limit, used=used, pid=pid, exit_code=code, signal=number, stderr=stderr
    )


def _last_lines(stderr: str) -> str:
    return f" Its last lines on stderr:\n{stderr.strip()}" if stderr.strip() else ""


def _how(status: ExitStatus, reason: str) -> str:
    if reason == "request":
        return "unload(force=True) was called"
    if reason == "exit":
        return "its host shut down"
    if status.signal is None:
        return f"exit code {status.code}"
    hint = _HINTS.get(status.signal_name)
    return f"{status.signal_name}, {hint}" if hint else status.signal_name
