"""Decisions about loads, as data.  :mod:`onnx_dl.supervisor.policy.orders` carries them out."""

from __future__ import annotations

from typing import NamedTuple

from onnx_dl.protocol import control, failures
from onnx_dl.supervisor.policy.commands import EndSaver, StartSaver
from onnx_dl.supervisor.policy.records import ModelRecord, WorkerRecord


class BeginLoad(NamedTuple):
    """Start this worker."""

    model: ModelRecord
    worker: WorkerRecord


class ContinueLoad(NamedTuple):
    """Have this worker, which has started early, load."""

    model: ModelRecord
    worker: WorkerRecord


class WithdrawStart(NamedTuple):
    """End this model's worker, which has started early: there is no memory for it any more."""

    model: ModelRecord
    at: float


class DenyLoad(NamedTuple):
    """Tell those who waited for the load why it is refused."""

    waiters: list[tuple[bytes, control.Acquire]]
    failure: failures.Failure


class Evict(NamedTuple):
    """Have a worker drain if it is idle."""

    worker_id: int


Decision = BeginLoad | ContinueLoad | WithdrawStart | DenyLoad | Evict | StartSaver | EndSaver
