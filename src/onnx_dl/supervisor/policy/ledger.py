"""Memory that each worker holds.

Bytes are booked when a worker is measured and given back in one place, when it is reaped; those on a GPU when
the driver has taken them back.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from onnx_dl.core.status import Usage
from onnx_dl.supervisor.policy.requirements import NOTHING, MemoryAmount, present

_LINGERING: Final = 2.0
"""Seconds within which a driver takes back the GPU memory of a process that ended: mostly 0.5 to 1.5."""


class _HeldGpu(NamedTuple):
    """GPU memory of a reaped worker, which may not be back yet."""

    pid: int | None
    """None: the driver does not show the process."""
    nbytes: int
    until: float


class Ledger:
    """Bytes by worker."""

    def __init__(self) -> None:
        self._booked: dict[int, Usage] = {}
        self._reserved: dict[int, MemoryAmount] = {}
        self._held_gpu: dict[int, _HeldGpu] = {}

    def reserve(self, worker_id: int, held: MemoryAmount) -> None:
        """Sets what the worker will need for its load or in a run.  It counts until more is measured."""
        self._reserved[worker_id] = held

    def counted(self, worker_id: int) -> MemoryAmount:
        """Memory of the worker that counts towards the limits."""
        return present(self.of(worker_id)).maximum(self._reserved.get(worker_id, NOTHING))

    def book(self, worker_id: int, usage: Usage) -> None:
        """Replaces what is booked for the worker."""
        self._booked[worker_id] = usage

    def of(self, worker_id: int) -> Usage:
        """Usage booked for the worker; zeros if it was never measured."""
        return self._booked.get(worker_id, Usage())

    def give_back(self, worker_id: int) -> Usage:
        """Removes a reaped worker.  Returns what was booked for it."""
        self._reserved.pop(worker_id, None)
        return self._booked.pop(worker_id, Usage())

    # --- GPU memory, which outlives its process -----------------------------------------------------------

    def hold_gpu(self, worker_id: int, pid: int | None, now: float) -> None:
        """Keeps counting the GPU memory of a worker that was reaped at ``now`` for a while."""
        usage = self.of(worker_id)
        if usage.gpu:
            shown = None if usage.gpu_estimated else pid
            self._held_gpu[worker_id] = _HeldGpu(shown, usage.gpu, now + _LINGERING)

    def release_gpu(self, worker_id: int) -> None:
        """Stops counting: the driver no longer shows the worker."""
        self._held_gpu.pop(worker_id, None)

    def lingering_pids(self, now: float) -> dict[int, int]:
        """Process ids of reaped workers that the driver may still show, by worker id."""
        self._expire(now)
        return {worker_id: held.pid for worker_id, held in self._held_gpu.items() if held.pid is not None}

    def lingering(self, now: float) -> MemoryAmount:
        """GPU memory of reaped workers that may not be back yet."""
        self._expire(now)
        return MemoryAmount(gpu=sum(held.nbytes for held in self._held_gpu.values()))

    def _expire(self, now: float) -> None:
        self._held_gpu = {worker_id: held for worker_id, held in self._held_gpu.items() if held.until > now}
