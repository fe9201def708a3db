"""Loads that wait for memory, and the workers that make way for them.

When a load does not fit, the loop looks at all workers: what they hold, and since when they are idle.  The
rules are :mod:`onnx_dl.supervisor.policy.eviction`'s.  A worker leaves only if it is still idle when the
order reaches it, so no call is interrupted.  While a load waits, the loop looks every 50 ms.

After a limit was lowered, the loop looks until the models fit it: a model that is busy, or was loaded a
moment ago, leaves later.  This has a time of its own: the looks for loads end when no load waits any more.

Loads wait in order.  Only the first one can time out.  It is refused then, the others are looked at, and the
next one that has to wait is first from then on, for a second at least, so that others can make way.  So a
load that fits is never refused because one before it did not fit.

Decisions are yielded one by one, when the records are changed already.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Mapping
from typing import Final

from onnx_dl.core.lifecycle import ModelState
from onnx_dl.core.spec import ModelSpec
from onnx_dl.protocol import failures
from onnx_dl.supervisor.policy import eviction
from onnx_dl.supervisor.policy.cache_saves import CacheSaves
from onnx_dl.supervisor.policy.capacity import Capacity, Limits
from onnx_dl.supervisor.policy.commands import EndSaver, StartSaver
from onnx_dl.supervisor.policy.decisions import (
    BeginLoad,
    ContinueLoad,
    Decision,
    DenyLoad,
    Evict,
    WithdrawStart,
)
from onnx_dl.supervisor.policy.early_starts import EarlyStarts
from onnx_dl.supervisor.policy.eviction import Candidate, LoadPlan, Verdict
from onnx_dl.supervisor.policy.fleet import Fleet
from onnx_dl.supervisor.policy.measuring import LoadWeighing, Sample
from onnx_dl.supervisor.policy.memory_amount import NOTHING
from onnx_dl.supervisor.policy.records import ModelRecord
from onnx_dl.supervisor.policy.use_counts import UseCounts

_LOOK_EVERY: Final = 0.05
_SHRINK_EVERY: Final = 1.0
"""Longest time in seconds between looks while no model can leave; they begin at 50 ms."""
_RESIDENCY: Final = 2.0
_RESIDENCY_MAX: Final = 0.5
"""Time for which a new worker stays while it is in use, in durations of its load, and in seconds; the smaller
counts.  So two models that are in use and do not fit together do not only load."""
_PAUSE: Final = 0.25
"""Time without use, in durations of its load, after which a new worker is no longer in use."""
_RAISE: Final = 1.5
"""Factor for the memory of a load that ran out of memory."""
_CHANCE: Final = 1.0
"""Seconds that a load is first at least before it times out, if others before it did."""


@dataclasses.dataclass
class PendingLoad:
    """A load that waits for memory."""

    spec: ModelSpec
    until: float
    alone: bool = False
    """Evict all idle models first: a load ran out of memory below the limit."""
    first_since: float | None = None
    """Time since which no other load is before it; None: one is, or it was not looked at yet."""
    may_start_early: bool = True
    """False: its process started early once, and ended, or was too large."""

    def ends(self, timeout: float) -> float:
        """Time when it times out, now that it is the first."""
        since = self.until if self.first_since is None else self.first_since + min(_CHANCE, timeout)
        return max(self.until, since)


@dataclasses.dataclass(eq=False)
class Admission:
    """Decides when a pending load may begin."""

    _fleet: Fleet
    _limits: Limits
    _capacity: Capacity
    _weighing: LoadWeighing
    _saves: CacheSaves
    _early: EarlyStarts
    pending: dict[str, PendingLoad] = dataclasses.field(default_factory=dict)
    """Pending loads by key of the model, in order of arrival."""
    _uses: UseCounts = dataclasses.field(default_factory=UseCounts)
    _look_at: float | None = None
    """Time of the next look for pending loads."""
    _shrink_at: float | None = None
    """Time of the next look for a lowered limit; None: the models fit it."""
    _shrink_pause: float = _LOOK_EVERY

    def want(
        self, model: ModelRecord, spec: ModelSpec, now: float, *, lost: bool = False
    ) -> Iterator[Decision]:
        """Adds a load, and begins it if there is memory.  ``lost``: its process started early and has ended.
        It waits on in its place, or before all others if it had its turn, and does not start early again.
        """
        if model.key not in self.pending:
            load = {model.key: PendingLoad(spec, now + self._timeout)}
            self.pending = load | self.pending if lost else self.pending | load
            if not lost:
                model.wanted_at, model.second_try = now, False
        if lost:
            self.pending[model.key].may_start_early = False
        yield from self.admit(now)

    def want_again(
        self, model: ModelRecord, spec: ModelSpec, now: float, *, alone: bool
    ) -> Iterator[Decision]:
        """Adds a load that ran out of memory, before all others.  ``alone``: it waits until all idle models
        are gone."""
        model.second_try = True
        model.at_least = self._capacity.raised(model, _RAISE)
        self.pending.pop(model.key, None)
        self.pending = {model.key: PendingLoad(spec, now + self._timeout, alone)} | self.pending
        yield from self.admit(now)

    def admit(self, now: float, idle: Mapping[int, float] | None = None) -> Iterator[Decision]:
        """Begins the loads that fit, in order, and refuses those that never will.  ``idle``: seconds without
        use by worker, if all workers were just looked at."""
        waits = False
        for key, load in list(self.pending.items()):
            model = self._fleet.models.get(key)
            if model is None or not model.waiters or (model.worker is not None and not model.worker.waits):
                del self.pending[key]
            else:
                waits = (yield from self._consider(model, load, idle, now, is_first=not waits)) or waits
        if not waits:
            self._look_at = None
            self._saves.schedule_look(now)

    def _consider(
        self,
        model: ModelRecord,
        load: PendingLoad,
        idle: Mapping[int, float] | None,
        now: float,
        *,
        is_first: bool,
    ) -> Generator[Decision, None, bool]:
        """Returns whether the load goes on waiting."""
        plan = self._capacity.plan(model)
        if not self._capacity.could_fit(plan.need):
            yield from self._refuse(model, load, plan, now)
            return False
        if not is_first:
            load.first_since = None  # a load that is repeated goes before those that were first
            yield from self._early.make_way(model, now)
            return True
        if model.worker is not None and (model.state is not ModelState.LOADING or model.worker.is_ending):
            return True  # an early start that was withdrawn or killed has not ended yet
        if load.alone or not (self._early.others(model, now) + plan.need).fits(self._limits.memory):
            yield from self.end_saver()
        verdict, evicted = self._decide(model, load, plan, idle, now)
        if verdict is Verdict.LOAD:
            del self.pending[model.key]
            early, worker = model.worker, model.worker or self._fleet.start_worker(model, load.spec, now)
            worker.waits, worker.started = False, now
            self._weighing.begin(worker, plan, now)
            self._uses.note_load(model.key, now)
            yield BeginLoad(model, worker) if early is None else ContinueLoad(model, worker)
            return False
        load.first_since = now if load.first_since is None else load.first_since
        if model.worker is not None and not self._capacity.in_use(now).fits(self._limits.memory):
            load.may_start_early = False  # the limits are lower now, or something takes more than was known
            yield from self._early.withdraw(model, now)
        # Wait for a worker that has just come, rather than evict one that is worth more.
        until = max((self._stays_until(each, (idle or {})[each], now) for each in evicted), default=now)
        if load.alone or until <= now:
            yield from map(Evict, evicted)
        if self._look_at is None:
            self._look_at = now
        elif until > now:
            self._look_at = min(self._look_at, until)
        return True

    def _decide(
        self,
        model: ModelRecord,
        load: PendingLoad,
        plan: LoadPlan,
        idle: Mapping[int, float] | None,
        now: float,
    ) -> tuple[Verdict, list[int]]:
        candidates, leaving = self._candidates(idle or {}), self._capacity.leaving(now)
        if load.alone:
            if candidates:
                return Verdict.EVICT, [candidate.worker_id for candidate in candidates]
            if idle is None or leaving != NOTHING or self._fleet.any_drains():
                return Verdict.WAIT, []
        return eviction.decide(
            plan.need, self._limits.memory, self._early.others(model, now), leaving, candidates
        )

    def start_early(self, now: float) -> Iterator[Decision]:
        """Starts the process of the first load, if it fits beside a worker that is leaving."""
        for key, load in list(self.pending.items())[:1]:
            model = self._fleet.models.get(key)
            if model is not None and load.may_start_early and not load.alone:
                yield from self._early.begin(model, load.spec, now)

    def _refuse(
        self, model: ModelRecord, load: PendingLoad, plan: LoadPlan, now: float
    ) -> Iterator[DenyLoad | WithdrawStart]:
        if load.alone and model.last_failure is not None:  # says more than that there is no memory
            failure = model.with_retry(model.last_failure, now)
        else:
            failure = failures.describe(self._capacity.refusal(model, plan, now))
        del self.pending[model.key]
        waiters = model.take_waiters()
        model.second_try, model.at_least = False, NOTHING
        self._fleet.forget_if_unused(model)
        yield DenyLoad(waiters, failure)
        yield from self._early.withdraw(model, now)

    def end_saver(self) -> Iterator[EndSaver]:
        """Ends the saver, which is the first to make way."""
        if self._saves.end():
            yield EndSaver()

    @property
    def _timeout(self) -> float:
        return self._limits.settings.room_timeout

    def wants_look(self, now: float) -> bool:
        """True if :meth:`look` is due, for which all workers are to be measured."""
        return any(_is_due(at, now) for at in self._looks())

    def look_soon(self, now: float) -> None:
        """Asks for a look: the limits may have changed."""
        self._shrink_at, self._shrink_pause = now, _LOOK_EVERY

    def next_deadline(self) -> float | None:
        """Time when the next look is due, or the first load times out."""
        ends = [load.ends(self._timeout) for load in self._first()]
        return min([*ends, *(at for at in self._looks() if at is not None)], default=None)

    def _looks(self) -> tuple[float | None, ...]:
        return self._look_at, self._shrink_at, self._saves.look_at

    def refuse_late(self, now: float) -> Iterator[Decision]:
        """Refuses the first load if it has timed out, then looks at all behind it before the next may."""
        while any(load.ends(self._timeout) <= now for load in self._first()):
            key, load = next(iter(self.pending.items()))
            if (model := self._fleet.models.get(key)) is None:
                del self.pending[key]
            else:
                yield from self._refuse(model, load, self._capacity.plan(model), now)
            yield from self.admit(now)

    def look(self, samples: Mapping[int, Sample], now: float) -> Iterator[Decision]:
        """Decides again after all workers were measured, and starts a saver if there is memory for it."""
        idle = {
            worker_id: max(0.0, now - reading.last_used)
            for worker_id, (_, reading) in samples.items()
            if reading.last_used and not reading.busy
        }
        for model, worker in self._fleet.workers():
            if (sample := samples.get(worker.id)) is not None and sample.reading.last_used:
                self._uses.note_use(model.key, sample.reading.last_used)
        if _is_due(self._look_at, now):
            self._look_at = now + _LOOK_EVERY
            yield from self.admit(now, idle)
            yield from self.start_early(now)
        if _is_due(self._shrink_at, now):
            yield from self._shrink(idle, now)
        in_use = self._capacity.in_use(now)
        if not in_use.fits(self._limits.memory):
            yield from self.end_saver()
        free = NOTHING if self.pending else self._limits.memory - in_use
        if (request := self._saves.start(free, self._limits.memory, now)) is not None:
            yield StartSaver(request)

    def _shrink(self, idle: Mapping[int, float], now: float) -> Iterator[Decision]:
        """Evicts idle models while more is in use than a lowered limit allows, and asks for the next look."""
        limit = self._limits.memory
        if not self._capacity.in_use(now).fits(limit):
            yield from self.end_saver()
        in_use, leaving = self._capacity.in_use(now), self._capacity.leaving(now)
        if in_use.fits(limit):
            self._shrink_at = None
            return
        self._shrink_at = now + self._shrink_pause
        self._shrink_pause = min(2 * self._shrink_pause, _SHRINK_EVERY)
        if not self.pending and not (in_use - leaving).fits(limit):  # else loads decide what leaves
            candidates = self._candidates(idle)
            _, evicted = eviction.decide(NOTHING, limit, in_use, leaving, candidates)
            yield from map(Evict, evicted or [candidate.worker_id for candidate in candidates])

    def drop_all(self) -> list[ModelRecord]:
        """Removes all pending loads, and asks for no look.  Returns the models that waited."""
        models = [self._fleet.models[key] for key in self.pending if key in self._fleet.models]
        self.pending.clear()
        self._look_at = self._shrink_at = self._saves.look_at = None
        return models

    def _first(self) -> list[PendingLoad]:
        """The load that is served next, if any."""
        return list(self.pending.values())[:1]

    def _stays_until(self, worker_id: int, idle_for: float, now: float) -> float:
        """Time until which a worker is new and in use."""
        found = self._fleet.find(worker_id)
        assert found is not None and found[1].ready_at is not None
        ready_at, took = found[1].ready_at, found[1].ready_at - found[1].started
        return min(ready_at + min(_RESIDENCY * took, _RESIDENCY_MAX), now - idle_for + _PAUSE * took)

    def _candidates(self, idle: Mapping[int, float]) -> list[Candidate]:
        """Workers that may be evicted, of those that are idle."""
        counted, uses = self._fleet.ledger.counted, self._uses.of
        return [
            Candidate(
                worker_id=worker.id,
                held=counted(worker.id),
                idle_for=idle[worker.id],
                seconds=worker.ready.seconds,
                priority=model.priority,
                uses=uses(model.key),
            )
            for model, worker in self._fleet.workers()
            if worker.id in idle and worker.ready and model.state is ModelState.READY and not model.is_pinned
        ]


def _is_due(at: float | None, now: float) -> bool:
    return at is not None and at <= now
