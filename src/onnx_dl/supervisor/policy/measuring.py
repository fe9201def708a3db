"""What workers were measured to hold, and what that says of loads: the scheduler's part that knows figures.

Pure like the scheduler.  A load is let in on terms (:class:`onnx_dl.supervisor.policy.eviction.Plan`) and weighed while
it is under way: one that takes more than there is, is ended.  What it had is remembered, so that the same is
decided the next time without trying.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec

from onnx_dl.core.lifecycle import ModelState
from onnx_dl.core.parsing import parse_size
from onnx_dl.core.settings import Settings
from onnx_dl.core.status import Usage
from onnx_dl.errors import CapacityError
from onnx_dl.protocol import control as m
from onnx_dl.protocol import failures
from onnx_dl.supervisor.policy import eviction, requirements
from onnx_dl.supervisor.policy.cache_saves import Saving
from onnx_dl.supervisor.policy.commands import Command, EndSaver, ForgetPeak, Remember
from onnx_dl.supervisor.policy.eviction import Case, Plan
from onnx_dl.supervisor.policy.ledger import Ledger
from onnx_dl.supervisor.policy.records import Model, Worker
from onnx_dl.supervisor.policy.requirements import NOTHING, UNLIMITED, Bytes, Experience, Known, Need, Peak
from onnx_dl.transport.gauges import Reading

_SHARE: Final = 0.8
"""Of the memory that the machine or its cgroup has; the application needs some, too.  Also of a GPU's."""
_FADING: Final = 30.0
"""Seconds with runs after which the most that they took counts for less, if it did not come again."""
_FASTEST: Final = 5e9
"""Bytes that a load takes within a second at most: 2.4e9 were measured.  Pages of files that are in memory
already come faster, but few loads end with many of these."""
_WEIGH_EVERY: Final = 0.005
_WEIGH_AT_LEAST: Final = 1.0
"""Seconds between two looks at a load that is near its bound, and far from it."""


class Seen(NamedTuple):
    """A worker when the loop looked at it.  ``usage`` is None if nothing can have changed."""

    usage: Usage | None
    reading: Reading = Reading()


class Load(NamedTuple):
    """A load to be weighed."""

    worker_id: int
    pid: int
    nbytes: int
    """That it may have anyway: it is weighed exactly if it seems to have more."""


class Measuring:
    """Knows the limits, what counts of them, and what models need."""

    _models: dict[str, Model]
    _by_worker: dict[int, Model]
    _epoch: float
    _out: list[Command]
    ledger: Ledger

    def __init__(
        self,
        settings: Settings,
        memory: int | None = None,
        known: Known | None = None,
        is_saved: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """``memory``: bytes of the machine, of which a share is the limit where the user set none;
        ``is_saved``: whether the load cache has an entry of this key."""
        self._memory = memory
        self._gpu_memory: int | None = None
        self._limit_to(settings)
        self._experience = Experience({} if known is None else known)
        self._is_saved = is_saved
        self._saving = Saving()

    def _limit_to(self, settings: Settings) -> None:
        ram = _limit(settings.memory_limit, self._memory)
        self._limit = Bytes(ram, _limit(settings.gpu_memory_limit, self._gpu_memory))
        self._limits = settings
        self._patience = settings.room_timeout

    def know_gpus(self, nbytes: int | None) -> None:
        """The bytes of all GPUs, of which a share is the limit where the user set none."""
        self._gpu_memory = nbytes
        self._limit_to(self._limits)

    def _kill_now(self, worker: Worker) -> None:
        raise NotImplementedError

    # --- what is needed -----------------------------------------------------------------------------------

    def _known(self, key: str) -> Need | None:
        """What was measured of a model, here or where there is no more memory than here."""
        known = self._experience.of(key)
        there_is = Bytes(self._memory or UNLIMITED, self._gpu_memory or UNLIMITED)
        return known if known is not None and known.could_be(there_is) else None

    def _plan(self, model: Model) -> Plan:
        """The terms on which the model may load now."""
        known = self._known(_wanted_as(model))
        wanted = [*model.members.values(), *(ask.spec for _, ask in model.waiters)]
        guessed = eviction.guess(_file_bytes(model), any(map(requirements.uses_gpu, wanted)))
        saved = known is not None and self._is_saved(known.entry)
        plan = eviction.plan(known, guessed, self._left(), saved=saved)
        return plan._replace(need=plan.need.most(model.at_least.least(self._left())))

    def _left(self) -> Bytes:
        """What pinned models leave, as much as their runs are known to take."""
        pinned = (worker_id for worker_id, model in self._by_worker.items() if model.pins)
        return (self._limit - sum(map(self.ledger.counted, pinned), NOTHING)).most(NOTHING)

    def _stays(self) -> Bytes:
        """What pinned models hold now, and will not give back."""
        pinned = (worker_id for worker_id, model in self._by_worker.items() if model.pins)
        return sum((requirements.present(self.ledger.of(worker_id)) for worker_id in pinned), NOTHING)

    def _in_use(self, now: float) -> Bytes:
        others = self.ledger.afterglow(now) + self._saving.taken
        return sum(map(self.ledger.counted, self._by_worker), others)

    def _leaving(self, now: float) -> Bytes:
        leaving = (w for w, model in self._by_worker.items() if model.state is ModelState.DRAINING)
        return sum(map(self.ledger.counted, leaving), self.ledger.afterglow(now) + self._saving.leaving)

    def _end_saver(self) -> None:
        if self._saving.end():
            self._out.append(EndSaver())

    def _refusal(self, model: Model, plan: Plan, now: float) -> CapacityError:
        known = self._known(_wanted_as(model)) or Need()
        peak = known.mapped if plan.mapped else known.load
        case = Case(
            name=model.spec.name,
            need=plan.need,
            limit=self._limit,
            in_use=self._in_use(now),
            stays=self._stays(),
            size=known.steady,
            file_bytes=_file_bytes(model),
            ended=peak.ended and plan.need.ram == peak.nbytes + 1,
        )
        return eviction.refusal(case, self._patience)

    # --- what is measured ---------------------------------------------------------------------------------

    def _learn_load(self, model: Model, ready: m.WorkerReady, usage: Usage, now: float) -> bool:
        """A worker became ready; false: it had taken more than there is, and is ended."""
        worker = model.worker
        assert worker is not None
        worker.weigh_at, worker.marked_at = None, now
        if not _counts(worker, usage):
            return True
        self.ledger.book(worker.id, usage)
        self.ledger.reserve(worker.id, NOTHING)
        if usage.pss:
            need = requirements.loaded(
                self._known(_loaded_as(model)), usage, ready.entry, mapped=ready.mapped
            )
            self._note(model, worker, need)
            if not worker.plan.measured and not self._could_hold(usage):
                self._end_load(model, worker, now)
                return False
            self._out.append(ForgetPeak(worker.id))
        model.at_least, model.second_try = NOTHING, False
        return True

    def _could_hold(self, usage: Usage) -> bool:
        """Whether there is as much as this load took between two looks, which would be refused the next
        time."""
        return (requirements.highest(usage) + self._stays()).fits(self._limit)

    def _learn(self, model: Model, usage: Usage) -> None:
        """A worker was measured."""
        worker, known = model.worker, self._known(_loaded_as(model))
        assert worker is not None
        if not _counts(worker, usage):
            return
        self.ledger.book(worker.id, usage)
        if usage.pss and known is not None and worker.ready is not None:
            worker.peak = worker.peak.most(requirements.highest(usage))
            self._note(model, worker, requirements.risen(known, usage))

    def _learn_runs(self, model: Model, worker: Worker, runs: int, now: float) -> bool:
        """A worker has made so many runs.  What its last ones did not take again counts for less, so that one
        that was extraordinary does not keep others out for ever.  False: there were none."""
        known = self._known(_loaded_as(model))
        if known is None or runs <= worker.marked_runs or worker.peak == NOTHING:
            return False
        self._note(model, worker, requirements.faded(known, worker.peak))
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

    # --- loads under way ----------------------------------------------------------------------------------

    def to_weigh(self, now: float) -> list[Load]:
        """The loads that :meth:`on_weighed` is to be told of now."""
        due = [(worker, worker.pid) for worker, at in self._weighings() if at <= now]
        return [Load(worker.id, pid, self.ledger.counted(worker.id).ram) for worker, pid in due if pid]

    def _weighings(self) -> list[tuple[Worker, float]]:
        workers = [model.worker for model in self._by_worker.values()]
        return [
            (worker, worker.weigh_at)
            for worker in workers
            if worker and worker.weigh_at is not None and worker.pid and not worker.is_ending
        ]

    def _promise(self, worker: Worker, plan: Plan, now: float) -> None:
        """The worker begins to load on these terms."""
        worker.plan = plan
        self.ledger.reserve(worker.id, plan.need)
        if self._limit.ram != UNLIMITED:
            worker.weigh_at = now + _pause(self._bound(worker, now))

    def _weigh(self, model: Model, worker: Worker, nbytes: int, now: float) -> None:
        """A load has so many bytes: so long as it is measured, nobody else is let in who would need them."""
        self.ledger.reserve(worker.id, self.ledger.counted(worker.id).most(Bytes(nbytes)))
        bound = self._bound(worker, now)
        if nbytes > bound:
            self._end_saver()  # who is the first to make way
        if nbytes > self._bound(worker, now, without=self._saving.taken):
            known = self._known(_loaded_as(model))
            need = requirements.outgrown(known, nbytes, mapped=worker.plan.mapped)
            self._experience.note(_loaded_as(model), need)
            self._end_load(model, worker, now)
        worker.weigh_at = now + _pause(bound - nbytes)

    def _bound(self, worker: Worker, now: float, without: Bytes = NOTHING) -> int:
        """Bytes with which the load is ended, but for what somebody holds ``without`` whom there are more."""
        others = self._in_use(now) - self.ledger.counted(worker.id) - without
        return worker.plan.bound((self._limit - others).ram)

    def _forget_saved(self, model: Model) -> None:
        """The load cache has the model no more, or in a form that cannot be used."""
        key = _loaded_as(model)
        if (known := self._known(key)) is not None:
            self._experience.note(key, msgspec.structs.replace(known, mapped=Peak(), entry=""))

    def _end_load(self, model: Model, worker: Worker, now: float) -> None:
        """There is no room for what it takes."""
        error = self._refusal(model, self._plan(model), now)
        worker.failure, worker.outgrew = failures.describe(error), True
        self._kill_now(worker)
        self._tell_need(model, now)


def _counts(worker: Worker, usage: Usage) -> bool:
    """Whether what was measured of a worker tells what it holds: not of one that is about to go, or is gone
    and has no memory any more."""
    return usage.rss > 0 and not worker.is_ending


def _pause(missing: int) -> float:
    """Seconds within which no load takes so many bytes, if it is not near to them."""
    return min(max(missing / _FASTEST, _WEIGH_EVERY), _WEIGH_AT_LEAST)


def _limit(text: str, all_there_is: int | None) -> int:
    if text:
        return parse_size(text)
    return UNLIMITED if all_there_is is None else int(all_there_is * _SHARE)


def _file_bytes(model: Model) -> int:
    return max((ask.file_bytes for _, ask in model.waiters), default=0)


def _wanted_as(model: Model) -> str:
    """By what is known what the model would take if it were loaded now."""
    return requirements.identity(model.key, model.members)


def _loaded_as(model: Model) -> str:
    """By what is known what the present worker takes; others may have joined the group since."""
    return requirements.identity(model.key, (member.key for member in model.spec.members))
