"""Failed loads: whether a load is repeated, how long the next one has to wait, who is answered."""

from __future__ import annotations

import dataclasses
from typing import Final

from onnx_dl.core.events import EventType
from onnx_dl.supervisor.policy.capacity import Limits
from onnx_dl.supervisor.policy.exit_reasons import ExitStatus, ran_out_of_memory
from onnx_dl.supervisor.policy.leases import Leases
from onnx_dl.supervisor.policy.measuring import Measurements
from onnx_dl.supervisor.policy.outcomes import exit_failure
from onnx_dl.supervisor.policy.records import ModelRecord, WorkerRecord
from onnx_dl.supervisor.policy.worker_control import WorkerControl

_LONGEST_BACKOFF: Final = 60.0


@dataclasses.dataclass(frozen=True, eq=False)
class LoadFailures:
    """Handles models that became FAILED."""

    limits: Limits
    control: WorkerControl
    leases: Leases
    measurements: Measurements

    def handle(
        self, model: ModelRecord, worker: WorkerRecord, status: ExitStatus, stderr: str, now: float
    ) -> None:
        """Repeats the load, or answers the waiters."""
        model.last_failure = worker.failure or exit_failure(model, worker, status, stderr)
        spec = model.waiters[0][1].spec if model.waiters else model.spec
        if worker.unsaved and model.waiters:
            self.measurements.forget_saved(model)
            self._note(model, worker, 0.0, now)
            self.control.want(model, spec, now)
        elif _may_succeed_later(model, worker, status, stderr):
            self._note(model, worker, 0.0, now)
            again = self.control.admission.want_again(model, spec, now, alone=not worker.outgrew)
            self.control.carry_out(again)
        else:
            self._give_up(model, worker, now)

    def _give_up(self, model: ModelRecord, worker: WorkerRecord, now: float) -> None:
        """Denies those who wait, except for members of a group that were not in this load.  The next load may
        begin at once after the first failure, then after 1, 2, 4 ... seconds."""
        lived = now - worker.ready_at if worker.ready_at is not None else 0.0
        model.failures = 1 if lived > self.limits.settings.stable_after else model.failures + 1
        if worker.exceeded or worker.outgrew:  # due to a call's input, or to others: a wait would not help
            model.failures = 0
        delay = min(_LONGEST_BACKOFF, 2.0 ** (model.failures - 2)) if model.failures > 1 else 0.0
        model.second_try = False
        self._note(model, worker, delay, now)
        for client, ask in model.take_waiters(lambda _, ask: model.serves(ask)):
            self.leases.deny_failed(model, client, ask.ticket, now)

    def _note(self, model: ModelRecord, worker: WorkerRecord, delay: float, now: float) -> None:
        """Announces a failure after which the next load has to wait for ``delay`` seconds."""
        model.retry_at = now + delay
        failure = model.last_failure
        detail = None if failure is None else str(failure.args[0]) if failure.args else failure.name
        event = self.control.announcements.event
        self.control.outbox.add(event(EventType.FAILED, model, worker, now, detail=detail, retry_after=delay))


def _may_succeed_later(model: ModelRecord, worker: WorkerRecord, status: ExitStatus, stderr: str) -> bool:
    """Whether a load failed that may succeed when other models have made way."""
    if worker.ready is not None or model.second_try or not model.waiters:
        return False
    is_ours = worker.killed or worker.exceeded > 0
    ran_out = not is_ours and ran_out_of_memory(worker.failure, status, stderr)
    return worker.outgrew or ran_out
