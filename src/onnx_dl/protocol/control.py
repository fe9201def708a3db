"""Every message that crosses a process boundary, as a typed struct.

``docs/protocol.md`` describes who sends which when; a test says when the two differ.  Messages are msgpack,
checked against these types when they are read: nothing received on a socket is ever unpickled, and what does
not fit raises :class:`~onnx_dl.errors.ProtocolError`.  Sockets are not known here.
"""

from __future__ import annotations

from onnx_dl.core.environment import NOTHING, Environment
from onnx_dl.core.events import ModelEvent
from onnx_dl.core.spec import ModelSpec, Warmup
from onnx_dl.core.status import ModelDescription, ModelStatus
from onnx_dl.core.thread_attributes import Standing
from onnx_dl.protocol.codec import Count, Message, Reader, Seconds, Ttl
from onnx_dl.protocol.failures import Failure


class ClientHello(Message):
    """First on a lifeline.  ``client`` is also the routing id of the client's control socket."""

    version: int
    secret: str
    client: bytes


class Welcome(Message):
    """The supervisor knows the client; its control messages are heard from now on.

    ``build``: of a shared host, the onnxruntime that its workers run.
    """

    build: str = ""


class Refused(Message):
    """The peer will not talk to us, and why."""

    reason: str


class Blob(Message):
    """Memory that a model is loaded from (``ModelSpec.blobs``); its memfd comes with the message.  Sent
    before the Acquire that names it.

    ``number`` is for DropBlob: the same memory may be handed over anew before it was dropped.
    """

    number: int
    name: str


class Acquire(Message):
    """Hold the model for this proxy, loading it if need be.  Answered by Granted or Denied."""

    ticket: int
    proxy: int
    spec: ModelSpec
    ttl: Ttl
    file_bytes: Count = 0
    """Of the model's files; the first guess at what it needs."""
    pin: bool = False
    priority: int = 0
    for_host: bool = False
    """It is the host that is to hold the model from then on, also when the client is gone."""
    companions: list[ModelSpec] = []
    """Other models of its group that this client has proxies of: they are loaded together."""
    standing: Standing | None = None
    """Of the thread that asks: a private host's worker has it, if this has it loaded."""


class Outdated(Message):
    """The file at ``path`` is not what this worker has read: the proxy leaves the worker for another.  No
    answer."""

    proxy: int
    worker_id: int
    path: str


class Granted(Message):
    """The model is ready in this worker; lanes are opened at ``address`` with ``secret``."""

    ticket: int
    worker_id: int
    pid: int
    address: str
    secret: str
    description: ModelDescription
    model: str = ""
    """By which lanes name it, where the worker has several."""


class Denied(Message):
    """What was asked for failed, and how."""

    ticket: int
    failure: Failure


class DropBlob(Message):
    """The client will not load a model from this memory any more."""

    number: int


class Release(Message):
    """The proxy is gone and holds nothing any more."""

    proxy: int


class Withdraw(Message):
    """Nobody waits for the answer to this Acquire any more.  It need not be answered.

    ``keep``: the load goes on, and the proxy holds the model all the same; that counts as a use.
    """

    ticket: int
    proxy: int
    keep: bool


class AskModel(Message):
    """Which model has this name in the host's file?  Answered by Named or Denied."""

    ticket: int
    name: str


class Named(Message):
    """The model of that name, and the terms on which a proxy holds it."""

    ticket: int
    spec: ModelSpec
    ttl: Ttl
    pin: bool
    priority: int


class SetTtl(Message):
    """The proxy's TTL from now on."""

    proxy: int
    ttl: Ttl


class Unload(Message):
    """End the model's worker: when its calls have ended, or at once (``force``).  Answered by Unloaded."""

    ticket: int
    key: str
    force: bool


class Unloaded(Message):
    """The worker is reaped; ``was_loaded`` is false if there was none."""

    ticket: int
    was_loaded: bool


class AskStatus(Message):
    """Answered by Status.  Loads nothing and touches no timer.  ``measure``: read all workers' memory now."""

    ticket: int
    measure: bool = True


class Status(Message):
    """All models that the supervisor knows; ``seq`` is the last event that this includes."""

    ticket: int
    seq: int
    supervisor_pid: int
    models: list[ModelStatus]
    host: str | None = None
    """The name of a shared host."""
    memory_limit: int | None = None
    memory_in_use: int = 0
    metrics: str | None = None
    """Where metrics are served: host and port."""
    gpu_memory_limit: int | None = None
    gpu_memory_in_use: int = 0


class AskFate(Message):
    """How did this worker end?  Answered by Fate once it is reaped."""

    ticket: int
    worker_id: int


class Fate(Message):
    """``failure`` is None if the worker had drained: then it began no call that it did not answer."""

    ticket: int
    failure: Failure | None


class Shutdown(Message):
    """End all workers and, if the supervisor is private, itself.  Answered by Bye."""

    ticket: int


class Bye(Message):
    """All workers are reaped."""

    ticket: int


class Published(Message):
    """An event, sent to every client."""

    event: ModelEvent


class Wrote(Message):
    """What a process has written on stderr, for the application of a private supervisor to write it to the
    stderr that it has now.

    ``worker_id`` and ``model``: 0 and empty for the supervisor itself; ``last``: the process has ended.
    """

    pid: int
    text: bytes
    worker_id: int = 0
    model: str = ""
    last: bool = False


class WorkerStarted(Message):
    """First on a worker's control socket; answered by Load."""

    worker_id: int


class Load(Message):
    """Load this model.  ``warmups``: by key of the model, or of members of a group, and by input: what to run
    it with once before it is ready.  ``mapped``: only from the load cache, because there is no memory for
    more; where it is not there, the worker says so (``WorkerFailed.unsaved``)."""

    spec: ModelSpec
    ttl: Ttl
    warmups: dict[str, dict[str, Warmup]] = {}
    mapped: bool = False


class WorkerReady(Message):
    """The model is loaded and lanes may be opened at ``address`` with ``secret``.  ``seconds``: the load.

    ``entry``: under which key the load cache has the model, or would have it; empty: it never does.
    ``mapped``: it came from there.
    """

    worker_id: int
    address: str
    secret: str
    description: ModelDescription
    seconds: Seconds
    entry: str = ""
    mapped: bool = False


class Saveable(Message):
    """The model is worth saving for the load cache.

    ``nbytes``: of its files, or as it was given; ``blob``: the memory that it was given as; ``order``: what
    the process is to be told that saves it, which has the ``environment``, too.
    """

    worker_id: int
    key: str
    nbytes: Count
    blob: str | None
    order: str
    environment: Environment = NOTHING


class WorkerFailed(Message):
    """The model did not load; the worker waits for Exit.  ``unsaved``: it was to come from the load cache,
    where it is not, or cannot be used."""

    worker_id: int
    failure: Failure
    unsaved: bool = False


class Retime(Message):
    """The TTL in force from now on, in seconds.  ``used``: it counts from now, if there was no use so far."""

    ttl: Ttl
    used: bool = False


class Drain(Message):
    """Take no new work, finish what runs, then say WorkerDrained."""


class DrainIfIdle(Message):
    """Like Drain, if nothing runs and nobody holds the model now; else nothing happens."""


class WorkerDraining(Message):
    """It takes no new work: its TTL ran out, it was idle when it was to leave, or it has grown too large."""

    worker_id: int
    reason: str = "ttl"


class WorkerDrained(Message):
    """Nothing runs any more; the worker waits for Exit."""

    worker_id: int


class Exit(Message):
    """Leave."""


FromClient = (
    Acquire
    | Withdraw
    | AskModel
    | DropBlob
    | Outdated
    | Release
    | SetTtl
    | Unload
    | AskStatus
    | AskFate
    | Shutdown
)
ToClient = Granted | Denied | Named | Unloaded | Status | Fate | Bye | Published | Wrote
FromWorker = WorkerStarted | WorkerReady | Saveable | WorkerFailed | WorkerDraining | WorkerDrained
ToWorker = Load | Retime | Drain | DrainIfIdle | Exit
OnLifeline = ClientHello | Blob | Welcome | Refused


from_client = Reader(FromClient)
to_client = Reader(ToClient)
from_worker = Reader(FromWorker)
to_worker = Reader(ToWorker)
on_lifeline = Reader(OnLifeline)
