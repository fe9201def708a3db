"""Loads that wait for memory, and who is asked to make way: the scheduler's part that knows of limits.

Pure like the scheduler.  When a load does not fit, the loop is to look at all workers: what they hold, and
since when they are idle.  That decides (:mod:`onnx_dl.supervisor.room`).  A worker leaves only if it is
still idle when it hears of it, so nobody's call is ever in the way.  While somebody waits, the loop looks
every 50 ms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final, NamedTuple

from onnx_dl.config import Settings, parse_size
from onnx_dl.lifecycle import ModelState
from onnx_dl.model import ModelSpec, Usage
from onnx_dl.supervisor import needs, room
from onnx_dl.supervisor.commands import Command, EndSaver, ForgetPeak, Remember, StartSaver
from onnx_dl.supervisor.ledger import Ledger
from onnx_dl.supervisor.needs import NOTHING, UNLIMITED, Bytes, Experience, Known, Need
from onnx_dl.supervisor.records import Model, Worker
from onnx_dl.supervisor.room import Answer, Candidate
from onnx_dl.supervisor.saving import Saving
from onnx_dl.transport import failures
from onnx_dl.transport import messages as m
from onnx_dl.transport.gauges import Reading

_LOOK_EVERY: Final = 0.05
_RESIDENCY: Final = 0.5
"""Seconds that a worker stays at least, so that two models that do not fit together do not only load."""
_SHARE: Final = 0.8
"""Of the memory that the machine or its cgroup has; the application needs some, too.  Also of a GPU's."""
_FADING: Final = 30.0
"""Seconds with runs after which the most that they took counts for less, if it did not come again."""
_RAISE: Final = 1.5
"""How much more a load gets that ran out of memory with what it was thought to need."""


class Seen(NamedTuple):
    """A worker when the loop looked at it.  ``usage`` is None if nothing can have changed."""

    usage: Usage | None
    reading: Reading = Reading()


@dataclasses.dataclass
class _Wish:
    spec: ModelSpec
    until: float
    alone: bool = False
    """All who are idle leave first, because there was too little memory without a limit that said so."""


class Admission:
    """Decides when a load that was wished for may begin."""

    _models: dict[str, Model]
    _by_worker: dict[int, Model]
    _epoch: float
    _out: list[Command]
    ledger: Ledger

    def __init__(self, settings: Settings, memory: int | None = None, known: Known | None = None) -> None:
        """``memory``: bytes of the machine, of which a share is the limit where the user set none."""
        self._memory = memory
        self._gpu_memory: int | None = None
        self._limit_to(settings)
        self._wishes: dict[str, _Wish] = {}
        """In the order in which they came."""
        self._experience = Experience({} if known is None else known)
        self._idle: dict[int, float] = {}
        """Seconds without use by worker, during a look."""
        self._looking = False
        self._look_at: float | None = None
        self._saving = Saving()

    def _limit_to(self, settings: Settings) -> None:
        ram = _limit(settings.memory_limit, self._memory)
        self._limit = Bytes(ram, _limit(settings.gpu_memory_limit, self._gpu_memory))
        self._limits = settings
        self._patience = settings.room_timeout

    # --- what the scheduler does for it -------------------------------------------------------------------

    def _load(self, model: Model, spec: ModelSpec, now: float) -> None:
        raise NotImplementedError

    def _order(self, worker_id: int, message: m.Message) -> None:
        raise NotImplementedError

    def _tell(self, client: bytes, message: m.Message) -> None:
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

    def _want_alone(self, model: Model, spec: ModelSpec, now: float) -> None:
        """The model is to be loaded as soon as all who are idle are gone, before anybody else."""
        known = self._need(model)
        model.second_try = True
        model.at_least = Bytes(int(known.ram * _RAISE), int(known.gpu * _RAISE)).least(self._limit)
        self._wishes = {model.key: _Wish(spec, now + self._patience, alone=True)} | self._wishes
        self._admit(now)

    def _admit(self, now: float) -> None:
        """Begins the loads that there is room for, in the order in which they were wished for."""
        while self._wishes:
            key, wish = next(iter(self._wishes.items()))
            model = self._models.get(key)
            if model is None or not model.waiters or model.worker is not None:
                del self._wishes[key]
                continue
            answer, evicted = self._decide(model, wish, now)
            if answer is Answer.LOAD:
                del self._wishes[key]
                need = self._need(model)
                self._load(model, wish.spec, now)
                assert model.worker is not None
                self.ledger.reserve(model.worker.id, need)
            elif answer is Answer.NEVER:
                del self._wishes[key]
                self._refuse_room(model, wish, now)
            else:
                # One that has just come is waited for, rather than that one leaves who is worth more.
                is_early = not wish.alone and any(self._is_new(w, now) for w in evicted)
                self._make_way([] if is_early else evicted, now)
                return
        self._look_at = None
        self._saving.stir(now)

    def _decide(self, model: Model, wish: _Wish, now: float) -> tuple[Answer, list[int]]:
        idle, need, in_use = self._candidates(), self._need(model), self._in_use(now)
        if need.fits(self._limit) and (wish.alone or not (in_use + need).fits(self._limit)):
            self._end_saver()
        if wish.alone:
            if idle:
                return Answer.EVICT, [candidate.worker_id for candidate in idle]
            if not self._looking or self._leaving(now) != NOTHING or self._any_leaves():
                return Answer.WAIT, []
        return room.decide(need, self._limit, in_use, self._leaving(now), idle)

    def _make_way(self, evicted: list[int], now: float) -> None:
        for worker_id in evicted:
            self._order(worker_id, m.DrainIfIdle())
        if self._look_at is None:
            self._look_at = now

    def _end_saver(self) -> None:
        if self._saving.end():
            self._out.append(EndSaver())

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

    # --- what is measured ---------------------------------------------------------------------------------

    def _learn_load(self, model: Model, worker: Worker, usage: Usage, now: float) -> None:
        """A worker became ready."""
        self.ledger.book(worker.id, usage)
        self.ledger.reserve(worker.id, NOTHING)
        model.at_least, model.second_try = NOTHING, False
        worker.marked_at = now
        if usage.pss:
            self._note(model, worker, needs.loaded(self._experience.of(_loaded_as(model)), usage))
            self._out.append(ForgetPeak(worker.id))

    def _learn(self, model: Model, usage: Usage) -> None:
        """A worker was measured."""
        worker, known = model.worker, self._experience.of(_loaded_as(model))
        assert worker is not None
        self.ledger.book(worker.id, usage)
        if usage.pss and known is not None and worker.ready is not None:
            worker.peak = worker.peak.most(needs.highest(usage))
            self._note(model, worker, needs.risen(known, usage))

    def _learn_runs(self, model: Model, worker: Worker, runs: int, now: float) -> bool:
        """A worker has made so many runs.  What its last ones did not take again counts for less, so that one
        that was extraordinary does not keep others out for ever.  False: there were none."""
        known = self._experience.of(_loaded_as(model))
        if known is None or runs <= worker.marked_runs or worker.peak == NOTHING:
            return False
        self._note(model, worker, needs.faded(known, worker.peak))
        worker.marked_at, worker.marked_runs, worker.peak = now, runs, NOTHING
        return True

    def _learn_end(self, model: Model, worker: Worker, runs: int, now: float) -> None:
        """A worker is reaped."""
        if worker.drained or worker.killed:  # one that crashed was not measured after its last run
            self._learn_runs(model, worker, runs, now)
        if worker.ready is not None:
            self._tell_need(model, now)
        self.ledger.haunt(worker.id, worker.pid, now)

    def _note(self, model: Model, worker: Worker, need: Need) -> None:
        self._experience.note(_loaded_as(model), need)
        self.ledger.reserve(worker.id, need.in_use(self._limit))

    def _tell_need(self, model: Model, now: float) -> None:
        """Says what is to be known in the next host, if that has changed."""
        key = _loaded_as(model)
        if (news := self._experience.news(key, now + self._epoch)) is not None:
            self._out.append(Remember(key, news))

    def _see(self, worker_id: int, seen: Seen, now: float) -> None:
        """The loop looked at a worker, or at what the driver says of one that is gone."""
        model = self._by_worker.get(worker_id)
        if model is None or (worker := model.worker) is None:
            if seen.usage is not None and not seen.usage.gpu:
                self.ledger.lay(worker_id)
            return
        if seen.usage is not None:
            self._learn(model, seen.usage)
        is_due = worker.ready is not None and now - worker.marked_at >= _FADING
        if is_due and self._learn_runs(model, worker, seen.reading.runs, now):
            self._out.append(ForgetPeak(worker.id))

    # --- time ---------------------------------------------------------------------------------------------

    def wants_look(self, now: float) -> bool:
        """Whether :meth:`on_tick` is to be told what the workers do and hold."""
        return self._is_due(self._look_at, now) or self._is_due(self._saving.look_at, now)

    @staticmethod
    def _is_due(at: float | None, now: float) -> bool:
        return at is not None and at <= now

    def _room_deadline(self) -> float | None:
        untils = [wish.until for wish in self._wishes.values()]
        looks = [at for at in (self._look_at, self._saving.look_at) if at is not None]
        return min([*untils, *looks], default=None)

    def _pass_time(self, now: float, seen: Mapping[int, Seen]) -> None:
        for key, wish in [(key, wish) for key, wish in self._wishes.items() if wish.until <= now]:
            del self._wishes[key]
            if (model := self._models.get(key)) is not None:
                self._refuse_room(model, wish, now)
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
            _, evicted = room.decide(NOTHING, self._limit, in_use, leaving, idle)
            for worker_id in evicted or [candidate.worker_id for candidate in idle]:
                self._order(worker_id, m.DrainIfIdle())

    # --- what is known ------------------------------------------------------------------------------------

    def is_loaded(self, key: str) -> bool:
        """Whether a use of the model needs no room."""
        model = self._models.get(key)
        return model is not None and model.worker is not None

    def know_gpus(self, nbytes: int | None) -> None:
        """The bytes of all GPUs, of which a share is the limit where the user set none."""
        self._gpu_memory = nbytes
        self._limit_to(self._limits)

    def ghosts(self, now: float) -> dict[int, int]:
        """Process ids of workers that are gone and whose GPU memory may not be back, by worker id."""
        return self.ledger.ghosts(now)

    def _need(self, model: Model) -> Bytes:
        known = self._experience.of(needs.identity(model.key, model.members))
        if known is not None:
            return known.to_load(self._limit).most(model.at_least)
        file_bytes = max((ask.file_bytes for _, ask in model.waiters), default=0)
        wanted = [*model.members.values(), *(ask.spec for _, ask in model.waiters)]
        on_gpu = any(map(needs.uses_gpu, wanted))
        left = (self._limit - self._pinned()).most(NOTHING)
        return room.guess(file_bytes, left, on_gpu).most(model.at_least)

    def _pinned(self) -> Bytes:
        """What will not make room, so that a guess must not count on it."""
        pinned = (worker_id for worker_id, model in self._by_worker.items() if model.pins)
        return sum(map(self.ledger.counted, pinned), NOTHING)

    def _in_use(self, now: float) -> Bytes:
        others = self.ledger.afterglow(now) + self._saving.taken
        return sum(map(self.ledger.counted, self._by_worker), others)

    def _leaving(self, now: float) -> Bytes:
        leaving = (w for w, model in self._by_worker.items() if model.state is ModelState.DRAINING)
        return sum(map(self.ledger.counted, leaving), self.ledger.afterglow(now) + self._saving.leaving)

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

    def _refuse_room(self, model: Model, wish: _Wish, now: float) -> None:
        need, in_use = self._need(model), self._in_use(now)
        error = room.refusal(model.spec.name, need, self._limit, in_use, self._patience)
        waiters, model.waiters = model.waiters, []
        for client, ask in waiters:
            if wish.alone:  # it knows better why
                self._deny(client, ask.ticket, model, now)
            else:
                self._tell(client, m.Denied(ticket=ask.ticket, failure=failures.describe(error)))
        model.second_try = False
        self._forget_if_idle(model)


def _limit(text: str, all_there_is: int | None) -> int:
    if text:
        return parse_size(text)
    return UNLIMITED if all_there_is is None else int(all_there_is * _SHARE)


def _loaded_as(model: Model) -> str:
    """By what is known what the present worker takes; others may have joined the group since."""
    return needs.identity(model.key, (member.key for member in model.spec.members))
