"""Worker processes: their start, their stderr and their end; and the process that saves models.

Which worker to start or kill is not decided here.  Used by the supervisor's one thread only.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final, Protocol

from onnx_dl.core.environment import Environment
from onnx_dl.protocol import control as m
from onnx_dl.supervisor.boundary import boundary
from onnx_dl.supervisor.processes.first_template import SINGLE_THREADED, ForkedTemplate
from onnx_dl.supervisor.processes.saver_process import SaverProcess
from onnx_dl.supervisor.processes.spawn_queue import SpawnQueue
from onnx_dl.supervisor.processes.worker_process import COST, StartConditions, WorkerProcess
from onnx_dl.system import descriptor_limits
from onnx_dl.transport.gauges import Reading

RESERVE: Final = 16
"""Descriptors that stay free, to read files, and to tell clients why they are refused."""
_LOG_TAIL: Final = 2000
"""Characters of a host's log that are quoted in an error."""


class ProcessListener(Protocol):
    """Receiver of what happens to processes.  It is called by ``handle``, ``reap``, ``spawn``, ``kill`` and
    ``on_tick``."""

    def spawned(self, worker_id: int, pid: int) -> None: ...

    def spawn_failed(self, worker_id: int, reason: str) -> None: ...

    def exited(self, worker_id: int, status: int, stderr: str, reading: Reading) -> None: ...

    def saver_ended(self, status: int) -> None: ...


class StandbyConnections(Protocol):
    """The control connections of standby workers, by their numbers, which are negative."""

    def add_worker(self, worker_id: int) -> bytes:
        """Expects a worker; returns the routing id of its control socket."""

    def forget_worker(self, worker_id: int) -> None: ...


class WorkerProcesses:
    """All worker processes, and the saver."""

    def __init__(
        self,
        mode: str,
        timeout: float,
        now: Callable[[], float],
        log: Path | None = None,
        first: ForkedTemplate | None = None,
    ) -> None:
        """Starts the first template, or takes over ``first``.  Others are as for :class:`.SpawnQueue`.

        ``log``: file to which its stderr goes; its end is quoted where no worker could be started.

        Raises:
            OSError: the system has no process for a template, or no descriptors.
        """
        self._log = log
        self._standby_ids = itertools.count(-1, -1)
        self._workers: dict[int, WorkerProcess] = {}
        self.spawn_queue = SpawnQueue(
            mode,
            timeout,
            now,
            lambda worker, pid: self._listener.spawned(worker.worker_id, pid),
            self._on_failed,
            first,
        )
        self._saver: SaverProcess | None = None

    def attach(
        self,
        control: str,
        listener: ProcessListener,
        wrote: Callable[[m.Wrote], None],
        connections: StandbyConnections,
    ) -> None:
        """Sets the address of the control socket, and the receivers; before the first spawn.

        ``wrote`` is called with what workers write on stderr.
        """
        self.spawn_queue.attach(control, self._make_standby, connections.forget_worker)
        self._connections = connections
        self._listener = listener
        self._wrote = wrote

    def sources(self) -> list[int]:
        """Descriptors to poll, for :meth:`handle`."""
        fds = [worker.stderr.fileno() for worker in self._workers.values() if worker.stderr.open]
        return fds + self.spawn_queue.sources()

    def next_deadline(self) -> float | None:
        """Time when :meth:`on_tick` has something to do; None: not before something happens."""
        return self.spawn_queue.next_deadline()

    def on_tick(self) -> None:
        """Makes a standby worker if it is time, and ends a process that has not answered in time."""
        self.spawn_queue.on_tick()

    def handle(self, ready: Container[object]) -> None:
        """Handles what has arrived on these descriptors."""
        for worker in self._workers.values():
            if worker.stderr.open and worker.stderr.fileno() in ready:
                self.drain(worker.worker_id)
        if self.spawn_queue.handle(ready):
            self.reap()  # SIGCHLD may have come before

    def spawn(
        self,
        worker_id: int,
        identity: bytes,
        blobs: Mapping[str, int] = MappingProxyType({}),
        conditions: StartConditions = StartConditions(),  # noqa: B008 - is immutable
    ) -> None:
        """Starts a worker process.  ``identity``: the routing id of its control socket; ``blobs``:
        descriptors of the memory that its model is loaded from, by name.

        Raises:
            DescriptorsExhausted: it needs more descriptors than this process may have.
            OSError: the system has no descriptors or memory left.
        """
        if _spare_descriptors(self._workers.values()) < COST + len(blobs):
            self.spawn_queue.end_standby()
            if _spare_descriptors(self._workers.values()) < COST + len(blobs):
                raise descriptor_limits.exhausted("A worker process")
        self._workers[worker_id] = worker = WorkerProcess(worker_id, identity, blobs, conditions)
        self.spawn_queue.add(worker)

    def kill(self, worker_id: int) -> None:
        """Sends SIGKILL.  A worker that a template was asked for gets it as soon as it exists."""
        if (worker := self._workers.get(worker_id)) is not None:
            worker.kill()
            if self.spawn_queue.cancel(worker):
                self._exited(worker, signal.SIGKILL)

    def greeted(self, worker_id: int) -> None:
        """Notes that the worker has its connection to the control socket."""
        if worker := self._workers.get(worker_id):
            worker.greeted = True

    def readings(self) -> dict[int, Reading]:
        """Current counters of each worker, by worker id."""
        return {worker_id: worker.page.gauges.read() for worker_id, worker in self._workers.items()}

    def drain(self, worker_id: int) -> None:
        """Passes on what a worker has written, before anybody learns of what it has done since."""
        worker = self._workers.get(worker_id)
        if worker is not None and worker.stderr.open:
            with boundary(f"stderr of worker {worker_id}", worker.stop_reading):
                if text := worker.stderr.pump():
                    self._report_stderr(worker, text)

    def reap(self) -> None:
        """Collects every child that has ended; called after SIGCHLD."""
        while (pid := _ended_child()) is not None:
            if self._by_pid(pid) is None:
                self.spawn_queue.receive()  # it may be a worker that the template has not reported yet
            status = os.waitpid(pid, 0)[1]
            if worker := self._by_pid(pid):
                self._exited(worker, status)
            elif not self.spawn_queue.on_reaped(pid, status) and self._saver is not None:
                self._saver.reaped(pid, status)
        if self._saver is not None and (status_of_saver := self._saver.ended()) is not None:
            self._saver = None
            self._listener.saver_ended(status_of_saver)

    def close(self) -> None:
        """Ends the template and the saver.  Workers must have been reaped before."""
        if self._saver is not None:
            self._saver.kill()
            self._saver.wait()
        self.spawn_queue.close()

    def start_saver(self, order: str, blob: int | None, memory: int, environment: Environment) -> None:
        """Starts the process that saves a model; there is one at most.

        Raises:
            OSError: the system has no process or no memory for it.
        """
        self._saver = SaverProcess(environment.over(os.environ | SINGLE_THREADED), order, blob, memory)

    def end_saver(self) -> None:
        if self._saver is not None:
            self._saver.kill()

    def _make_standby(self) -> WorkerProcess | None:
        """Makes the object of a standby worker; None: another worker would lack descriptors."""
        if _spare_descriptors(self._workers.values()) < 2 * COST:
            return None
        number = next(self._standby_ids)
        identity = self._connections.add_worker(number)
        try:
            return WorkerProcess(number, identity, {}, StartConditions(standby=True))
        except OSError:
            self._connections.forget_worker(number)
            return None

    def _by_pid(self, pid: int) -> WorkerProcess | None:
        return next((worker for worker in self._workers.values() if worker.pid == pid), None)

    def _report_stderr(self, worker: WorkerProcess, text: bytes, *, last: bool = False) -> None:
        pid = worker.pid or 0
        self._wrote(m.Wrote(worker_id=worker.worker_id, model=worker.model, pid=pid, text=text, last=last))

    def _on_failed(self, worker: WorkerProcess, reason: str) -> None:
        del self._workers[worker.worker_id]
        self.spawn_queue.standby.load_ended(worker.worker_id)
        worker.release()
        if self._log is not None:  # the application does not see it
            with contextlib.suppress(OSError):
                tail = self._log.read_text(errors="replace")[-_LOG_TAIL:]
                reason += f". The end of {self._log}:\n{tail}"
        self._listener.spawn_failed(worker.worker_id, reason)

    def _exited(self, worker: WorkerProcess, status: int) -> None:
        del self._workers[worker.worker_id]
        self.spawn_queue.standby.load_ended(worker.worker_id)
        reading = worker.page.gauges.read()
        stderr, rest = worker.release()
        self._report_stderr(worker, rest, last=True)
        self._listener.exited(worker.worker_id, status, stderr, reading)


def _spare_descriptors(workers: Iterable[WorkerProcess]) -> int:
    """Descriptors that none of these will need, beyond the reserve."""
    return descriptor_limits.free() - sum(worker.owed for worker in workers) - RESERVE


def _ended_child() -> int | None:
    """Process id of a child that is dead and not reaped; None: there is none."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return None if found is None else found.si_pid
