"""Memory that models require: what was measured, and what that means for the next load.

:mod:`onnx_dl.supervisor.measure.requirement_store` keeps the figures on disk,
:mod:`onnx_dl.supervisor.policy.eviction` compares them with the limits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from onnx_dl.core.spec import model_key
from onnx_dl.core.status import Usage
from onnx_dl.supervisor.policy.memory_amount import NOTHING, Count, MemoryAmount, decay, near

_STALE: Final = 86_400.0
"""Seconds after which figures are stored again, so that those of models in use are not the oldest."""
_REMEMBERED: Final = 4096


def present(usage: Usage) -> MemoryAmount:
    """Memory that a worker takes now, without what is the template's."""
    return MemoryAmount(usage.pss - usage.inherited, usage.gpu or 0, usage.gpus)


def highest(usage: Usage) -> MemoryAmount:
    """The most that a worker took since its peak was reset."""
    return MemoryAmount(max(usage.peak, usage.pss) - usage.inherited, usage.gpu or 0, usage.gpus)


class Peak(msgspec.Struct, frozen=True, array_like=True):
    """Peak memory of a model's loads of one kind; 0: there was none."""

    nbytes: Count = 0
    ended: bool = False
    """The load was ended at this size, so it needs more."""

    @property
    def is_measured(self) -> bool:
        return self.nbytes > 0 and not self.ended

    def after(self, nbytes: int) -> Peak:
        """The peak after one more load.  Small differences do not change it."""
        if self.is_measured and near(self.nbytes, nbytes):
            return self
        return Peak(decay(0 if self.ended else self.nbytes, nbytes))

    def is_near(self, other: Peak) -> bool:
        return self.ended == other.ended and near(self.nbytes, other.nbytes)


class Requirement(msgspec.Struct, frozen=True, kw_only=True):
    """Measured memory of one model.  A figure that was never measured is 0."""

    load: Peak = Peak()
    """Peak of plain loads."""
    mapped: Peak = Peak()
    """Peak of loads from the load cache."""
    steady: MemoryAmount = NOTHING
    """Memory when it is ready, before its first run."""
    peak: MemoryAmount = NOTHING
    """The most in runs."""
    entry: Annotated[str, Meta(pattern="^[0-9a-f]{0,64}$")] = ""
    """Key of the model in the load cache; empty: it is never saved."""
    at: Annotated[float, Meta(ge=0, le=1e11)] = 0.0
    """Unix time at which this was stored."""

    @property
    def is_loaded(self) -> bool:
        """True if a load was ever measured to its end."""
        return self.steady != NOTHING

    def could_be(self, machine: MemoryAmount) -> bool:
        """True if a machine with so much memory can have measured this.  If not, it is another machine's, or
        damaged."""
        loads = MemoryAmount(max(self.load.nbytes, self.mapped.nbytes))
        return loads.maximum(self.steady).maximum(self.peak).fits(machine)

    def in_use(self, limit: MemoryAmount) -> MemoryAmount:
        """Memory that counts while it is ready, even if it takes less at the moment."""
        return self.peak.minimum(limit)

    def placed(self, numbers: Collection[int]) -> Requirement:
        """The figures of a model that uses these devices, see :meth:`.MemoryAmount.placed`."""
        if not self.steady.gpu and not self.peak.gpu:
            return self
        steady, peak = self.steady.placed(numbers), self.peak.placed(numbers)
        return msgspec.structs.replace(self, steady=steady, peak=peak)

    def differs(self, stored: Requirement | None) -> bool:
        """True if it differs enough from what is stored, or that is old enough, to be stored again."""
        if stored is None or self.at - stored.at > _STALE:
            return True
        near = self.steady.is_near(stored.steady) and self.peak.is_near(stored.peak)
        near = near and self.load.is_near(stored.load) and self.mapped.is_near(stored.mapped)
        return not (near and self.entry == stored.entry)


def loaded(known: Requirement | None, usage: Usage, entry: str = "", *, mapped: bool = False) -> Requirement:
    """The requirement after a load.  ``usage`` was measured before the first run; ``entry``: key of the model
    in the load cache; ``mapped``: it was loaded from there."""
    known = known or Requirement()
    steady, most = present(usage), highest(usage).ram
    return Requirement(
        load=known.load if mapped else known.load.after(most),
        mapped=known.mapped.after(most) if mapped else known.mapped,
        steady=known.steady.decayed(steady),
        peak=known.peak.maximum(steady),
        entry=entry,
    )


def outgrown(known: Requirement | None, nbytes: int, *, mapped: bool = False) -> Requirement:
    """The requirement after a load that was ended at this size."""
    known, peak = known or Requirement(), Peak(nbytes, ended=True)
    if mapped:
        return msgspec.structs.replace(known, mapped=peak)
    return msgspec.structs.replace(known, load=peak)


def grown(known: Requirement, usage: Usage) -> Requirement:
    """The requirement after a worker in use was measured."""
    return msgspec.structs.replace(known, peak=known.peak.maximum(highest(usage)))


def decayed(known: Requirement, peak: MemoryAmount) -> Requirement:
    """The requirement after a period of runs with this peak."""
    return msgspec.structs.replace(known, peak=known.peak.decayed(peak).maximum(known.steady))


class RequirementHistory:
    """Requirements by key, as this host measured them, or else as earlier hosts did."""

    def __init__(self, known: Callable[[str], Requirement | None]) -> None:
        """``known``: returns what earlier hosts measured."""
        self._known = known
        self._measured: dict[str, Requirement] = {}
        self._stored: dict[str, Requirement] = {}

    def of(self, key: str) -> Requirement | None:
        """None: the model was never measured."""
        return self._measured.get(key) or self._known(key)

    def note(self, key: str, requirement: Requirement) -> None:
        """Replaces what is known."""
        self._measured.pop(key, None)
        self._measured[key] = requirement
        while len(self._measured) > _REMEMBERED:
            oldest = next(iter(self._measured))
            del self._measured[oldest]
            self._stored.pop(oldest, None)

    def to_store(self, key: str, at: float) -> Requirement | None:
        """The figures to store for the next host at this Unix time; None: they are stored already."""
        requirement = self._measured.get(key)
        if requirement is None:
            return None
        requirement = msgspec.structs.replace(requirement, at=at)
        if not requirement.differs(self._stored.get(key) or self._known(key)):
            return None
        self._stored[key] = requirement
        return requirement


def requirement_key(key: str, members: Iterable[str]) -> str:
    """Key of a requirement.  That of a group depends on its members, not on its name."""
    keys = sorted(members)
    return model_key(key, *keys) if keys else key
