"""Messages between the supervisor, the template, and a standby worker."""

from __future__ import annotations

from typing import Any

from onnx_dl.core.environment import NOTHING, Environment, ThreadAttributes
from onnx_dl.core.spec import Confinement
from onnx_dl.protocol.codec import PROTOCOL_VERSION, Message, Reader

# Supervisor <-> template over a Unix socket.


class Spawn(Message):
    """Become a worker or fork one.

    Descriptors come along: lifeline, stderr, page of gauges, and the model's blobs.  ``blobs``: their tags
    (:func:`onnx_dl.core.spec.blob_tag`).  ``pristine``: use a process in which no session was made yet.
    """

    worker_id: int
    identity: bytes
    control: str
    blobs: list[str] = []
    pristine: bool = False
    thread_attributes: ThreadAttributes | None = None
    """Scheduling attributes of the worker; None: those of the supervisor."""
    environment: Environment = NOTHING
    """Variables with which the worker starts, as a new interpreter; empty: the template's."""
    sandbox: Confinement | None = None
    """Rights that the worker keeps before it loads a model; None: all."""
    standby: bool = False
    """True: prepare everything but the model, and wait for an Assign on the lifeline."""
    version: int = PROTOCOL_VERSION
    """Protocol version of the supervisor.  The package may have been replaced on disk since it started."""


class Spawned(Message):
    """The worker's process id."""

    worker_id: int
    pid: int


class SpawnFailed(Message):
    """No process was started.  ``worker_id`` is 0 if the Spawn could not be read."""

    worker_id: int
    reason: str


class Assign(Message):
    """Take a worker's place, on a standby worker's lifeline.

    The blobs of the model come along.  ``blobs`` and ``thread_attributes`` are as in :class:`Spawn`.
    """

    worker_id: int
    blobs: list[str] = []
    thread_attributes: ThreadAttributes | None = None


class TemplateReady(Message):
    """Imports are done.  ``forkable`` is false if the process has threads and must not fork."""

    forkable: bool


on_standby: Reader[Assign] = Reader(Assign)

OnTemplate = Spawn | Spawned | SpawnFailed | TemplateReady
on_template: Reader[Any] = Reader(OnTemplate)
