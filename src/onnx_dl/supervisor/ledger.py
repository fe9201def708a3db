"""What memory each worker holds.

Bytes are booked when a worker is measured and given back in one place, when it is reaped.  Pure: who measures
(:mod:`onnx_dl.supervisor.probe`) and who decides (:mod:`onnx_dl.supervisor.scheduler`) is not known here.
"""

from __future__ import annotations

from onnx_dl.model import Usage


class Ledger:
    """Bytes by worker."""

    def __init__(self) -> None:
        self._booked: dict[int, Usage] = {}
        self._reserved: dict[int, int] = {}

    def reserve(self, worker_id: int, nbytes: int) -> None:
        """Bytes that the worker will need for its load; they count until it is measured to need more."""
        self._reserved[worker_id] = nbytes

    def settle(self, worker_id: int) -> None:
        """The load is done: what was measured counts from now on."""
        self._reserved.pop(worker_id, None)

    def counted(self, worker_id: int) -> int:
        """Bytes of the limit that the worker takes."""
        return max(self.of(worker_id).pss, self._reserved.get(worker_id, 0))

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

    def total(self) -> Usage:
        """The sum over all workers that are not reaped; ``gpu`` is None if no worker has a figure."""
        booked = list(self._booked.values())
        gpus = [usage.gpu for usage in booked if usage.gpu is not None]
        return Usage(
            rss=sum(usage.rss for usage in booked),
            private=sum(usage.private for usage in booked),
            gpu=sum(gpus) if gpus else None,
        )
