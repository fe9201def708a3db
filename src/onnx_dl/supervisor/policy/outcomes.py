"""How workers ended: remembered for a while, and told to callers who lost one, also before it is known.

Pure.  How an end is worded is :mod:`onnx_dl.supervisor.policy.exit_reasons`'s.
"""

from __future__ import annotations

import collections
from typing import Final

from onnx_dl.protocol import control, failures
from onnx_dl.supervisor.policy import exit_reasons
from onnx_dl.supervisor.policy.records import Model, Worker

_REMEMBERED: Final = 256


class Fates:
    """Of the workers that were reaped last; None is the fate of one that had drained."""

    def __init__(self) -> None:
        self._fates: collections.OrderedDict[int, failures.Failure | None] = collections.OrderedDict()
        self._askers: dict[int, list[tuple[bytes, int]]] = {}

    def of(self, worker_id: int) -> failures.Failure | None:
        """How a worker ended that is not there any more."""
        return self._fates.get(worker_id)

    def wait(self, worker_id: int, client: bytes, ticket: int) -> None:
        """A client is to be told when the worker is reaped."""
        self._askers.setdefault(worker_id, []).append((client, ticket))

    def note(self, worker_id: int, fate: failures.Failure | None) -> list[tuple[bytes, control.Fate]]:
        """The worker is reaped.  Returns what to tell whom."""
        self._fates[worker_id] = fate
        while len(self._fates) > _REMEMBERED:
            self._fates.popitem(last=False)
        asked = self._askers.pop(worker_id, [])
        return [(client, control.Fate(ticket=ticket, failure=fate)) for client, ticket in asked]


def death(model: Model, worker: Worker, status: int, stderr: str) -> failures.Failure:
    """What a caller is told whose call ran, or who waited for the load.  ``status`` is the wait status."""
    who = (model.spec.name, worker.pid or 0, status, stderr)
    if worker.exceeded:
        limit = model.spec.max_memory_hard or 0
        return failures.describe(exit_reasons.memory_exceeded(*who, limit=limit, used=worker.exceeded))
    if worker.ready is None and exit_reasons.lacked_a_process(status):
        return failures.describe(exit_reasons.lacked(model.spec.name, stderr))
    reason = worker.reason if worker.killed else "crash"
    return failures.describe(exit_reasons.worker_died(*who, reason=reason, loading=worker.ready is None))
