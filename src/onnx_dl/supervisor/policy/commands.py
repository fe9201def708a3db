"""What the scheduler decides, as data: each command is carried out by :mod:`onnx_dl.supervisor.loop`."""

from __future__ import annotations

from typing import NamedTuple

from onnx_dl.core.events import ModelEvent
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.thread_attributes import Standing
from onnx_dl.protocol.codec import Message
from onnx_dl.supervisor.policy.cache_saves import Wish
from onnx_dl.supervisor.policy.requirements import Need


class StartWorker(NamedTuple):
    """Start a process that will load ``spec``; ``standing``: of the thread that asked for it."""

    worker_id: int
    spec: ModelSpec
    standing: Standing | None = None


class TellWorker(NamedTuple):
    """Send a message to a worker."""

    worker_id: int
    message: Message


class TellClient(NamedTuple):
    """Send a message to a client."""

    client: bytes
    message: Message


class KillWorker(NamedTuple):
    """SIGKILL, now."""

    worker_id: int


class Emit(NamedTuple):
    """Publish an event."""

    event: ModelEvent


class ForgetPeak(NamedTuple):
    """The most memory that a worker had is what it has now."""

    worker_id: int


class Remember(NamedTuple):
    """Keep for the next host what a model needs."""

    key: str
    need: Need


class StartSaver(NamedTuple):
    """Start the process that saves a model for the load cache."""

    wish: Wish


class EndSaver(NamedTuple):
    """SIGKILL to that process, now."""


Command = (
    StartWorker | TellWorker | TellClient | KillWorker | Emit | ForgetPeak | Remember | StartSaver | EndSaver
)
