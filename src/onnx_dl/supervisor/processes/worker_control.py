"""Starts workers and savers, and turns what they do into facts for the scheduler."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import time
from collections.abc import Callable
from typing import Any

from onnx_dl.core.spec import ModelSpec, blob_tag
from onnx_dl.errors import OnnxDLError, ProtocolError, WorkerDied
from onnx_dl.protocol import codec, failures
from onnx_dl.protocol.control import (
    Saveable,
    WorkerDrained,
    WorkerDraining,
    WorkerFailed,
    WorkerLoading,
    WorkerPrepared,
    WorkerReady,
    WorkerStarted,
    from_worker,
)
from onnx_dl.supervisor.boundary import as_failure, boundary
from onnx_dl.supervisor.clients import Clients
from onnx_dl.supervisor.control import Control
from onnx_dl.supervisor.measure.sampler import Sampler
from onnx_dl.supervisor.policy.commands import Command, Run, SendToWorker, StartSaver, StartWorker
from onnx_dl.supervisor.policy.scheduler import Scheduler
from onnx_dl.supervisor.processes.worker_process import MOST_BLOBS, StartConditions, exit_status
from onnx_dl.supervisor.processes.worker_processes import WorkerProcesses
from onnx_dl.system import descriptor_limits
from onnx_dl.transport.gauges import Reading


@dataclasses.dataclass
class WorkerControl:
    """Listener to all processes, and handler of the messages of workers.

    A failure in handling one worker ends that worker: its state is not to be trusted, the others are not
    concerned.
    """

    scheduler: Scheduler
    processes: WorkerProcesses
    control: Control
    clients: Clients
    sampler: Sampler
    run: Run

    def __post_init__(self) -> None:
        scheduler, measure = self.scheduler, self.sampler.on_leaving
        self._handlers: dict[type[codec.Message], Callable[[Any, float], list[Command]]] = {
            WorkerStarted: self._on_started,
            WorkerPrepared: lambda message, now: scheduler.on_prepared(message.worker_id),
            WorkerLoading: lambda message, now: scheduler.on_loading(message.worker_id),
            WorkerReady: self._on_ready,
            Saveable: scheduler.on_saveable,
            WorkerFailed: self._on_load_failed,
            WorkerDraining: lambda message, now: scheduler.on_draining(
                message.worker_id, measure(message.worker_id), now, message.reason
            ),
            WorkerDrained: lambda message, now: scheduler.on_drained(
                message.worker_id, measure(message.worker_id), now
            ),
        }

    def start(self, command: StartWorker) -> None:
        worker_id, spec = command.worker_id, command.spec
        identity = self.control.add_worker(worker_id)
        self.sampler.on_start(worker_id, spec)
        conditions = StartConditions(
            spec.name, spec.pristine, command.thread_attributes, spec.environment, spec.confinement()
        )
        self.processes.spawn(worker_id, identity, self._blobs(spec), conditions)

    def start_failed(self, command: StartWorker, error: Exception) -> None:
        if self.control.expects(command.worker_id):
            failure = as_failure(_start_error(error) if isinstance(error, OSError) else error)
            self.spawn_failed(command.worker_id, str(error), failure)

    def send(self, command: SendToWorker) -> None:
        self.control.send_to_worker(command.worker_id, command.message)

    def send_failed(self, command: SendToWorker, error: Exception) -> None:
        self._broken(command.worker_id, error)

    def _broken(self, worker_id: int, error: Exception) -> None:
        self.run(self.scheduler.on_broken(worker_id, as_failure(error)))

    def start_saver(self, command: StartSaver) -> None:
        wish = command.request
        blob = None if wish.blob is None else self.clients.blobs().get(wish.blob)
        if wish.blob is not None and blob is None:  # the application that gave these bytes is gone
            self.saver_ended(0)
        else:
            self.processes.start_saver(wish.order, blob, wish.need.ram, wish.environment)

    def _blobs(self, spec: ModelSpec) -> dict[str, int]:
        """Descriptors of the memory that a model is loaded from, by tag: those that clients still have, and
        that fit into one message."""
        kept = self.clients.blobs()
        found = [(blob_tag(name), kept[name]) for name in spec.blobs if name in kept]
        return dict(found[:MOST_BLOBS])

    def spawned(self, worker_id: int, pid: int) -> None:
        with self._boundary(worker_id):
            self.sampler.on_spawned(worker_id, pid)
            self.run(self.scheduler.on_spawned(worker_id, pid))

    def spawn_failed(self, worker_id: int, reason: str, failure: failures.Failure | None = None) -> None:
        with self._end_boundary(worker_id):
            self._forget(worker_id, Reading())
            self.run(self.scheduler.on_spawn_failed(worker_id, reason, time.monotonic(), failure))

    def exited(self, worker_id: int, status: int, stderr: str, reading: Reading) -> None:
        self.control.receive()  # messages that the worker sent before it died come first
        with self._end_boundary(worker_id):
            self._forget(worker_id, reading)
            now = time.monotonic()
            commands = self.scheduler.on_exited(
                worker_id, exit_status(status), stderr, now, reading.exceeded, runs=reading.runs
            )
            self.run(commands)

    def saver_ended(self, status: int) -> None:
        with boundary("the end of a saver", self.search_failed):
            self.run(self.scheduler.on_saver_ended(exit_status(status), time.monotonic()))

    def search_failed(self, error: Exception) -> None:
        """Answers all who wait for room: the search for it failed."""
        self.run(self.scheduler.on_stuck(as_failure(error), time.monotonic()))

    def _forget(self, worker_id: int, reading: Reading) -> None:
        self.sampler.forget(worker_id, reading)
        self.control.forget_worker(worker_id)

    def _boundary(self, worker_id: int) -> contextlib.AbstractContextManager[None]:
        return boundary(f"worker {worker_id}", lambda error: self._broken(worker_id, error))

    def _end_boundary(self, worker_id: int) -> contextlib.AbstractContextManager[None]:
        return boundary(
            f"the end of worker {worker_id}",
            lambda error: self.run(self.scheduler.on_lost(worker_id, as_failure(error), time.monotonic())),
        )

    def receive(self, worker_id: int, data: bytes) -> None:
        """Handles one message of a worker."""
        if worker_id < 0:
            _receive_from_standby(self, worker_id, data)
            return
        with self._boundary(worker_id):
            message = from_worker(data)
            if message.worker_id == worker_id:  # a worker may report about itself only
                self.run(self._handlers[type(message)](message, time.monotonic()))

    def _on_started(self, message: WorkerStarted, now: float) -> list[Command]:
        self.processes.greeted(message.worker_id)
        return self.scheduler.on_started(message.worker_id)

    def _on_ready(self, message: WorkerReady, now: float) -> list[Command]:
        self.processes.drain(message.worker_id)
        self.processes.spawn_queue.standby.load_ended(message.worker_id)
        usage = self.sampler.on_loaded(message.worker_id)
        return self.scheduler.on_ready(message, usage, now)

    def _on_load_failed(self, message: WorkerFailed, now: float) -> list[Command]:
        self.processes.drain(message.worker_id)
        self.processes.spawn_queue.standby.load_ended(message.worker_id)
        return self.scheduler.on_load_failed(message, now)


def _start_error(error: OSError) -> Exception:
    """The error for what the system refused to give a worker."""
    if isinstance(error, OnnxDLError):
        return error
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return descriptor_limits.exhausted("A worker process")
    return WorkerDied(f"No worker process could be started: {error}.")


def _receive_from_standby(workers: WorkerControl, standby_id: int, data: bytes) -> None:
    """Handles a message of a standby worker: it is prepared, or it has taken a worker's place."""
    with boundary("the standby worker", lambda error: workers.processes.spawn_queue.end_standby()):
        message = from_worker(data)
        if not isinstance(message, WorkerStarted):
            raise ProtocolError(f"a standby worker sent {type(message).__name__}")
        pid = workers.processes.spawn_queue.standby.reports(standby_id, message.worker_id)
        if pid is not None:
            workers.control.rename_worker(standby_id, message.worker_id)
            workers.spawned(message.worker_id, pid)
            workers.receive(message.worker_id, data)
