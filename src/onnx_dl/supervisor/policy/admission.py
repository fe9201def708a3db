"""Loads that wait for memory, and who is asked to make way: the scheduler's part that knows of waiting.

Pure like the scheduler.  When a load does not fit, the loop is to look at all workers: what they hold, and
since when they are idle.  That decides (:mod:`onnx_dl.supervisor.policy.eviction`).  A worker leaves only if it is
still idle when it hears of it, so nobody's call is ever in the way.  While somebody waits, the loop looks
every 50 ms.

Loads wait in order.  Only the time of the first one can be up: it is refused then, the others are looked at,
and the next one that has to wait is first from now on, with a second at least for somebody to make way.  So a
load that fits is never refused because one before it did not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Final

from onnx_dl.core.lifecycle import ModelState
from onnx_dl.core.settings import Settings
from onnx_dl.core.spec import ModelSpec
from onnx_dl.protocol import codec, control, failures
from onnx_dl.supervisor.policy import eviction
from onnx_dl.supervisor.policy.commands import StartSaver
from onnx_dl.supervisor.policy.eviction import Answer, Candidate, Plan
from onnx_dl.supervisor.policy.measuring import Measuring, Seen
from onnx_dl.supervisor.policy.records import Model
from onnx_dl.supervisor.policy.requirements import NOTHING, Bytes, Known

_LOOK_EVERY: Final = 0.05
_RESIDENCY: Final = 0.5
"""Seconds that a worker stays at least, so that two models that do not fit together do not only load."""
_RAISE: Final = 1.5
"""How much more a load gets that ran out of memory with what it was thought to need."""
_CHANCE: Final = 1.0
"""Seconds that a load is first at least before its time is up, if others before it had theirs."""


@dataclasses.dataclass
class _Wish:
    spec: ModelSpec
    until: float
    alone: bool = False
    """All who are idle leave first, because there was too little memory without a limit that said so."""
    first_since: float | None = None
    """Since when no other wish is before it; None: one is, or nobody has looked yet."""

    def ends(self, patience: float) -> float:
        """When its time is up, now that it is the first."""
        since = self.until if self.first_since is None else self.first_since + min(_CHANCE, patience)
        return max(self.until, since)


class Admission(Measuring):
    """Decides when a load that was wished for may begin."""

    def __init__(
        self,
        settings: Settings,
        memory: int | None = None,
        known: Known | None = None,
        is_saved: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """As :class:`~onnx_dl.supervisor.policy.measuring.Measuring`."""
        super().__init__(settings, memory, known, is_saved)
        self._wishes: dict[str, _Wish] = {}
        """In the order in which they came."""
        self._idle: dict[int, float] = {}
        """Seconds without use by worker, during a look."""
        self._looking = False
        self._look_at: float | None = None

    # --- what the scheduler does for it -------------------------------------------------------------------

    def _load(self, model: Model, spec: ModelSpec, now: float) -> None:
        raise NotImplementedError

    def _order(self, worker_id: int, message: codec.Message) -> None:
        raise NotImplementedError

    def _tell(self, client: bytes, message: codec.Message) -> None:
        raise NotImplementedError

    def _deny(self, client: bytes, ticket: int, model: Model, now: float) -> None:
        raise NotImplementedError

    def _forget_if_idle(self, model: Model) -> None:
        raise NotImplementedError

    # --- wishes -------------------------------------------------------------------------------------------

    def _want(self, model: Model, spec: ModelSpec, now: float) -> None:
        """The model is to be loaded as soon as there is room."""
        if model.key not in self._wishes:
            self._wishes[model.key] = _Wish(spec, now + self._patience)
            model.wished_at, model.second_try = now, False
        self._admit(now)

    def _want_again(self, model: Model, spec: ModelSpec, now: float, *, alone: bool) -> None:
        """A load ran out of memory: the model is to be loaded before anybody else, when there is more of it;
        ``alone``: when all who are idle are gone."""
        need = self._plan(model).need
        model.second_try = True
        more = Bytes(int(need.ram * _RAISE), int(need.gpu * _RAISE))
        model.at_least = more.least(self._left()).most(need)
        self._wishes = {model.key: _Wish(spec, now + self._patience, alone)} | self._wishes
        self._admit(now)

    def _admit(self, now: float) -> None:
        """Begins the loads that there is room for, in the order in which they were wished for, and refuses
        those that will never have any."""
        waits = False
        for key, wish in list(self._wishes.items()):
            model = self._models.get(key)
            if model is None or not model.waiters or model.worker is not None:
                del self._wishes[key]
            else:
                waits = self._look_after(model, wish, now, is_first=not waits) or waits
        if not waits:
            self._look_at = None
            self._saving.stir(now)

    def _look_after(self, model: Model, wish: _Wish, now: float, *, is_first: bool) -> bool:
        """Whether this one goes on waiting."""
        plan = self._plan(model)
        if not (plan.need + self._stays()).fits(self._limit):
            self._refuse_room(model, wish, plan, now)
            return False
        if not is_first:
            wish.first_since = None  # a load that is made once more goes before those that were first
            return True
        answer, evicted = self._decide(wish, plan, now)
        if answer is Answer.LOAD:
            self._begin(model, wish, plan, now)
            return False
        wish.first_since = now if wish.first_since is None else wish.first_since
        # One that has just come is waited for, rather than that one leaves who is worth more.
        is_early = not wish.alone and any(self._is_new(worker_id, now) for worker_id in evicted)
        self._make_way([] if is_early else evicted, now)
        return True

    def _begin(self, model: Model, wish: _Wish, plan: Plan, now: float) -> None:
        del self._wishes[model.key]
        self._load(model, wish.spec, now)
        assert model.worker is not None
        self._promise(model.worker, plan, now)

    def _decide(self, wish: _Wish, plan: Plan, now: float) -> tuple[Answer, list[int]]:
        idle, need, in_use = self._candidates(), plan.need, self._in_use(now)
        if wish.alone or not (in_use + need).fits(self._limit):
            self._end_saver()
        if wish.alone:
            if idle:
                return Answer.EVICT, [candidate.worker_id for candidate in idle]
            if not self._looking or self._leaving(now) != NOTHING or self._any_leaves():
                return Answer.WAIT, []
        return eviction.decide(need, self._limit, in_use, self._leaving(now), idle)

    def _make_way(self, evicted: list[int], now: float) -> None:
        for worker_id in evicted:
            self._order(worker_id, control.DrainIfIdle())
        if self._look_at is None:
            self._look_at = now

    def _save(self, now: float) -> None:
        """After a look: a model is saved if there is room, and no more if there is none."""
        in_use = self._in_use(now)
        if not in_use.fits(self._limit):
            self._end_saver()
        free = NOTHING if self._wishes else self._limit - in_use
        if (wish := self._saving.start(free, self._limit, now)) is not None:
            self._out.append(StartSaver(wish))

    def _is_new(self, worker_id: int, now: float) -> bool:
        worker = self._by_worker[worker_id].worker
        assert worker is not None and worker.ready_at is not None
        return now - worker.ready_at < _RESIDENCY

    # --- time ---------------------------------------------------------------------------------------------

    def wants_look(self, now: float) -> bool:
        """Whether :meth:`on_tick` is to be told what the workers do and hold."""
        return self._is_due(self._look_at, now) or self._is_due(self._saving.look_at, now)

    @staticmethod
    def _is_due(at: float | None, now: float) -> bool:
        return at is not None and at <= now

    def _room_deadline(self) -> float | None:
        ends = [wish.ends(self._patience) for wish in self._first()]
        looks = [at for at in (self._look_at, self._saving.look_at) if at is not None]
        weighings = [at for _, at in self._weighings()]
        return min([*ends, *looks, *weighings], default=None)

    def _first(self) -> list[_Wish]:
        """The wish that is served next, if there is any."""
        return list(self._wishes.values())[:1]

    def _refuse_late(self, now: float) -> None:
        """Who has waited too long; then everybody behind is looked at before anybody else's time is up."""
        while any(wish.ends(self._patience) <= now for wish in self._first()):
            key, wish = next(iter(self._wishes.items()))
            if (model := self._models.get(key)) is None:
                del self._wishes[key]
            else:
                self._refuse_room(model, wish, self._plan(model), now)
            self._admit(now)

    def _pass_time(self, now: float, seen: Mapping[int, Seen]) -> None:
        self._refuse_late(now)
        if not self.wants_look(now):
            return
        for worker_id, each in seen.items():
            self._see(worker_id, each, now)
        if self._is_due(self._look_at, now):
            self._look_at = now + _LOOK_EVERY
            self._look(seen, now)
        self._save(now)

    def _look(self, seen: Mapping[int, Seen], now: float) -> None:
        for worker_id, each in seen.items():
            if each.reading.last_used and not each.reading.busy:
                self._idle[worker_id] = max(0.0, now - each.reading.last_used)
        self._looking = True
        self._admit(now)
        if self._look_at is None:
            self._shrink(now)
        self._looking = False
        self._idle = {}

    def _shrink(self, now: float) -> None:
        """The limit is lower than it was: of those who are idle, as many leave as it takes, or all."""
        if not self._in_use(now).fits(self._limit):
            self._end_saver()
        in_use, leaving, idle = self._in_use(now), self._leaving(now), self._candidates()
        if not (in_use - leaving).fits(self._limit):
            _, evicted = eviction.decide(NOTHING, self._limit, in_use, leaving, idle)
            for worker_id in evicted or [candidate.worker_id for candidate in idle]:
                self._order(worker_id, control.DrainIfIdle())

    # --- what is known ------------------------------------------------------------------------------------

    def is_loaded(self, key: str) -> bool:
        """Whether a use of the model needs no room."""
        model = self._models.get(key)
        return model is not None and model.worker is not None

    def ghosts(self, now: float) -> dict[int, int]:
        """Process ids of workers that are gone and whose GPU memory may not be back, by worker id."""
        return self.ledger.ghosts(now)

    def _any_leaves(self) -> bool:
        return any(model.state is ModelState.DRAINING for model in self._by_worker.values())

    def _candidates(self) -> list[Candidate]:
        found = []
        for worker_id, idle_for in self._idle.items():
            model = self._by_worker.get(worker_id)
            if model is None or model.worker is None or model.pins or model.state is not ModelState.READY:
                continue
            ready = model.worker.ready
            seconds = ready.seconds if ready is not None else 0.0
            held = self.ledger.counted(worker_id)
            found.append(Candidate(worker_id, held, idle_for, seconds, model.priority()))
        return found

    def _refuse_room(self, model: Model, wish: _Wish, plan: Plan, now: float) -> None:
        """All who wait for the model are told why it is not loaded."""
        del self._wishes[model.key]
        failure = failures.describe(self._refusal(model, plan, now))
        waiters, model.waiters = model.waiters, []
        for client, ask in waiters:
            if wish.alone:  # what its load failed for says more
                self._deny(client, ask.ticket, model, now)
            else:
                self._tell(client, control.Denied(ticket=ask.ticket, failure=failure))
        model.second_try, model.at_least = False, NOTHING
        self._forget_if_idle(model)
