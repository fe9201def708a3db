"""What must hold of a scheduler at any time, whatever has happened: looked at from inside."""

from __future__ import annotations

from onnx_dl.core.lifecycle import ModelState
from onnx_dl.supervisor.policy.memory_amount import NOTHING
from onnx_dl.supervisor.policy.records import HOST, ModelRecord
from onnx_dl.supervisor.policy.scheduler import Scheduler

_NEXT = {
    None: {"loading"},
    "loading": {"ready", "draining", "failed", "unloaded"},
    "ready": {"draining", "unloaded", "outdated", "thrash"},
    "draining": {"unloaded"},
    "unloaded": {"failed"},
    "failed": set(),
}
"""Which event of one worker may follow which; ``outdated`` and ``thrash`` change nothing.  What is unloaded
while it loads had started early."""


class Events:
    """The order of the events of all workers."""

    def __init__(self) -> None:
        self.seq = 0
        self.last: dict[int, str] = {}
        self.crashed: set[int] = set()
        self.current: dict[str, int] = {}

    def take(self, event: object) -> None:
        self.seq += 1
        assert event.seq == self.seq, "events are numbered without a gap"
        before, kind, worker = self.last.get(event.worker_id), str(event.type), event.worker_id
        if kind == "outdated" and before in ("ready", "draining"):
            return
        assert kind in _NEXT[before], f"{kind} after {before} of worker {worker}"
        if kind == "loading":
            assert event.key not in self.current, f"two workers of {event.key}"
            self.current[event.key] = worker
        if kind == "thrash":
            return
        if kind == "failed" and before == "unloaded":
            assert worker in self.crashed, "only what crashed while it was ready fails after it is unloaded"
        if kind == "unloaded":
            assert (event.reason == "crash") == (before in ("ready", "loading")), (
                f"{event.reason} after {before}"
            )
            assert (event.freed or 0) >= 0 and event.seconds >= 0
            if before == "ready":
                self.crashed.add(worker)
        if kind == "failed":
            assert event.retry_after >= 0
        self.last[worker] = kind
        if kind in ("unloaded", "failed"):
            self.current.pop(event.key, None)


def check(s: Scheduler, now: float, gone: set[bytes], open_: dict[int, tuple[bytes, str]]) -> None:
    """``gone``: clients that are not there; ``open_``: who waits for which answer, by ticket."""
    waiting: dict[int, int] = {}
    for model in s.fleet.models.values():
        _check_model(s, model, gone)
        for _, ask in model.waiters:
            waiting[ask.ticket] = waiting.get(ask.ticket, 0) + 1
    for ticket, (client, what) in open_.items():
        assert (client, ticket) in s.outbox.tickets
        if what == "acquire":
            assert waiting.get(ticket) == 1, f"who asked with ticket {ticket} is lost"
    assert len(s.outbox.tickets) == len(open_), "somebody is thought to wait who does not"
    unloading = {ticket for model in s.fleet.models.values() for _, ticket in model.unloaders}
    assert {t for t, (_, what) in open_.items() if what == "unload"} <= unloading, "an unload is lost"
    asked = {t for askers in s.outcomes._askers.values() for _, t in askers}
    assert {t for t, (_, what) in open_.items() if what == "outcome"} <= asked, "a question is lost"
    assert set(s.outcomes._askers) <= set(s.fleet.by_worker), "an outcome is waited for that nobody will tell"
    _check_ledger(s, now)


def _check_model(s: Scheduler, model: ModelRecord, gone: set[bytes]) -> None:
    worker = model.worker
    assert (worker is None) == (model.state in (ModelState.UNLOADED, ModelState.FAILED))
    if worker is None:
        assert not model.leases, "a lease of a worker that is gone"
        assert not model.unloaders, "an unload that nobody will answer"
        if model.waiters:
            assert model.key in s.admission.pending, f"nobody sees to the load of {model.key}"
        kept = model.waiters or model.state is ModelState.FAILED or s.shutdown.closing
        assert kept, f"{model.key} is kept for nobody"
    else:
        assert s.fleet.by_worker[worker.id] is model
    if model.state is ModelState.READY:
        assert not model.waiters, "somebody waits for what is ready"
        assert model.leases, f"{model.key} is ready for nobody"
        assert worker.sent_ttl == model.ttl, "the worker is told another TTL than the one in force"
    holders = {client for client, _ in model.leases} | {client for client, _ in model.waiters}
    assert not holders & gone, "somebody who is gone holds or waits for a model"
    assert not set(model.named) & gone


def _check_ledger(s: Scheduler, now: float) -> None:
    live = set(s.fleet.by_worker)
    assert set(s.fleet.ledger._booked) <= live and set(s.fleet.ledger._reserved) <= live, (
        "memory of who is gone counts"
    )
    for worker_id in live:
        counted = s.fleet.ledger.counted(worker_id)
        assert NOTHING.fits(counted), "less than nothing is held"
    used = s.in_use(now)
    assert NOTHING.fits(used)
    if not live and s.saves._running is None:
        assert used.ram == 0
    assert set(s.admission.pending) <= set(s.fleet.models), "a load is wished for that nobody waits for"


def check_promise(s: Scheduler, now: float) -> None:
    """A load or a save has just begun: with all that it was promised, nothing exceeds the limit."""
    used, limit = s.in_use(now), s.limits.memory
    assert used.fits(limit), f"{used} are promised of {limit}"


def check_time(s: Scheduler, now: float) -> None:
    """All that was due was done just now: nothing is due, and what waits has a time at which it ends."""
    at = s.next_deadline()
    assert at is None or at > now, f"a timer of {at} is due for ever, it is {now}"
    if s.admission.pending:
        assert at is not None, "somebody waits for room, and nobody will look"
    for model in s.fleet.by_worker.values():
        if model.worker.waits and model.state is ModelState.LOADING:
            assert model.key in s.admission.pending, "a process has started for a load that nobody wants"
        if model.worker.ready is None and model.worker.failure is None and not model.worker.killed:
            assert at is not None, "a load is under way that nobody will end"


def check_end(s: Scheduler, now: float) -> None:
    """Nobody holds anything."""
    assert not s.fleet.by_worker and not s.admission.pending and not len(s.outbox.tickets)
    assert all(model.state is ModelState.FAILED for model in s.fleet.models.values())
    assert not any(model.named.keys() - {HOST} for model in s.fleet.models.values())
    assert s.in_use(now + 5.0) == NOTHING, "memory is counted that nobody has"
    assert s.next_deadline() is None
