"""What memory each worker holds.

Bytes are booked when a worker is measured and given back in one place, when it is reaped; those on a GPU when
the driver has them back.  Pure: who measures (:mod:`onnx_dl.supervisor.measure.memory_probe`) and who decides
(:mod:`onnx_dl.supervisor.policy.scheduler`) is not known here.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from onnx_dl.core.status import Usage
from onnx_dl.supervisor.policy.requirements import NOTHING, Bytes, present

_AFTERGLOW: Final = 2.0
"""Seconds within which a driver has taken back the GPU memory of a process that ended: mostly 0.5 to 1.5."""


class _Ghost(NamedTuple):
    """A worker that is reaped and whose GPU memory may not be back."""

    pid: int | None
    """None: the driver does not show it."""
    gpu: int
    until: float


class Ledger:
    """Bytes by worker."""

    def __init__(self) -> None:
        self._booked: dict[int, Usage] = {}
        self._reserved: dict[int, Bytes] = {}
        self._ghosts: dict[int, _Ghost] = {}

    def reserve(self, worker_id: int, held: Bytes) -> None:
        """What the worker will need for its load, or in a run; it counts until more is measured."""
        self._reserved[worker_id] = held

    def counted(self, worker_id: int) -> Bytes:
        """What of the limits the worker takes."""
        return present(self.of(worker_id)).most(self._reserved.get(worker_id, NOTHING))

    def book(self, worker_id: int, usage: Usage) -> None:
        """What the worker holds now, instead of what was booked before."""
        self._booked[worker_id] = usage

    def of(self, worker_id: int) -> Usage:
        """What is booked for the worker; nothing if it was never measured."""
        return self._booked.get(worker_id, Usage())

    def give_back(self, worker_id: int) -> Usage:
        """The worker is reaped: its bytes are the system's again.  Returns what they were."""
        self._reserved.pop(worker_id, None)
        return self._booked.pop(worker_id, Usage())

    # --- GPU memory, which outlives its process -----------------------------------------------------------

    def haunt(self, worker_id: int, pid: int | None, now: float) -> None:
        """The worker was reaped at ``now``; what is booked for it on a GPU counts a little longer."""
        usage = self.of(worker_id)
        if usage.gpu:
            shown = None if usage.gpu_estimated else pid
            self._ghosts[worker_id] = _Ghost(shown, usage.gpu, now + _AFTERGLOW)

    def lay(self, worker_id: int) -> None:
        """The driver shows the worker no more."""
        self._ghosts.pop(worker_id, None)

    def ghosts(self, now: float) -> dict[int, int]:
        """Process ids of those that the driver may still show, by worker id."""
        self._expire(now)
        return {worker_id: ghost.pid for worker_id, ghost in self._ghosts.items() if ghost.pid is not None}

    def afterglow(self, now: float) -> Bytes:
        """What of the limits those take whose GPU memory may not be back."""
        self._expire(now)
        return Bytes(gpu=sum(ghost.gpu for ghost in self._ghosts.values()))

    def _expire(self, now: float) -> None:
        self._ghosts = {worker_id: ghost for worker_id, ghost in self._ghosts.items() if ghost.until > now}

    def total(self) -> Usage:
        """The sum over all workers that are not reaped; ``gpu`` is None if no worker has a figure."""
        booked = list(self._booked.values())
        gpus = [usage.gpu for usage in booked if usage.gpu is not None]
        return Usage(
            rss=sum(usage.rss for usage in booked),
            private=sum(usage.private for usage in booked),
            gpu=sum(gpus) if gpus else None,
        )
