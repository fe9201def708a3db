"""Whether there is memory for a load, and who makes way for it: rules.

Pure.  Who waits and what is done is :mod:`onnx_dl.supervisor.scheduler`'s; what is held is the ledger's.
Bytes of RAM are proportional set sizes, so that pages that workers share count once.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Final, NamedTuple

from onnx_dl.errors import CapacityError
from onnx_dl.events import format_bytes
from onnx_dl.supervisor.needs import NOTHING, Bytes

BASE: Final = 32 << 20
"""Bytes of a worker without a model, which is the first guess for a model that was never measured."""
GROWTH: Final = 2.2
"""Memory of a model that was never measured, in sizes of its files: as they are and packed, and a run."""
GPU_BASE: Final = 300 << 20
"""Bytes of a CUDA context with its libraries, before there is a model."""
GPU_GROWTH: Final = 1.5
"""GPU memory of a model that was never measured, in sizes of its files: its weights, and a run."""


class Answer(enum.Enum):
    """What to do with a load that is wished for."""

    LOAD = enum.auto()
    NEVER = enum.auto()
    """It is larger than the limit."""
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


def guess(file_bytes: int, limit: Bytes, on_gpu: bool = False) -> Bytes:
    """What a model needs of which only the size of its files is known.

    A guess alone refuses nobody: what may fit gets all there is, until it was measured.
    """
    least, likely = BASE + file_bytes, BASE + int(GROWTH * file_bytes)
    gpu = GPU_BASE + int(GPU_GROWTH * file_bytes) if on_gpu else 0
    return Bytes(max(least, min(likely, limit.ram)), min(gpu, limit.gpu))


def decide(
    need: Bytes, limit: Bytes, counted: Bytes, leaving: Bytes, idle: Sequence[Candidate]
) -> tuple[Answer, list[int]]:
    """What to do for a load that needs so much, and which workers to evict.

    Args:
        counted: what all workers hold, reserved bytes included.
        leaving: what of it belongs to workers on their way out.
        idle: who could make way.
    """
    if not need.fits(limit):
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


def refusal(name: str, need: Bytes, limit: Bytes, in_use: Bytes, patience: float) -> CapacityError:
    """Why the model is not loaded after ``patience`` seconds: of the kind of memory that it lacks."""
    short = need - limit if not need.fits(limit) else in_use + need - limit
    if short.ram > 0 or short.gpu <= 0:
        needed, most, taken, resource = need.ram, limit.ram, in_use.ram, "memory"
    else:
        needed, most, taken, resource = need.gpu, limit.gpu, in_use.gpu, "gpu memory"
    option = f"{resource.replace(' ', '_')}_limit"
    if needed > most:
        what, advice = "is more than the limit", f"Raise {option}, or run the model elsewhere."
    else:
        what = f"did not become free within {patience:g} seconds"
        advice = f"Raise {option}, pin fewer models, or give them shorter TTLs."
    kind = "" if resource == "memory" else " of GPU memory"
    return CapacityError(
        f"{name} needs about {format_bytes(needed)}{kind}, which {what} of {format_bytes(most)} "
        f"({format_bytes(taken)} are in use). {advice}",
        needed=needed,
        limit=most,
        in_use=taken,
        resource=resource,
    )
