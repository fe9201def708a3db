"""Loads of models in this process, each in a thread of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from onnx_dl.concurrency import spawning
from onnx_dl.concurrency.spawning import Thread
from onnx_dl.inprocess import local_worker
from onnx_dl.inprocess.local_worker import BlobSources, LocalWorker
from onnx_dl.inprocess.memory import GrowthMeter, resident_bytes
from onnx_dl.protocol import control, failures
from onnx_dl.system import heap
from onnx_dl.workers.engines.base import Backend


class LoadOutcome(NamedTuple):
    """End of a load, as a worker process would report it."""

    backend: list[Backend]
    """The engine's model, to be taken out, so that nobody else keeps it; empty: the load failed."""
    message: control.WorkerReady | control.WorkerFailed


def start(
    worker: LocalWorker, sources: BlobSources, meter: GrowthMeter, ended: Callable[[LoadOutcome], object]
) -> None:
    """Starts a load; ``ended`` is called in its thread.  Raises ProcessesExhausted: there is no thread."""
    load = Thread(lambda: ended(_load(worker, sources, meter)), "onnx-dl-load")
    spawning.start(load, f"The load of {worker.spec.name}")


def _load(worker: LocalWorker, sources: BlobSources, meter: GrowthMeter) -> LoadOutcome:
    began = time.monotonic()
    try:
        local_worker.prepare(worker.spec.engine)  # what the library itself takes is not the model's
        meter.begin(worker.id, resident_bytes())
        backend = local_worker.load(worker.spec, sources)
        description = local_worker.described(backend)
        heap.trim_heap()
    except Exception as error:  # any error of the engine is for those who wait for the model
        spawning.note_shortage(error)
        return LoadOutcome([], control.WorkerFailed(worker_id=worker.id, failure=failures.describe(error)))
    seconds = time.monotonic() - began
    ready = control.WorkerReady(
        worker_id=worker.id, address="", secret="", description=description, seconds=seconds
    )
    return LoadOutcome([backend], ready)
