"""Every message that crosses a process boundary, as a typed struct.

``docs/protocol.md`` describes who sends which message when; a test compares it with this module.  Messages
are msgpack and are checked against these types when they are read.  Nothing received on a socket is ever
unpickled; data of another form raises :class:`~onnx_dl.errors.ProtocolError`.  Knows no sockets.
"""

from __future__ import annotations

from typing import Any

from onnx_dl.core.environment import NOTHING, Environment, ThreadAttributes
from onnx_dl.core.events import ModelEvent
from onnx_dl.core.spec import ModelSpec, Warmup
from onnx_dl.core.status import ModelDescription, ModelStatus
from onnx_dl.core.terms import Terms, Ttl
from onnx_dl.protocol.codec import Count, Message, Reader, Seconds
from onnx_dl.protocol.failures import Failure

# Lifeline: client <-> supervisor over a Unix socket.  EOF means that the other process is gone.


class ClientHello(Message):
    """First message on a lifeline.  ``client`` is also the routing id of the client's control socket."""

    version: int
    secret: str
    client: bytes


class Welcome(Message):
    """The supervisor accepts the client and reads its control messages from now on.  ``build``: which
    onnxruntime the workers of a shared host run."""

    build: str = ""


class Refused(Message):
    """The supervisor rejects the client; ``reason`` is text for the user."""

    reason: str


class Blob(Message):
    """Memory that a model is loaded from (``ModelSpec.blobs``); its memfd comes with the message.

    Sent before the Acquire that names it.  ``number`` is for DropBlob: the same memory may be sent again
    before the first copy was dropped.
    """

    number: int
    name: str


# Client <-> supervisor over ZeroMQ.


class Acquire(Message):
    """Hold the model for this proxy; load it if necessary.  Answered by Granted or Denied."""

    ticket: int
    proxy: int
    spec: ModelSpec
    terms: Terms
    file_bytes: Count = 0
    """Bytes of the model's files: the first estimate of its requirement."""
    for_host: bool = False
    """The host holds the model from now on, also after the client is gone."""
    companions: list[ModelSpec] = []
    """Other models of its group for which this client has proxies: they are loaded together."""
    thread_attributes: ThreadAttributes | None = None
    """Scheduling attributes of the asking thread.  A worker that a private host starts for this request
    gets them."""


class Outdated(Message):
    """The file at ``path`` changed since this worker read it: the proxy leaves the worker for another one.
    No answer."""

    proxy: int
    worker_id: int
    path: str


class Granted(Message):
    """The model is ready in this worker.  Lanes are opened at ``address`` with ``secret``."""

    ticket: int
    worker_id: int
    pid: int
    address: str
    secret: str
    description: ModelDescription
    model: str = ""
    """Key of the model for LaneHello, if the worker has several models."""


class Denied(Message):
    """The request failed."""

    ticket: int
    failure: Failure


class DropBlob(Message):
    """The client loads no more models from this memory."""

    number: int


class Release(Message):
    """The proxy is gone and releases its model."""

    proxy: int


class Withdraw(Message):
    """The proxy no longer waits for the answer to this Acquire.  It need not be answered.  ``keep``: the load
    continues, and the proxy still holds the model; that counts as a use."""

    ticket: int
    proxy: int
    keep: bool


class AskModel(Message):
    """Ask for the model with this name in the host's file.  Answered by Named or Denied."""

    ticket: int
    name: str


class Named(Message):
    """The model of that name, and the default terms of its proxies."""

    ticket: int
    spec: ModelSpec
    terms: Terms


class SetTtl(Message):
    """Set the proxy's TTL from now on."""

    proxy: int
    ttl: Ttl


class Unload(Message):
    """End the model's worker after its running calls, or at once (``force``).  Answered by Unloaded."""

    ticket: int
    key: str
    force: bool


class Unloaded(Message):
    """The worker is reaped.  ``was_loaded`` is false if there was none."""

    ticket: int
    was_loaded: bool


class AskStatus(Message):
    """Ask for the status of all models.  Answered by Status.  Loads nothing and resets no timer.
    ``measure``: read the memory of all workers now."""

    ticket: int
    measure: bool = True


class Status(Message):
    """All models that the supervisor knows.  ``seq`` is the last event that this includes."""

    ticket: int
    seq: int
    supervisor_pid: int
    models: list[ModelStatus]
    host: str | None = None
    """Name of a shared host; None for a private one."""
    memory_limit: int | None = None
    memory_in_use: int = 0
    metrics: str | None = None
    """Address of the metrics endpoint: host and port."""
    gpu_memory_limit: int | None = None
    gpu_memory_in_use: int = 0
    gpu_memory_limits: dict[int, int] = {}
    """Limit of each device that has one of its own, by its number."""
    gpu_memory_in_use_on: dict[int, int] = {}


class AskEvents(Message):
    """Ask for the last events, ``limit`` at most.  Answered by RecentEvents."""

    ticket: int
    limit: int


class RecentEvents(Message):
    """The last events that the supervisor has kept, oldest first.  Later ones come as Published."""

    ticket: int
    events: list[ModelEvent]


class AskOutcome(Message):
    """Ask how this worker ended.  Answered by Outcome once it is reaped."""

    ticket: int
    worker_id: int


class Outcome(Message):
    """The end of a worker.  ``failure`` is None if it had drained: all calls that it began have replies."""

    ticket: int
    failure: Failure | None


class Shutdown(Message):
    """End all workers and, if the supervisor is private, itself.  Answered by Bye."""

    ticket: int


class Bye(Message):
    """All workers are reaped."""

    ticket: int


class Published(Message):
    """An event; sent to every client."""

    event: ModelEvent


class Wrote(Message):
    """Text that a process wrote on stderr.  The application of a private supervisor writes it to its own
    current stderr.

    ``worker_id`` and ``model``: 0 and empty for the supervisor itself.  ``last``: the process has ended.
    """

    pid: int
    text: bytes
    worker_id: int = 0
    model: str = ""
    last: bool = False


# Supervisor <-> worker over ZeroMQ.


class WorkerStarted(Message):
    """First message on a worker's control socket.  Answered by Load."""

    worker_id: int


class Load(Message):
    """Load this model.

    ``warmups``: by key of the model or of each group member, then by input: data for one run before the
    model is ready.  ``mapped``: load from the load cache only, because there is no memory for a plain load.
    If it is not in the cache, the worker answers ``WorkerFailed(unsaved=True)``.  ``early``: the process was
    started before there was memory for the model; it first answers ``WorkerLoading``.
    """

    spec: ModelSpec
    ttl: Ttl
    warmups: dict[str, dict[str, Warmup]] = {}
    mapped: bool = False
    early: bool = False


class Prepare(Message):
    """Load CUDA's libraries, and make its context on this device, while the load waits for memory.  Load
    follows."""

    device_id: Count


class WorkerPrepared(Message):
    """Answers Prepare: the process waits for its load."""

    worker_id: int


class WorkerLoading(Message):
    """The load begins, in a process that was started early: all that it did for that is done."""

    worker_id: int


class WorkerReady(Message):
    """The model is loaded.  Lanes may be opened at ``address`` with ``secret``.

    ``seconds``: duration of the load.  ``entry``: key of the model in the load cache, whether it is there yet
    or not; empty: it cannot be cached.  ``mapped``: it was loaded from the cache.
    """

    worker_id: int
    address: str
    secret: str
    description: ModelDescription
    seconds: Seconds
    entry: str = ""
    mapped: bool = False


class Saveable(Message):
    """The model is worth saving in the load cache.

    ``nbytes``: bytes of it that a saver has in memory.  ``blob``: name of the memory that it was loaded from.
    ``order``: instructions (JSON) for the process that saves it.  ``environment``: variables of that process.
    """

    worker_id: int
    key: str
    nbytes: Count
    blob: str | None
    order: str
    environment: Environment = NOTHING


class WorkerFailed(Message):
    """The model did not load.  The worker waits for Exit.  ``unsaved``: it was to be loaded from the load
    cache only, but is not there or cannot be used."""

    worker_id: int
    failure: Failure
    unsaved: bool = False


class Retime(Message):
    """Set the TTL in force from now on.  ``used``: if there was no use so far, now counts as the first."""

    ttl: Ttl
    used: bool = False


class Drain(Message):
    """Accept no new calls, finish the running ones, then send WorkerDrained."""


class DrainIfIdle(Message):
    """Drain, if nothing runs and nobody holds the model now; else ignored."""


class WorkerDraining(Message):
    """The worker accepts no new calls.  Its TTL ran out, it was idle when it got DrainIfIdle, or it has grown
    too large."""

    worker_id: int
    reason: str = "ttl"


class WorkerDrained(Message):
    """No call runs any more.  The worker waits for Exit."""

    worker_id: int


class Exit(Message):
    """End the worker process."""


Question = Acquire | AskModel | AskStatus | AskEvents | AskOutcome | Unload | Shutdown
"""A request of a client that is answered."""
FromClient = Question | Withdraw | DropBlob | Outdated | Release | SetTtl
ToClient = Granted | Denied | Named | Unloaded | Status | RecentEvents | Outcome | Bye | Published | Wrote
FromWorker = (
    WorkerStarted
    | WorkerPrepared
    | WorkerLoading
    | WorkerReady
    | Saveable
    | WorkerFailed
    | WorkerDraining
    | WorkerDrained
)
ToWorker = Prepare | Load | Retime | Drain | DrainIfIdle | Exit
OnLifeline = ClientHello | Blob | Welcome | Refused

from_client: Reader[FromClient] = Reader(FromClient)
to_client: Reader[ToClient] = Reader(ToClient)
from_worker: Reader[FromWorker] = Reader(FromWorker)
to_worker: Reader[ToWorker] = Reader(ToWorker)
on_lifeline: Reader[Any] = Reader(OnLifeline)
