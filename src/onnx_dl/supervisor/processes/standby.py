"""The standby worker: a process that has all that a load needs but the model, and when to make it.

It is made when no load is under way, so that it takes no time from one.  A load that may use it asks it to
take the worker's place, and takes over its process and descriptors when it has answered.  If it does not
answer, the template is asked, as without one.  So its death, or a SIGSTOP, costs a moment and no load.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Final

from onnx_dl.errors import ProtocolError
from onnx_dl.supervisor.processes.worker_process import WorkerProcess

PAUSE: Final = 0.05
"""Seconds without a load after which the next one is made: the first call after a load comes first."""
LATEST: Final = 2.0
"""Seconds after which it is made, although loads are under way."""
PREPARED: Final = 60.0
"""Seconds that it has to be prepared; else it is ended, because it is stopped or hangs."""
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

    def __init__(self, process: WorkerProcess, deadline: float) -> None:
        """``deadline``: time when it must be prepared."""
        self.process = process
        self.is_prepared = False
        self.taker: WorkerProcess | None = None
        """The worker whose place it was asked to take."""
        self.deadline: float | None = deadline
        """Time when it must be prepared, or must have answered."""

    @property
    def is_free(self) -> bool:
        return self.is_prepared and self.process.pid is not None and self.taker is None

    def ask(self, worker: WorkerProcess, now: float) -> bool:
        """Asks it to take a worker's place; false: it is gone, or the system refuses to send the request."""
        with contextlib.suppress(OSError):  # too many descriptors are on their way, for instance
            if not worker.assign(self.process):
                return False
            self.taker, self.deadline = worker, now + ANSWER
            return True
        return False

    def end(self) -> WorkerProcess | None:
        """Kills it; it is reaped later.  Returns the worker that waited for its answer."""
        self.process.kill()
        self.process.release()
        taker, self.taker = self.taker, None
        return taker


class StandbyPlace:
    """The place of the one standby worker, and its timing."""

    def __init__(self, now: Callable[[], float], *, is_possible: bool) -> None:
        """``is_possible``: workers are forked."""
        self.is_possible = is_possible
        self._timing = StandbyTiming()
        self._now = now
        self._present: Standby | None = None

    def attach(self, make: Callable[[], WorkerProcess | None], on_gone: Callable[[int], None]) -> None:
        """``make`` makes the object of a standby worker, None: there is no room for one; ``on_gone`` is
        called with the number of one that is ended without a model."""
        self._make, self._on_gone = make, on_gone

    def load_begins(self, worker_id: int) -> None:
        """A worker was asked for."""
        self._timing.load_begins(worker_id, self._now())

    def load_ended(self, worker_id: int) -> None:
        """A worker loads no longer: it is ready, has failed or is gone."""
        self._timing.load_ended(worker_id, self._now())

    def forgo(self) -> None:
        """Makes none until the next load."""
        self._timing.made()

    @property
    def is_awaited(self) -> bool:
        """True if a worker waits for the standby worker's answer."""
        return self._present is not None and self._present.taker is not None

    def waits(self, worker: WorkerProcess) -> bool:
        """Tells whether this worker waits for its answer."""
        return self._present is not None and self._present.taker is worker

    def is_process(self, pid: int) -> bool:
        return self._present is not None and self._present.process.pid == pid

    def is_silent(self) -> bool:
        """Tells whether it has not answered in time."""
        deadline = None if self._present is None else self._present.deadline
        return deadline is not None and self._now() >= deadline

    def deadlines(self, *, can_make: bool) -> list[float | None]:
        """Times when something is to do.  ``can_make``: the template has time to fork one."""
        answer = None if self._present is None else self._present.deadline
        can_make = can_make and self.is_possible and self._present is None
        return [answer, self._timing.due() if can_make else None]

    def make(self) -> WorkerProcess | None:
        """Makes the object of the next one, for which the template is to be asked; None: it is not time."""
        due = self._timing.due()
        if not self.is_possible or self._present is not None or due is None or self._now() < due:
            return None
        self._timing.made()  # also if it fails: the next load may try again
        process = self._make()
        self._present = None if process is None else Standby(process, self._now() + PREPARED)
        return process

    def offer(self, worker: WorkerProcess) -> bool:
        """Asks the standby worker, if there is one, to take this worker's place; returns whether it was."""
        present = self._present
        if present is None or not present.is_free or not worker.conditions.may_be_late:
            return False
        if not present.ask(worker, self._now()):
            self.end()
            return False
        return True

    def reports(self, standby_id: int, worker_id: int) -> int | None:
        """Handles a WorkerStarted of a standby worker; returns its process id if it has taken the place of
        this worker, whose process it is from now on.

        Raises:
            ProtocolError: it was not asked to take this worker's place.
        """
        present = self._present
        if present is None or present.process.worker_id != standby_id:
            return None
        if worker_id == standby_id:
            present.is_prepared, present.deadline = True, None
            return None
        worker = present.taker
        if worker is None or worker.worker_id != worker_id:
            raise ProtocolError(f"a standby worker started as worker {worker_id}")
        self._present = None
        worker.adopt(present.process)
        return worker.pid

    def end(self) -> WorkerProcess | None:
        """Ends the standby worker, if there is one; returns the worker that waited for its answer."""
        present, self._present = self._present, None
        if present is None:
            return None
        self._on_gone(present.process.worker_id)
        return present.end()

    def pid(self) -> int | None:
        return None if self._present is None else self._present.process.pid
