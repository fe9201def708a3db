"""Whether there is memory for a load, and who makes way for it: rules.

Pure.  Who waits and what is done is :mod:`onnx_dl.supervisor.policy.scheduler`'s; what is held is the ledger's.
Bytes of RAM are proportional set sizes, so that pages that workers share count once.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Final, NamedTuple

from onnx_dl.core.text import format_bytes
from onnx_dl.errors import CapacityError
from onnx_dl.supervisor.policy.requirements import NOTHING, Bytes, Need, Peak

BASE: Final = 32 << 20
"""Bytes of a worker without a model, which is the first guess for a model that was never measured."""
GROWTH: Final = 2.2
"""Memory of a model that was never measured, in sizes of its files: as they are and packed, and a run."""
GPU_BASE: Final = 300 << 20
"""Bytes of a CUDA context with its libraries, before there is a model."""
GPU_GROWTH: Final = 1.5
"""GPU memory of a model that was never measured, in sizes of its files: its weights, and a run."""
_ALIKE: Final = 1.05
"""A load that takes so much of what was measured takes what was measured."""


class Answer(enum.Enum):
    """What to do with a load that is wished for."""

    LOAD = enum.auto()
    NEVER = enum.auto()
    """It is larger than the limit, or than what those leave of it who stay."""
    WAIT = enum.auto()
    """Until somebody who leaves is gone, or somebody who is in use is idle."""
    EVICT = enum.auto()


class Candidate(NamedTuple):
    """A worker that is idle and may be evicted."""

    worker_id: int
    held: Bytes
    idle_for: float
    seconds: float
    """What it takes to load the model again."""
    priority: int = 0

    def keep(self, missing: Bytes) -> tuple[float, float]:
        """The larger, the longer it stays: priority first; then what a reload costs per byte of what is
        missing, less with each second without use."""
        freed = max(self.frees(missing), 1)
        return self.priority, max(self.seconds, 0.01) / (freed * max(self.idle_for, 0.001))

    def frees(self, missing: Bytes) -> int:
        """Bytes of the kinds that are missing."""
        return (self.held.ram if missing.ram > 0 else 0) + (self.held.gpu if missing.gpu > 0 else 0)


class Guess(NamedTuple):
    """What a model needs that was never measured: at least, and probably."""

    least: Bytes
    likely: Bytes


def guess(file_bytes: int, on_gpu: bool = False) -> Guess:
    """What a model needs of which only the size of its files is known."""
    gpu = GPU_BASE + int(GPU_GROWTH * file_bytes) if on_gpu else 0
    return Guess(Bytes(BASE + file_bytes), Bytes(BASE + int(GROWTH * file_bytes), gpu))


class Plan(NamedTuple):
    """On which terms a load may begin."""

    need: Bytes = NOTHING
    """What must be free."""
    measured: bool = False
    """Such a load has taken that; else it is a guess, and a load that takes more than there is, is ended."""
    mapped: bool = False
    """It may come from the load cache only, because that is what needs no more."""

    def bound(self, free: int) -> int:
        """Bytes of RAM with which the load is ended, where so many would be free without it.

        What it was promised is its own, even if others have grown meanwhile.
        """
        return max(free, int(self.need.ram * (_ALIKE if self.measured else 1)))


def plan(known: Need | None, guessed: Guess, left: Bytes, *, saved: bool) -> Plan:
    """On which terms a load may begin.

    What was measured counts as it is.  What never was refuses nobody who may fit: it gets all there is, if it
    does not seem to need less, and no more than that.

    Args:
        left: bytes that nobody holds who will stay.
        saved: the load cache has the model.
    """
    known = known or Need()
    plain = _way(known, known.load, guessed, left)
    if not saved or not (known.mapped.is_measured or known.is_loaded):
        return plain
    mapped = _way(known, known.mapped, Guess(known.steady, known.steady), left)._replace(mapped=True)
    return mapped if known.mapped.is_measured or not plain.need.fits(left) else plain


def _way(known: Need, peak: Peak, guessed: Guess, left: Bytes) -> Plan:
    # Runs alone refuse nobody: a model that once took more than there is loads when it has all there is.
    held = known.steady.most(known.peak.least(left))
    if peak.is_measured:
        return Plan(Bytes(peak.nbytes).most(held), measured=True)
    need = guessed.likely.least(left).most(guessed.least)
    if peak.ended:
        need = need.most(Bytes(peak.nbytes + 1))
    return Plan(need.most(held))


def decide(
    need: Bytes,
    limit: Bytes,
    counted: Bytes,
    leaving: Bytes,
    idle: Sequence[Candidate],
    stays: Bytes = NOTHING,
) -> tuple[Answer, list[int]]:
    """What to do for a load that needs so much, and which workers to evict.

    Args:
        counted: what all workers hold, reserved bytes included.
        leaving: what of it belongs to workers on their way out.
        idle: who could make way.
        stays: what belongs to workers that never will.
    """
    if not (need + stays).fits(limit):
        return Answer.NEVER, []
    if (counted + need).fits(limit):
        return Answer.LOAD, []
    wanted = missing = counted + need - limit - leaving
    chosen: list[Candidate] = []
    for candidate in sorted(idle, key=lambda c: c.keep(wanted)):
        if candidate.frees(missing):
            chosen.append(candidate)
            missing -= candidate.held
    if not missing.fits(NOTHING):  # not even all of them would do: they stay
        return Answer.WAIT, []
    # Who was chosen before a large one may not be needed any more.
    for candidate in sorted(chosen, key=lambda c: c.keep(wanted), reverse=True):
        if (missing + candidate.held).fits(NOTHING):
            chosen.remove(candidate)
            missing += candidate.held
    return (Answer.EVICT if chosen else Answer.WAIT), [candidate.worker_id for candidate in chosen]


class Case(NamedTuple):
    """A load that is refused."""

    name: str
    need: Bytes
    limit: Bytes
    in_use: Bytes
    stays: Bytes = NOTHING
    """What belongs to pinned models."""
    size: Bytes = NOTHING
    """What the model takes once it is loaded; nothing if that is not known."""
    file_bytes: int = 0
    ended: bool = False
    """A load of it was ended, so that it needs more than ``need``."""

    @property
    def resource(self) -> str:
        """The kind of memory that it lacks most."""
        for short in (self.need - self.limit, self.need + self.stays - self.limit):
            if not short.fits(NOTHING):
                return "memory" if short.ram > 0 else "gpu memory"
        short = self.in_use + self.need - self.limit
        return "memory" if short.ram > 0 or short.gpu <= 0 else "gpu memory"


def refusal(case: Case, patience: float) -> CapacityError:
    """Why the model is not loaded, which waited for ``patience`` seconds if it could be at all."""
    resource = case.resource
    kind = "ram" if resource == "memory" else "gpu"
    needed, most, taken, stays, size = (
        getattr(bytes_, kind) for bytes_ in (case.need, case.limit, case.in_use, case.stays, case.size)
    )
    option = f"{resource.replace(' ', '_')}_limit"
    said = f"{case.name} needs {_needs(case, needed, size, kind)}"
    limit, held = format_bytes(most), f"{format_bytes(taken)} are in use"
    if needed > most:
        text = f"{said}, which is more than the limit of {limit} ({held}). Raise {option}"
        text += ", or run the model elsewhere."
    elif needed + stays > most:
        text = f"{said}, which is more than pinned models leave of the limit of {limit} (they hold "
        text += f"{format_bytes(stays)}; {held}). Raise {option}, or pin fewer models."
    else:
        text = f"{said}, which did not become free within {patience:g} seconds of the limit of {limit} "
        text += f"({held}). Raise {option}, pin fewer models, or give them shorter TTLs."
    return CapacityError(text, needed=needed, limit=most, in_use=taken, resource=resource, size=size)


def _needs(case: Case, needed: int, size: int, kind: str) -> str:
    text = f"{'more than' if case.ended else 'about'} {format_bytes(needed)}"
    text += " of GPU memory" if kind == "gpu" else ""
    if case.ended and not size:
        return f"{text} to load, where it was ended (its files have {format_bytes(case.file_bytes)})"
    if not 0 < size * _ALIKE < needed:  # less than that is the noise of what is measured
        return text
    return f"{text} to load (and {format_bytes(size)} once it is loaded)"
