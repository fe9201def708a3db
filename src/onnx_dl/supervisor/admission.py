"""Loads that wait for memory, and who is asked to make way: the scheduler's part that knows of a limit.

Pure like the scheduler.  When a load does not fit, every worker that may be evicted is asked whether it is
idle; the answers decide (:mod:`onnx_dl.supervisor.room`).  A worker leaves only if it is still idle when it
hears of it, so nobody's call is ever in the way.  While somebody waits, workers are asked again every 50 ms.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from onnx_dl.config import Settings, parse_size
from onnx_dl.errors import CapacityError
from onnx_dl.events import format_bytes
from onnx_dl.lifecycle import ModelState
from onnx_dl.model import ModelSpec, Usage
from onnx_dl.supervisor import room
from onnx_dl.supervisor.ledger import Ledger
from onnx_dl.supervisor.records import Model
from onnx_dl.supervisor.room import Answer, Candidate
from onnx_dl.transport import failures
from onnx_dl.transport import messages as m

_ASK_EVERY: Final = 0.05
_RESIDENCY: Final = 0.5
"""Seconds that a worker stays at least, so that two models that do not fit together do not only load."""
_REMEMBERED: Final = 4096
_SHARE: Final = 0.8
"""Of the memory that the machine or its cgroup has; the application needs some, too."""


@dataclasses.dataclass
class _Wish:
    spec: ModelSpec
    until: float


def _limit(settings: Settings, memory: int | None) -> int | None:
    if settings.memory_limit:
        return parse_size(settings.memory_limit)
    return None if memory is None else int(memory * _SHARE)


class Admission:
    """Decides when a load that was wished for may begin."""

    _models: dict[str, Model]
    _by_worker: dict[int, Model]
    ledger: Ledger

    def __init__(self, settings: Settings, memory: int | None = None) -> None:
        """``memory``: bytes of the machine, of which a share is the limit where the user set none."""
        self._memory = memory
        self._limit_to(settings)
        self._wishes: dict[str, _Wish] = {}
        """In the order in which they came."""
        self._needs: dict[str, int] = {}
        """Bytes that models were measured to need."""
        self._asked: set[int] = set()
        self._idle: dict[int, float] = {}
        self._ask_at: float | None = None

    def _limit_to(self, settings: Settings) -> None:
        self._limit = _limit(settings, self._memory)
        self._patience = settings.room_timeout

    # --- what the scheduler does for it -------------------------------------------------------------------

    def _load(self, model: Model, spec: ModelSpec, now: float) -> None:
        raise NotImplementedError

    def _order(self, worker_id: int, message: m.Message) -> None:
        raise NotImplementedError

    def _tell(self, client: bytes, message: m.Message) -> None:
        raise NotImplementedError

    def _forget_if_idle(self, model: Model) -> None:
        raise NotImplementedError

    # --- wishes -------------------------------------------------------------------------------------------

    def _want(self, model: Model, spec: ModelSpec, now: float) -> None:
        """The model is to be loaded as soon as there is room."""
        self._wishes.setdefault(model.key, _Wish(spec, now + self._patience))
        self._admit(now)

    def _admit(self, now: float) -> None:
        """Begins the loads that there is room for, in the order in which they were wished for."""
        while self._wishes:
            key, wish = next(iter(self._wishes.items()))
            model = self._models.get(key)
            if model is None or not model.waiters or model.worker is not None:
                del self._wishes[key]
                continue
            answer, evicted = room.decide(
                self._need(model), self._limit, self._in_use(), self._leaving(), self._candidates()
            )
            if answer is Answer.LOAD:
                del self._wishes[key]
                self._load(model, wish.spec, now)
                assert model.worker is not None
                self.ledger.reserve(model.worker.id, self._need(model))
            elif answer is Answer.NEVER:
                del self._wishes[key]
                self._refuse_room(model)
            else:
                # One that has just come is waited for, rather than that one leaves who is worth more.
                self._make_way([] if any(self._is_new(w, now) for w in evicted) else evicted, now)
                return
        self._ask_at = None

    def _make_way(self, evicted: list[int], now: float) -> None:
        for worker_id in evicted:
            del self._idle[worker_id]
            self._order(worker_id, m.DrainIfIdle())
        if not (self._asked or evicted or self._ask_at):
            self._ask_around()
        self._ask_at = self._ask_at or now + _ASK_EVERY

    def _is_new(self, worker_id: int, now: float) -> bool:
        worker = self._by_worker[worker_id].worker
        assert worker is not None and worker.ready_at is not None
        return now - worker.ready_at < _RESIDENCY

    def _ask_around(self) -> None:
        self._idle = {}
        self._asked = {
            worker_id
            for worker_id, model in self._by_worker.items()
            if model.state is ModelState.READY and not model.pins
        }
        for worker_id in self._asked:
            self._order(worker_id, m.AskIdle())

    def _heard_idle(self, idle: m.Idle, usage: Usage, now: float) -> None:
        """A worker said for how long it has been idle."""
        if idle.worker_id not in self._asked:
            return
        self._asked.discard(idle.worker_id)
        self.ledger.book(idle.worker_id, usage)
        if idle.seconds is not None:
            self._idle[idle.worker_id] = idle.seconds
        if not self._asked:
            self._admit(now)

    def _left(self, worker_id: int) -> None:
        """The worker is no candidate any more."""
        self._asked.discard(worker_id)
        self._idle.pop(worker_id, None)

    def _learn(self, model: Model, usage: Usage) -> None:
        """What a model was measured to need counts the next time."""
        if usage.pss:
            self._needs[model.key] = max(usage.pss, self._needs.pop(model.key, 0))
        while len(self._needs) > _REMEMBERED:
            del self._needs[next(iter(self._needs))]

    # --- time ---------------------------------------------------------------------------------------------

    def _room_deadline(self) -> float | None:
        untils = [wish.until for wish in self._wishes.values()]
        return min([*untils, *([self._ask_at] if self._ask_at is not None else [])], default=None)

    def _pass_time(self, now: float) -> None:
        for key in [key for key, wish in self._wishes.items() if wish.until <= now]:
            del self._wishes[key]
            if (model := self._models.get(key)) is not None:
                self._refuse_room(model)
        if self._ask_at is not None and now >= self._ask_at:
            self._ask_at = None
            if self._wishes:
                self._ask_around()
                self._ask_at = now + _ASK_EVERY
                if not self._asked:
                    self._admit(now)

    # --- what is known ------------------------------------------------------------------------------------

    def _need(self, model: Model) -> int:
        known = self._needs.get(model.key)
        if known is not None:
            return known
        return room.guess(max((ask.file_bytes for _, ask in model.waiters), default=0), self._limit)

    def _in_use(self) -> int:
        return sum(map(self.ledger.counted, self._by_worker))

    def _leaving(self) -> int:
        return sum(
            self.ledger.counted(worker_id)
            for worker_id, model in self._by_worker.items()
            if model.state is ModelState.DRAINING
        )

    def _candidates(self) -> list[Candidate]:
        found = []
        for worker_id, idle_for in self._idle.items():
            model = self._by_worker.get(worker_id)
            # Pinned since it answered: it stays.
            if model is None or model.worker is None or model.pins:
                continue
            if model.state is ModelState.READY:
                ready = model.worker.ready
                seconds = ready.seconds if ready is not None else 0.0
                nbytes = self.ledger.counted(worker_id)
                found.append(Candidate(worker_id, nbytes, idle_for, seconds, model.priority()))
        return found

    def _refuse_room(self, model: Model) -> None:
        need, limit, in_use = self._need(model), self._limit or 0, self._in_use()
        if need > limit:
            what = "is more than the limit"
            advice = "Raise memory_limit, or run the model elsewhere."
        else:
            what = f"did not become free within {self._patience:g} seconds"
            advice = "Raise memory_limit, pin fewer models, or give them shorter TTLs."
        error = CapacityError(
            f"{model.spec.name} needs about {format_bytes(need)}, which {what} of {format_bytes(limit)} "
            f"({format_bytes(in_use)} are in use). {advice}",
            needed=need,
            limit=limit,
            in_use=in_use,
        )
        waiters, model.waiters = model.waiters, []
        for client, ask in waiters:
            self._tell(client, m.Denied(ticket=ask.ticket, failure=failures.describe(error)))
        self._forget_if_idle(model)
