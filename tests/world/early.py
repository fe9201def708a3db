"""Processes that start before their loads: what must hold when they end."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Mapping

from onnx_dl.core.lifecycle import ModelState
from onnx_dl.errors import CapacityError
from onnx_dl.protocol import control as m
from onnx_dl.supervisor.policy.scheduler import Scheduler
from tests.world.workers import FakeWorker


class EarlyProcesses:
    """No load fails for its early start, and none starts early twice if the first process was lost."""

    def __init__(self) -> None:
        self.waiting: set[int] = set()
        """Workers whose loads are still pending."""
        self.dying: set[int] = set()
        """Those that were killed meanwhile."""
        self.unlucky: set[str] = set()
        """Pending loads that have lost such a process."""
        self.refused: set[int] = set()
        """Tickets of those who were told that there is no memory."""
        self.seen: collections.Counter[str] = collections.Counter()
        self._all: set[int] = set()

    def follow(self, s: Scheduler) -> set[int]:
        """Something has happened.  Returns the workers whose loads are pending no more."""
        before, self.waiting = self.waiting, set()
        self.unlucky &= s.admission.pending.keys()
        for model, worker in s.fleet.workers():
            assert worker.waits or worker.id not in self.dying, "a load begins in a process that was killed"
            if worker.waits:
                self.waiting.add(worker.id)
                self.dying |= {worker.id} if worker.is_ending else set()
                assert model.key not in self.unlucky, f"{model.key} starts early again"
        self.seen["started"] += len(self.waiting - before)
        self._all |= self.waiting
        return before - self.waiting

    def denied(self, message: m.Denied) -> None:
        """Somebody is told why there is no model."""
        if message.failure.name == CapacityError.code:
            self.refused.add(message.ticket)

    @contextlib.contextmanager
    def ends(self, s: Scheduler, worker: FakeWorker, open_: Mapping[int, object]) -> Iterator[None]:
        """Within: a worker is reaped, or never had a process.  ``open_``: who waits, by ticket."""
        found = s.fleet.find(worker.id)
        if found is None or worker.id not in self._all or worker.began:
            yield
            return
        model, record = found
        if model.state is not ModelState.LOADING:
            self.seen["ended by the scheduler"] += 1
            waited = record.waits and model.key in s.admission.pending
            yield
            if waited and record.failure is not None and model.key in s.admission.pending:
                self.seen["lost, then ended by the scheduler"] += 1
                self.unlucky.add(model.key)
            return
        self.seen["lost while its load waited" if record.waits else "lost after Load"] += 1
        self.seen["hung"] += worker.hung
        before = model.failures, model.retry_at
        asked = {ask.ticket for _, ask in model.waiters} & open_.keys()  # some may have stopped waiting
        capacity = s.admission._capacity
        could_fit = capacity.could_fit(capacity.plan(model).need)  # the limits may be lower than at its Load
        yield
        assert (model.failures, model.retry_at) == before, "this is no failure of the model"
        assert model.state in (ModelState.UNLOADED, ModelState.LOADING)
        failed = asked - open_.keys()
        assert not failed or (not could_fit and failed <= self.refused), (
            "a load has failed for its early start"
        )
        self.seen["too large for lower limits"] += bool(failed)
        if model.key in s.admission.pending:
            self.unlucky.add(model.key)
