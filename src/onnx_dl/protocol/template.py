"""Messages between the supervisor and the template."""

from __future__ import annotations

from onnx_dl.core.environment import NOTHING, Environment
from onnx_dl.core.thread_attributes import Standing
from onnx_dl.protocol.codec import PROTOCOL_VERSION, Message, Reader


class Spawn(Message):
    """Become, or fork, a worker.  Comes with descriptors: lifeline, stderr, page of gauges, and the model's
    blobs, which are those of these tags (:func:`onnx_dl.core.spec.blob_tag`).  ``pristine``: in a process in
    which the engine has made no session yet."""

    worker_id: int
    identity: bytes
    control: str
    blobs: list[str] = []
    pristine: bool = False
    standing: Standing | None = None
    """What the worker has instead of what the supervisor has."""
    environment: Environment = NOTHING
    """If there is one, the worker is a fresh interpreter, which starts with it."""
    version: int = PROTOCOL_VERSION
    """Of the supervisor.  The package may have been replaced on disk since it was started."""


class Spawned(Message):
    """The worker's process id."""

    worker_id: int
    pid: int


class SpawnFailed(Message):
    """No process came of it.  ``worker_id`` is 0 where the Spawn could not be read."""

    worker_id: int
    reason: str


class TemplateReady(Message):
    """Imports are done.  ``forkable`` is false if the process has threads and so must not fork."""

    forkable: bool


OnTemplate = Spawn | Spawned | SpawnFailed | TemplateReady
on_template = Reader(OnTemplate)
