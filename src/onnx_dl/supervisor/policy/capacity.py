"""Memory limits, memory in use, and memory that a load needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from onnx_dl.core.settings import Settings
from onnx_dl.core.status import Usage
from onnx_dl.errors import CapacityError
from onnx_dl.supervisor.policy import eviction
from onnx_dl.supervisor.policy.cache_saves import CacheSaves
from onnx_dl.supervisor.policy.eviction import LoadPlan, RefusedLoad
from onnx_dl.supervisor.policy.fleet import Fleet
from onnx_dl.supervisor.policy.gpu_devices import HostGpus, uses_gpu
from onnx_dl.supervisor.policy.memory_amount import NOTHING, UNLIMITED, MemoryAmount, placed
from onnx_dl.supervisor.policy.records import ModelRecord
from onnx_dl.supervisor.policy.requirements import Requirement, RequirementHistory

_SHARE: Final = 0.8
"""Share of the machine's, the cgroup's or a GPU's memory that is the default limit.  The application needs
some, too."""


class Limits:
    """Settings in force, and the limits that follow from them and from the machine."""

    def __init__(self, settings: Settings, memory: int | None) -> None:
        """``memory``: bytes of the machine; None: unknown, so there is no default limit."""
        self._memory = memory
        self._gpu_memory: int | None = None
        self.gpus = HostGpus()
        self.follow(settings)

    def follow(self, settings: Settings) -> None:
        """Puts these settings in force."""
        self.settings = settings
        ram, given = _limit(settings.memory_limit, self._memory), settings.gpu_memory_limit
        if isinstance(given, Mapping):
            self.memory = MemoryAmount(ram, UNLIMITED, self._of_devices(given))
        else:
            self.memory = MemoryAmount(ram, _limit(given, self._gpu_memory))

    def know_gpus(self, nbytes: int | None, gpus: HostGpus | None = None) -> None:
        """Notes the bytes of all GPUs, and which of them this host sees."""
        self._gpu_memory, self.gpus = nbytes, gpus or self.gpus
        self.follow(self.settings)

    def _of_devices(self, given: Mapping[int, int]) -> dict[int, int]:
        """The limit of each device: the share of its memory, if it is given none."""
        return {number: _limit(None, size) for number, size in self.gpus.sizes().items()} | dict(given)

    @property
    def gpu(self) -> int | None:
        """GPU bytes that all workers together may take; None: there is no limit."""
        devices, total = self.memory.devices, self.memory.gpu
        return sum(devices.values()) if devices else None if total == UNLIMITED else total

    @property
    def machine(self) -> MemoryAmount:
        """Memory that the machine has."""
        return MemoryAmount(self._memory or UNLIMITED, self._gpu_memory or UNLIMITED)


@dataclasses.dataclass(frozen=True, eq=False)
class Capacity:
    """Compares what the parts of a supervisor hold with its limits."""

    fleet: Fleet
    limits: Limits
    saves: CacheSaves
    history: RequirementHistory
    is_saved: Callable[[str], bool]
    """True if the load cache has an entry of this key."""

    def in_use(self, now: float) -> MemoryAmount:
        """Memory that counts towards the limits: of workers, the saver, and what the driver still holds."""
        return self.fleet.counted() + self.fleet.ledger.lingering(now) + self.saves.taken

    def leaving(self, now: float) -> MemoryAmount:
        """The part of it that is being freed."""
        return self.fleet.draining() + self.fleet.ledger.lingering(now) + self.saves.leaving

    def requirement(self, key: str) -> Requirement | None:
        """Measured requirement of a model.  One that this machine cannot have measured is ignored."""
        known = self.history.of(key)
        return known if known is not None and known.could_be(self.limits.machine) else None

    def placed(self, model: ModelRecord, usage: Usage) -> Usage:
        """Places the GPU memory of a worker on the devices that its model names."""
        if not usage.gpu:
            return usage
        devices = placed(usage.gpu, usage.gpus, self.limits.gpus.numbers(model.spec))
        return msgspec.structs.replace(usage, gpus=devices)

    def plan(self, model: ModelRecord) -> LoadPlan:
        """Conditions under which the model may load now."""
        known, left = self.requirement(model.next_requirement_key), self._unpinned()
        wanted = [*model.members.values(), *(ask.spec for _, ask in model.waiters)]
        devices = frozenset(number for spec in wanted for number in self.limits.gpus.numbers(spec))
        known = None if known is None else known.placed(devices)
        guessed = eviction.guess(model.file_bytes, any(map(uses_gpu, wanted)), devices)
        saved = known is not None and self.is_saved(known.entry)
        plan = eviction.plan(known, guessed, left, saved=saved)
        return plan._replace(need=plan.need.maximum(model.at_least.minimum(left)))

    def raised(self, model: ModelRecord, factor: float) -> MemoryAmount:
        """Least memory for the next load of a model that ran out of it: more, but not more than there is."""
        need = self.plan(model).need
        return need.times(factor).minimum(self._unpinned()).maximum(need)

    def could_fit(self, need: MemoryAmount) -> bool:
        """True if so much is left beside pinned models when all others are gone."""
        return (need + self.fleet.pinned()).fits(self.limits.memory)

    def refusal(self, model: ModelRecord, plan: LoadPlan, now: float) -> CapacityError:
        """Makes the error for a load for which there is no memory."""
        known = self.requirement(model.next_requirement_key) or Requirement()
        peak = known.mapped if plan.mapped else known.load
        load = RefusedLoad(
            name=model.spec.name,
            need=plan.need,
            limit=self.limits.memory,
            in_use=self.in_use(now),
            stays=self.fleet.pinned(),
            size=known.steady,
            file_bytes=model.file_bytes,
            ended=peak.ended and plan.need.ram == peak.nbytes + 1,
        )
        return eviction.refusal(load, self.limits.settings.room_timeout)

    def _unpinned(self) -> MemoryAmount:
        """Memory that is left beside the peaks of pinned models."""
        return (self.limits.memory - self.fleet.pinned_peak()).maximum(NOTHING)


def _limit(given: int | None, machine: int | None) -> int:
    if given is not None:
        return given
    return UNLIMITED if machine is None else int(machine * _SHARE)
