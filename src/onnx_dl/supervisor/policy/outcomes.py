"""How workers ended.  Remembered for a while, for callers that lost their worker."""

from __future__ import annotations

import collections
from typing import Final

from onnx_dl.protocol import control, failures
from onnx_dl.supervisor.policy import exit_reasons
from onnx_dl.supervisor.policy.exit_reasons import ExitStatus
from onnx_dl.supervisor.policy.records import ModelRecord, WorkerRecord

_REMEMBERED: Final = 256


class Outcomes:
    """Outcomes of the workers that were reaped last.  None stands for a worker that had drained."""

    def __init__(self) -> None:
        self._outcomes: collections.OrderedDict[int, failures.Failure | None] = collections.OrderedDict()
        self._askers: dict[int, list[tuple[bytes, int]]] = {}

    def of(self, worker_id: int) -> failures.Failure | None:
        """Outcome of a worker that is reaped."""
        return self._outcomes.get(worker_id)

    def wait(self, worker_id: int, client: bytes, ticket: int) -> None:
        """Notes a client that is to be told when the worker is reaped."""
        self._askers.setdefault(worker_id, []).append((client, ticket))

    def note(self, worker_id: int, outcome: failures.Failure | None) -> list[tuple[bytes, control.Outcome]]:
        """Stores the outcome of a worker that is reaped.  Returns the answers to those who asked."""
        self._outcomes[worker_id] = outcome
        while len(self._outcomes) > _REMEMBERED:
            self._outcomes.popitem(last=False)
        asked = self._askers.pop(worker_id, [])
        return [(client, control.Outcome(ticket=ticket, failure=outcome)) for client, ticket in asked]


def exit_failure(
    model: ModelRecord, worker: WorkerRecord, status: ExitStatus, stderr: str
) -> failures.Failure:
    """Failure for callers whose call ran, and for those who waited for the load."""
    about = (model.spec.name, worker.pid or 0, status, stderr)
    if worker.exceeded:
        limit = model.spec.max_memory_hard or 0
        return failures.describe(exit_reasons.memory_exceeded(*about, limit=limit, used=worker.exceeded))
    if worker.ready is None and exit_reasons.lacked_a_process(status):
        return failures.describe(exit_reasons.no_process(model.spec.name, stderr))
    reason = worker.reason if worker.killed else "crash"
    return failures.describe(exit_reasons.worker_died(*about, reason=reason, loading=worker.ready is None))
