"""The standby worker: a process that has all that a load needs but the model, and when to make it.

It is made when no load is under way, so that it takes no time from one.  A load that may use it asks it to
take the worker's place, and takes over its process and descriptors when it has answered.  If it does not
answer, the template is asked, as without one.  So its death, or a SIGSTOP, costs a moment and no load.
"""

from __future__ import annotations

from typing import Final

from onnx_dl.supervisor.processes.worker_process import WorkerProcess

PAUSE: Final = 0.05
"""Seconds without a load after which the next one is made: the first call after a load comes first."""
LATEST: Final = 2.0
"""Seconds after which it is made, although loads are under way."""
ANSWER: Final = 1.0
"""Seconds that it has to take a worker's place."""


class StandbyTiming:
    """Decides when a standby worker is made, by an injected clock.  Pure."""

    def __init__(self) -> None:
        self._loading: set[int] = set()
        self._quiet_since = 0.0
        self._latest: float | None = None
        """Time when the next one is made in any case; None: none is wanted."""

    def load_begins(self, worker_id: int, now: float) -> None:
        """A load was asked for.  Later ones will be: a standby worker is wanted."""
        self._loading.add(worker_id)
        if self._latest is None:
            self._latest = now + LATEST

    def load_ended(self, worker_id: int, now: float) -> None:
        """A worker is ready, has failed or is gone."""
        if worker_id in self._loading:
            self._loading.remove(worker_id)
            self._quiet_since = now

    def made(self) -> None:
        """There is one, or none can be made: none is wanted until the next load."""
        self._latest = None

    def due(self) -> float | None:
        """Time when the next one is made; None: not before the next load."""
        if self._latest is None or self._loading:
            return self._latest
        return min(self._latest, self._quiet_since + PAUSE)


class Standby:
    """One standby worker, from the request for it until a worker has its process, or it is ended."""

    def __init__(self, process: WorkerProcess) -> None:
        self.process = process
        self.is_prepared = False
        self.taker: WorkerProcess | None = None
        """The worker whose place it was asked to take."""
        self.deadline: float | None = None
        """Time when it must have answered."""

    @property
    def is_free(self) -> bool:
        return self.is_prepared and self.process.pid is not None and self.taker is None

    def ask(self, worker: WorkerProcess, now: float) -> bool:
        """Asks it to take a worker's place; false: it is gone."""
        if not worker.assign(self.process):
            return False
        self.taker, self.deadline = worker, now + ANSWER
        return True

    def end(self) -> WorkerProcess | None:
        """Kills it; it is reaped later.  Returns the worker that waited for its answer."""
        self.process.kill()
        self.process.release()
        taker, self.taker = self.taker, None
        return taker
