"""Rules of admission: whether there is memory for a load, which workers make way, why a load is refused.

Bytes of RAM are proportional set sizes, so that pages that workers share count once.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Collection, Sequence
from typing import Final, NamedTuple

from onnx_dl.core.text import format_bytes
from onnx_dl.errors import CapacityError
from onnx_dl.supervisor.policy.memory_amount import NOTHING, MemoryAmount
from onnx_dl.supervisor.policy.requirements import Peak, Requirement

BASE: Final = 32 << 20
"""Bytes of a worker without a model: the first guess for a model that was never measured."""
GROWTH: Final = 2.2
"""Memory of a model that was never measured, in sizes of its files: as they are and packed, and a run."""
GPU_BASE: Final = 768 << 20
"""Bytes of a CUDA context with its libraries and a session's workspace, before there is a model: 745 MiB in a
worker on an H100 with onnxruntime 1.31.  Less on smaller GPUs; a guess refuses no model."""
GPU_GROWTH: Final = 1.5
"""GPU memory of a model that was never measured, in sizes of its files: its weights, and a run."""
_FORGOTTEN_AFTER: Final = 60.0
"""Seconds without use in which the uses of a model lose 63 % of their weight."""
_TOLERANCE: Final = 1.05
"""Factor within which two measurements of a load count as the same."""


class Verdict(enum.Enum):
    """Action for a pending load."""

    LOAD = enum.auto()
    WAIT = enum.auto()
    """Until a draining worker is gone, or a busy one is idle."""
    EVICT = enum.auto()


class Candidate(NamedTuple):
    """An idle worker that may be evicted."""

    worker_id: int
    held: MemoryAmount
    idle_for: float
    seconds: float
    """Duration of its load."""
    priority: int = 0
    uses: float = 1.0
    """Number of its uses lately, see :class:`~onnx_dl.supervisor.policy.use_counts.UseCounts`."""

    def rank(self, missing: MemoryAmount) -> tuple[float, float, float]:
        """Order of eviction, lowest first: by priority, then by the seconds of reloads to expect per missing
        byte that it frees, then by its time without use."""
        expected = max(self.seconds, 0.01) * self.uses * math.exp(-self.idle_for / _FORGOTTEN_AFTER)
        return self.priority, expected / max(self.frees(missing), 1), -self.idle_for

    def frees(self, missing: MemoryAmount) -> int:
        """Bytes that it frees of the kinds that are missing."""
        ram = self.held.ram if missing.ram > 0 else 0
        if missing.gpu > 0:
            return ram + self.held.gpu
        return ram + sum(self.held.on(number) for number, nbytes in missing.devices.items() if nbytes > 0)


class Guess(NamedTuple):
    """Estimated memory of a model that was never measured."""

    least: MemoryAmount
    likely: MemoryAmount


def guess(file_bytes: int, on_gpu: bool = False, devices: Collection[int] = ()) -> Guess:
    """Estimates the memory of a model by the size of its files.

    ``devices``: numbers of the GPUs that it uses; each may get all of it.
    """
    gpu = GPU_BASE + int(GPU_GROWTH * file_bytes) if on_gpu else 0
    likely = MemoryAmount(BASE + int(GROWTH * file_bytes), gpu, dict.fromkeys(devices, gpu))
    return Guess(MemoryAmount(BASE + file_bytes), likely)


class LoadPlan(NamedTuple):
    """Conditions under which a load may begin."""

    need: MemoryAmount = NOTHING
    """Memory that must be free."""
    measured: bool = False
    """``need`` was measured.  Otherwise it is a guess, and a load that takes more than is free is ended."""
    mapped: bool = False
    """Load only from the load cache, which needs no more than this."""

    def bound(self, free: int) -> int:
        """Bytes of RAM at which the load is ended.  ``free``: what would be free without it.

        It may always take what it was promised, even if others have grown since.
        """
        return max(free, int(self.need.ram * (_TOLERANCE if self.measured else 1)))


def plan(known: Requirement | None, guessed: Guess, left: MemoryAmount, *, saved: bool) -> LoadPlan:
    """Plans a load.

    Measured figures count as they are.  A guess refuses no model that may fit: it is reduced to what there
    is, unless even the least does not fit.

    Args:
        left: memory that pinned models do not hold.
        saved: the load cache has the model.
    """
    known = known or Requirement()
    if not saved or not (known.mapped.is_measured or known.is_loaded):
        return _plan_one(known, known.load, guessed, left)
    # Its weights are mapped, never copied.  So a load that was never measured needs what the model held when
    # it was loaded from its own file; if that is too little, the load is ended and repeated with more.  On a
    # GPU it does not hold its weights in RAM, and they may all be mapped at once while they are copied.
    passing = MemoryAmount(guessed.least.ram if known.steady.gpu else 0)
    likely = known.steady + passing
    return _plan_one(known, known.mapped, Guess(known.steady, likely), left)._replace(mapped=True)


def _plan_one(known: Requirement, peak: Peak, guessed: Guess, left: MemoryAmount) -> LoadPlan:
    # Runs alone refuse no model: one that once took more than there is loads when it has all there is.
    held = known.steady.maximum(known.peak.minimum(left))
    if peak.is_measured:
        return LoadPlan(MemoryAmount(peak.nbytes).maximum(held), measured=True)
    need = guessed.likely.minimum(left).maximum(guessed.least)
    if peak.ended:
        need = need.maximum(MemoryAmount(peak.nbytes + 1))
    return LoadPlan(need.maximum(held))


def decide(
    need: MemoryAmount,
    limit: MemoryAmount,
    counted: MemoryAmount,
    leaving: MemoryAmount,
    idle: Sequence[Candidate],
) -> tuple[Verdict, list[int]]:
    """Decides about one load.  Returns the workers to evict, too.

    Args:
        counted: memory of all workers, reserved bytes included.
        leaving: the part of it that is being freed.
        idle: workers that may be evicted.
    """
    if (counted + need).fits(limit):
        return Verdict.LOAD, []
    wanted = missing = (counted + need).over(limit) - leaving
    chosen: list[Candidate] = []
    for candidate in sorted(idle, key=lambda c: c.rank(wanted)):
        if candidate.frees(missing):
            chosen.append(candidate)
            missing -= candidate.held
    if not missing.is_nothing:  # all of them together would not do, so none is evicted
        return Verdict.WAIT, []
    # Those chosen before a large one may not be needed any more.
    for candidate in sorted(chosen, key=lambda c: c.rank(wanted), reverse=True):
        without = missing - candidate.held.times(-1)  # a sum would have devices without a limit
        if without.is_nothing:
            chosen.remove(candidate)
            missing = without
    return (Verdict.EVICT if chosen else Verdict.WAIT), [candidate.worker_id for candidate in chosen]


class RefusedLoad(NamedTuple):
    """A load that is refused, and the figures that explain it."""

    name: str
    need: MemoryAmount
    limit: MemoryAmount
    in_use: MemoryAmount
    stays: MemoryAmount = NOTHING
    """Memory of pinned models."""
    size: MemoryAmount = NOTHING
    """Memory of the model when it is ready; nothing if that is not known."""
    file_bytes: int = 0
    ended: bool = False
    """Its last load was ended, so it needs more than ``need``."""

    def lacks(self) -> tuple[str, int | None]:
        """The kind of memory that it lacks most; None: not of one device."""
        for taken in (NOTHING, self.stays, self.in_use):
            short = (self.need + taken).over(self.limit)
            if short.ram > 0 or short.gpu > 0:
                return "memory" if short.ram > 0 else "gpu memory", None
            if not short.is_nothing:
                return "gpu memory", max(short.devices, key=short.on)
        return "memory", None


def refusal(load: RefusedLoad, patience: float) -> CapacityError:
    """Makes the error for a refused load.  ``patience``: seconds that it waited, if it could fit at all."""
    resource, device = load.lacks()
    amounts = (load.need, load.limit, load.in_use, load.stays, load.size)
    if device is None:
        kind, of = "ram" if resource == "memory" else "gpu", ""
        needed, most, taken, stays, size = (getattr(amount, kind) for amount in amounts)
    else:
        kind, of = "gpu", f" on device {device}"
        needed, most, taken, stays, size = (amount.on(device) for amount in amounts)
    option = f"{resource.replace(' ', '_')}_limit"
    said = f"{load.name} needs {_needs(load, needed, size, kind, of)}"
    limit, held = format_bytes(most), f"{format_bytes(taken)} are in use"
    if needed > most:
        text = f"{said}, which is more than the limit of {limit} ({held}). Raise {option}"
        text += ", or run the model elsewhere."
    elif needed + stays > most:
        text = f"{said}, which is more than pinned models leave of the limit of {limit} (they hold "
        text += f"{format_bytes(stays)}; {held}). Raise {option}, or pin fewer models."
    else:
        text = f"{said}, which did not become free within {patience:g} seconds. The limit is {limit} "
        text += f"({held}). Raise {option}, pin fewer models, or give them shorter TTLs."
    return CapacityError(text, needed=needed, limit=most, in_use=taken, resource=resource, size=size)


def _needs(load: RefusedLoad, needed: int, size: int, kind: str, of: str) -> str:
    text = f"{'more than' if load.ended else 'about'} {format_bytes(needed)}"
    text += f" of GPU memory{of}" if kind == "gpu" else ""
    if load.ended and not size:
        files = format_bytes(load.file_bytes)
        return f"{text} to load (its worker was ended at this size; its files have {files})"
    if not 0 < size * _TOLERANCE < needed:
        return text
    return f"{text} to load (and {format_bytes(size)} once it is loaded)"
