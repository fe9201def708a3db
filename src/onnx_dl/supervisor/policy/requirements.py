"""What a model needs: what was measured, and what that says of its next load.

Pure.  Figures are kept by :mod:`onnx_dl.supervisor.measure.requirement_store`; who compares them with a limit is
:mod:`onnx_dl.supervisor.policy.eviction`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Annotated, Final, Protocol

import msgspec
from msgspec import Meta

from onnx_dl.core.spec import ModelSpec, model_key
from onnx_dl.core.status import Usage

UNLIMITED: Final = 1 << 62
"""Bytes of which nobody has more."""
_NEWS: Final = 0.05
"""The share by which a figure has to change to be worth writing down."""
_STALE: Final = 86_400.0
"""Seconds after which figures are written down again, so that those of models in use are not the oldest."""
_REMEMBERED: Final = 4096
_Count = Annotated[int, Meta(ge=0, le=1 << 50)]
"""Bytes, as they may stand in a file."""
_ON_GPUS: Final = (
    "CUDAExecutionProvider",
    "TensorrtExecutionProvider",
    "NvTensorRTRTXExecutionProvider",
    "ROCMExecutionProvider",
    "MIGraphXExecutionProvider",
    "DmlExecutionProvider",
)


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Of the two kinds of memory that have limits."""

    ram: _Count = 0
    gpu: _Count = 0

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.ram + other.ram, self.gpu + other.gpu)

    def __sub__(self, other: Bytes) -> Bytes:
        return Bytes(self.ram - other.ram, self.gpu - other.gpu)

    def most(self, other: Bytes) -> Bytes:
        """The larger of each kind."""
        return Bytes(max(self.ram, other.ram), max(self.gpu, other.gpu))

    def least(self, other: Bytes) -> Bytes:
        """The smaller of each kind."""
        return Bytes(min(self.ram, other.ram), min(self.gpu, other.gpu))

    def fits(self, limit: Bytes) -> bool:
        return self.ram <= limit.ram and self.gpu <= limit.gpu

    def is_near(self, other: Bytes) -> bool:
        return _near(self.ram, other.ram) and _near(self.gpu, other.gpu)

    def fading(self, last: Bytes) -> Bytes:
        """What counts after ``last`` was measured: more does at once, less by half of the way."""
        return Bytes(_fading(self.ram, last.ram), _fading(self.gpu, last.gpu))


NOTHING: Final = Bytes()


def present(usage: Usage) -> Bytes:
    """What a worker takes now."""
    return Bytes(usage.pss, usage.gpu or 0)


def highest(usage: Usage) -> Bytes:
    """The most that a worker took since its mark was set back."""
    return Bytes(max(usage.peak, usage.pss), usage.gpu or 0)


class Peak(msgspec.Struct, frozen=True, array_like=True):
    """The most memory that a model took while it loaded in one of the two ways; 0: it never did."""

    nbytes: _Count = 0
    ended: bool = False
    """The load was ended when it had so much: it needs more than that."""

    @property
    def is_measured(self) -> bool:
        return self.nbytes > 0 and not self.ended

    def after(self, nbytes: int) -> Peak:
        """Such a load has taken so much; what is near to what was measured is that."""
        if self.is_measured and _near(self.nbytes, nbytes):
            return self
        return Peak(_fading(0 if self.ended else self.nbytes, nbytes))

    def is_near(self, other: Peak) -> bool:
        return self.ended == other.ended and _near(self.nbytes, other.nbytes)


class Need(msgspec.Struct, frozen=True, kw_only=True):
    """What one model was measured to take.  What was never measured is 0."""

    load: Peak = Peak()
    """Of plain loads."""
    mapped: Peak = Peak()
    """Of loads from the load cache."""
    steady: Bytes = NOTHING
    """What it takes when it is ready."""
    peak: Bytes = NOTHING
    """The most that it took in runs."""
    entry: Annotated[str, Meta(pattern="^[0-9a-f]{0,64}$")] = ""
    """Under which key the load cache has it, if it has; empty: it never does."""
    at: Annotated[float, Meta(ge=0, le=1e11)] = 0.0
    """Unix time of the last word."""

    @property
    def is_loaded(self) -> bool:
        """Whether a load was ever measured to its end."""
        return self.steady != NOTHING

    def could_be(self, most: Bytes) -> bool:
        """Whether it was measured where there are so many bytes; it may come from another machine, or be
        damaged."""
        loads = Bytes(max(self.load.nbytes, self.mapped.nbytes))
        return loads.most(self.steady).most(self.peak).fits(most)

    def in_use(self, limit: Bytes) -> Bytes:
        """What counts while it is ready, even if it takes less at the moment."""
        return self.peak.least(limit)

    def is_news(self, told: Need | None) -> bool:
        """Whether it differs from what was told by so much that it is worth telling."""
        if told is None or self.at - told.at > _STALE:
            return True
        near = self.steady.is_near(told.steady) and self.peak.is_near(told.peak)
        alike = self.load.is_near(told.load) and self.mapped.is_near(told.mapped)
        return not (near and alike and self.entry == told.entry)


def loaded(known: Need | None, usage: Usage, entry: str = "", *, mapped: bool = False) -> Need:
    """After a load; ``usage`` was measured before the first run.  ``mapped``: it came from the load cache,
    which has it, or would have it, under the key ``entry``."""
    known = known or Need()
    steady, most = present(usage), highest(usage).ram
    return Need(
        load=known.load if mapped else known.load.after(most),
        mapped=known.mapped.after(most) if mapped else known.mapped,
        steady=known.steady.fading(steady),
        peak=known.peak.most(steady),
        entry=entry,
    )


def outgrown(known: Need | None, nbytes: int, *, mapped: bool = False) -> Need:
    """After a load was ended that had so many bytes."""
    known, peak = known or Need(), Peak(nbytes, ended=True)
    return (
        msgspec.structs.replace(known, mapped=peak) if mapped else msgspec.structs.replace(known, load=peak)
    )


def risen(known: Need, usage: Usage) -> Need:
    """After a worker was measured that is in use."""
    return msgspec.structs.replace(known, peak=known.peak.most(highest(usage)))


def faded(known: Need, peak: Bytes) -> Need:
    """After some time with runs in which this was the most."""
    return msgspec.structs.replace(known, peak=known.peak.fading(peak).most(known.steady))


class Known(Protocol):
    """What was measured in earlier hosts."""

    def get(self, key: str, /) -> Need | None: ...


class Experience:
    """The needs of models by key: what this host measured, else what earlier ones did."""

    def __init__(self, known: Known) -> None:
        self._known = known
        self._needs: dict[str, Need] = {}
        self._told: dict[str, Need] = {}

    def of(self, key: str) -> Need | None:
        """None: it was never measured."""
        return self._needs.get(key) or self._known.get(key)

    def note(self, key: str, need: Need) -> None:
        """What is known from now on."""
        self._needs.pop(key, None)
        self._needs[key] = need
        while len(self._needs) > _REMEMBERED:
            oldest = next(iter(self._needs))
            del self._needs[oldest]
            self._told.pop(oldest, None)

    def news(self, key: str, at: float) -> Need | None:
        """What is worth telling the next host at this Unix time; None: it knows."""
        need = self._needs.get(key)
        if need is None:
            return None
        need = msgspec.structs.replace(need, at=at)
        if not need.is_news(self._told.get(key) or self._known.get(key)):
            return None
        self._told[key] = need
        return need


def uses_gpu(spec: ModelSpec) -> bool:
    """Whether the model asks for a provider that takes GPU memory."""
    names = (entry if isinstance(entry, str) else next(iter(entry), "") for entry in spec.providers or [])
    return any(name in _ON_GPUS for name in names) or any(map(uses_gpu, spec.members))


def identity(key: str, members: Iterable[str]) -> str:
    """By what a need is known: a group is what its members are, whatever it is called."""
    keys = sorted(members)
    return model_key(key, *keys) if keys else key


def _fading(known: int, last: int) -> int:
    return max(last, (known + last) // 2)


def _near(one: int, other: int) -> bool:
    return abs(one - other) <= _NEWS * max(one, other)
