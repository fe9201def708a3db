"""Measures workers for the scheduler: what they hold, whether they are busy, and when to look."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import Usage
from onnx_dl.protocol import control as m
from onnx_dl.supervisor.measure.memory_probe import MemoryProbe
from onnx_dl.supervisor.metrics.counters import Figures, Metrics
from onnx_dl.supervisor.policy.commands import ForgetPeak, Run
from onnx_dl.supervisor.policy.gpu_devices import uses_gpu
from onnx_dl.supervisor.policy.measuring import Sample
from onnx_dl.supervisor.policy.scheduler import Scheduler
from onnx_dl.supervisor.processes.worker_processes import WorkerProcesses
from onnx_dl.transport.gauges import Reading

if TYPE_CHECKING:
    from onnx_dl.supervisor.hostfile.applied import AppliedFile


@dataclasses.dataclass
class Sampler:
    """Owns the memory probe and the metrics; one for all workers of a supervisor."""

    scheduler: Scheduler
    processes: WorkerProcesses
    file: AppliedFile | None
    run: Run
    metrics: Metrics = dataclasses.field(default_factory=Metrics)
    _probe: MemoryProbe | None = None
    _on_gpu: set[int] = dataclasses.field(default_factory=set)
    """Ids of workers whose models ask for a GPU."""
    _runs: dict[int, int] = dataclasses.field(default_factory=dict)
    """Number of runs of each worker when it was last measured."""

    def on_start(self, worker_id: int, spec: ModelSpec) -> None:
        """A worker is about to be started for this model."""
        if uses_gpu(spec):
            self._on_gpu.add(worker_id)

    def on_spawned(self, worker_id: int, pid: int) -> None:
        if worker_id in self._on_gpu:
            self._meter().begin(pid)

    def on_loaded(self, worker_id: int) -> Usage:
        """Measures a worker that has just loaded its model."""
        self._runs[worker_id] = 0
        if worker_id in self._on_gpu and (pid := self._pid(worker_id)) is not None:
            self._meter().loaded(pid)
        return self.measure(worker_id)

    def on_leaving(self, worker_id: int) -> Usage:
        """Measures a worker that drains; zeros if it had no run since it was last measured.

        A load waits for the end of an evicted worker, which was measured for the decision to evict it.
        """
        reading = self.processes.readings().get(worker_id, Reading())
        if not reading.busy and self._runs.get(worker_id) == reading.runs:
            return Usage()
        self._runs[worker_id] = reading.runs
        return self.measure(worker_id)

    def measure(self, worker_id: int) -> Usage:
        pid = self._pid(worker_id)
        return Usage() if pid is None else self._meter().measure(pid)

    def forget_peak(self, command: ForgetPeak) -> None:
        if (pid := self._pid(command.worker_id)) is not None:
            self._meter().forget_peak(pid)

    def forget(self, worker_id: int, reading: Reading) -> None:
        """Keeps the last figures of an ended worker for the metrics, and nothing else of it."""
        if worker_id in self._on_gpu and (pid := self._pid(worker_id)) is not None:
            self._meter().end(pid)
        self.metrics.on_gone(worker_id, reading)
        self._on_gpu.discard(worker_id)
        self._runs.pop(worker_id, None)

    def on_tick(self, now: float) -> None:
        """Gives the scheduler the figures that are due, and then the time."""
        for load in self.scheduler.to_weigh(now):  # 20 µs each
            nbytes = self._meter().weigh(load.pid, load.nbytes)
            self.run(self.scheduler.on_weighed(load.worker_id, nbytes, now))
        if draining := self.scheduler.to_check(now):
            readings = self.processes.readings()
            for worker_id in draining:
                busy = readings.get(worker_id, Reading()).busy
                self.run(self.scheduler.on_checked(worker_id, busy, now))
        seen = self._sample(now) if self.scheduler.wants_look(now) else {}
        self.run(self.scheduler.on_tick(now, seen))

    def refresh(self, now: float, *, all_workers: bool = False) -> None:
        """Gives the scheduler fresh figures: of the workers used since the last look, or of all."""
        for worker_id, seen in self._sample(now, all_workers=all_workers).items():
            self.run(self.scheduler.on_measured(worker_id, seen, now))

    def prepare_load(self, ask: m.Acquire, now: float) -> None:
        """Measures what the decision about a load needs: the growth of workers, and the size of the GPUs."""
        if self.scheduler.is_loaded(ask.spec.unit):
            return
        self.refresh(now)
        grouped = self.file.grouped().get(ask.spec.unit, []) if self.file else []
        if any(map(uses_gpu, (ask.spec, *ask.companions, *grouped))):
            self.scheduler.know_gpus(self._meter().gpu_total(), self._meter().host_gpus())

    def figures(self) -> Figures:
        """Measures everything for a scrape of the metrics."""
        now = time.monotonic()
        self.refresh(now, all_workers=True)
        scheduler, readings = self.scheduler, self.processes.readings()
        models = scheduler.snapshot(now, readings)
        return self.metrics.figures(models, readings, scheduler.memory_limit, scheduler.in_use(now).ram)

    def _sample(self, now: float, *, all_workers: bool = False) -> dict[int, Sample]:
        """Reads every worker's counters, and measures those used since the last look (1 ms each), those that
        prepare for a load, or all."""
        readings, preparing = self.processes.readings(), self.scheduler.preparing()
        seen = {}
        for worker_id in self.scheduler.pids():
            reading = readings.get(worker_id, Reading())
            is_used = reading.busy or self._runs.get(worker_id) != reading.runs
            is_due = all_workers or is_used or worker_id in preparing
            seen[worker_id] = Sample(self.measure(worker_id) if is_due else None, reading)
            self._runs[worker_id] = reading.runs
        for worker_id, pid in self.scheduler.lingering_pids(now).items():
            seen[worker_id] = Sample(Usage(gpu=self._meter().gpu_bytes(pid)))
        return seen

    def _pid(self, worker_id: int) -> int | None:
        return self.scheduler.pids().get(worker_id)

    def _meter(self) -> MemoryProbe:
        if self._probe is None:
            self._probe = MemoryProbe()
        return self._probe
