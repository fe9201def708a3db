"""Whether there is memory for a load, and who makes way for it: rules.

Pure.  Who waits and what is done is :mod:`onnx_dl.supervisor.scheduler`'s; what is held is the ledger's.
Bytes are proportional set sizes, so that pages that workers share count once.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Final, NamedTuple

BASE: Final = 32 << 20
"""Bytes of a worker without a model, which is the first guess for a model that was never measured."""
GROWTH: Final = 2.2
"""Memory of a model that was never measured, in sizes of its files: as they are and packed, and a run."""


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
    nbytes: int
    idle_for: float
    seconds: float
    """What it takes to load the model again."""
    priority: int = 0

    @property
    def keep(self) -> tuple[float, float]:
        """The larger, the longer it stays: priority first; then what a reload costs per byte, less with each
        second without use."""
        return self.priority, max(self.seconds, 0.01) / (max(self.nbytes, 1) * max(self.idle_for, 0.001))


def guess(file_bytes: int, limit: int | None) -> int:
    """Bytes that a model needs of which only the size of its files is known.

    A guess alone refuses nobody: what may fit gets all there is, until it was measured.
    """
    least, likely = BASE + file_bytes, BASE + int(GROWTH * file_bytes)
    return likely if limit is None else max(least, min(likely, limit))


def decide(
    need: int, limit: int | None, counted: int, leaving: int, idle: Sequence[Candidate]
) -> tuple[Answer, list[int]]:
    """What to do for a load that needs so many bytes, and which workers to evict.

    Args:
        counted: bytes of all workers, reserved ones included.
        leaving: those of them whose workers are on their way out.
        idle: who could make way.
    """
    if limit is None or counted + need <= limit:
        return Answer.LOAD, []
    if need > limit:
        return Answer.NEVER, []
    missing = counted + need - limit - leaving
    if missing <= 0:
        return Answer.WAIT, []
    chosen: list[Candidate] = []
    for candidate in sorted(idle, key=lambda c: c.keep):
        if missing <= 0:
            break
        chosen.append(candidate)
        missing -= candidate.nbytes
    if missing > 0:  # not even all of them would do: they stay
        return Answer.WAIT, []
    # Who was chosen before a large one may not be needed any more.
    spare = -missing
    for candidate in sorted(chosen, key=lambda c: c.keep, reverse=True):
        if candidate.nbytes <= spare:
            chosen.remove(candidate)
            spare -= candidate.nbytes
    return Answer.EVICT, [candidate.worker_id for candidate in chosen]
