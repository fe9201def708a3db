"""Decisions of the scheduler as data.  The supervisor's loop carries them out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from onnx_dl.core.environment import ThreadAttributes
from onnx_dl.core.events import ModelEvent
from onnx_dl.core.spec import ModelSpec
from onnx_dl.protocol.codec import Message
from onnx_dl.supervisor.policy.cache_saves import SaveRequest
from onnx_dl.supervisor.policy.requirements import Requirement


class StartWorker(NamedTuple):
    """Start a process that loads ``spec``; ``thread_attributes``: of the thread that asked for it."""

    worker_id: int
    spec: ModelSpec
    thread_attributes: ThreadAttributes | None = None


class SendToWorker(NamedTuple):
    """Send a message to a worker."""

    worker_id: int
    message: Message


class SendToClient(NamedTuple):
    """Send a message to a client."""

    client: bytes
    message: Message


class KillWorker(NamedTuple):
    """Send SIGKILL to a worker, now."""

    worker_id: int


class Emit(NamedTuple):
    """Publish an event."""

    event: ModelEvent


class ForgetPeak(NamedTuple):
    """Reset the peak of a worker's memory to what it has now."""

    worker_id: int


class Remember(NamedTuple):
    """Store what a model requires for the next host."""

    key: str
    requirement: Requirement


class StartSaver(NamedTuple):
    """Start the process that saves a model for the load cache."""

    request: SaveRequest


class EndSaver(NamedTuple):
    """Send SIGKILL to that process, now."""


Command = (
    StartWorker
    | SendToWorker
    | SendToClient
    | KillWorker
    | Emit
    | ForgetPeak
    | Remember
    | StartSaver
    | EndSaver
)

Run = Callable[[Iterable[Command]], None]
"""Carries out commands."""
