"""Every message that crosses a process boundary, as a typed struct.

``docs/protocol.md`` describes who sends which when; a test says when the two differ.  Messages are msgpack,
checked against these types when they are read: nothing received on a socket is ever unpickled, and what does
not fit raises :class:`~onnx_dl.errors.ProtocolError`.  Sockets are not known here.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from onnx_dl.core.thread_attributes import Standing
from onnx_dl.environment import NOTHING, Environment
from onnx_dl.errors import ProtocolError
from onnx_dl.events import ModelEvent
from onnx_dl.model import ModelDescription, ModelSpec, ModelStatus, Warmup, to_plain

PROTOCOL_VERSION = 5

Count = Annotated[int, Meta(ge=0)]
"""Bytes.  What is less than none would make room that there is not."""
Seconds = Annotated[float, Meta(ge=0, le=sys.float_info.max)]
Ttl = Annotated[float, Meta(ge=-1, le=sys.float_info.max)]
"""Seconds, or -1; neither infinite nor no number, with which no time can be compared."""


class Message(msgspec.Struct, kw_only=True, tag=True):
    """Base of all messages; on the wire each is a map whose ``type`` is the class name."""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """An exception on its way; see :mod:`onnx_dl.transport.failures`."""

    family: str
    name: str
    args: list[Any]
    details: dict[str, Any] = {}
    traceback: str = ""


# --- values in calls -----------------------------------------------------------------------------------


class Tensor(msgspec.Struct, frozen=True, tag="t", array_like=True):
    """An array in shared memory: numpy dtype string, shape, block and byte offset into it.

    ``leased``: the receiver keeps the block until it clears the block's lease word; otherwise the bytes are
    valid until the next message on the same lane.
    """

    dtype: str
    shape: tuple[int, ...]
    block: int
    offset: int
    leased: bool = False


class Text(msgspec.Struct, frozen=True, tag="s", array_like=True):
    """An object array of text: its shape, and where its items lie as a :class:`Packed` list, in C order.

    Block 0: it has none.
    """

    shape: tuple[int, ...]
    block: int
    offset: int


class Packed(msgspec.Struct, frozen=True, tag="m", array_like=True):
    """A list or dict of plain values in shared memory, as msgpack.

    At ``offset`` lie two 64-bit numbers: where in the block its bytes begin, and how many there are.  So the
    same message names values of any length.  Valid until the next message on the same lane.
    """

    block: int
    offset: int


class Items(msgspec.Struct, frozen=True, tag="i", array_like=True):
    """A container that holds arrays, or whose type msgpack would lose: list, tuple, dict, numpy scalar."""

    kind: str
    items: list[Value]


class Plain(msgspec.Struct, frozen=True, tag="p", array_like=True):
    """None, bool, int, float, str, bytes, and lists and dicts of these."""

    value: Any


Value = Tensor | Text | Packed | Items | Plain


# --- lifeline: client -> supervisor over a Unix socket; its EOF means death in either direction ----------


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


# --- control: client <-> supervisor over ZeroMQ ----------------------------------------------------------


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


# --- control: supervisor <-> worker over ZeroMQ ----------------------------------------------------------


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


# --- template: supervisor <-> template over a Unix socket ------------------------------------------------


class Spawn(Message):
    """Become, or fork, a worker.  Comes with descriptors: lifeline, stderr, page of gauges, and the model's
    blobs, which are those of these tags (:func:`onnx_dl.model.blob_tag`).  ``pristine``: in a process in
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


# --- lane: client <-> worker; blocks and EOF over a Unix socket, calls over the same or over ZeroMQ ------


class LaneHello(Message):
    """First on a lane.  ``reply_to`` is the ZeroMQ address at which the client listens for calls' replies;
    None: calls go over this socket.  ``poll``: both ends look for messages for a moment before they sleep."""

    version: int
    secret: str
    reply_to: str | None = None
    poll: bool = False
    model: str = ""


class LaneOpen(Message):
    """The worker's first message where the calls go, to prove that it is the worker.

    ``thread``: the native id of the thread that serves the lane.
    """

    secret: str
    thread: int


class Envelope(Message, omit_defaults=True):
    """A message with what its receiver must know of blocks first, or one that is too long for a packet.

    ``shared``: number and size of new blocks, whose memfds come first among the descriptors; ``dropped``:
    blocks that will not be used again.  ``letter``: block and length; the first bytes of that block are an
    Envelope with the message, which has neither ``shared`` nor ``letter``.
    """

    shared: list[tuple[int, int]] = []
    dropped: list[int] = []
    message: msgspec.Raw = msgspec.Raw()
    letter: tuple[int, int] | None = None


class Call(Message):
    """Run the model: names of outputs, feed, RunOptions.

    ``plan``: remember it under this number when its result is sent, and if that is 0, forget all others;
    ``moved``: indices in the feed of what will lie elsewhere then;
    ``keep``: lease nothing, the client does nothing else on this lane until it needs the results no more.
    """

    outputs: Value
    feed: list[tuple[Any, Value]]
    options: dict[str, Any] | None = None
    plan: int | None = None
    moved: list[int] = []
    keep: bool = False
    background: bool = False
    """Answered by Started as soon as it runs, and then by its result."""


class Again(Message):
    """The Call that is remembered as ``plan``, with other bytes in the same places.

    ``moved``: what lies elsewhere each time, as (index in the feed, where now).
    """

    plan: int
    moved: list[tuple[int, Tensor]] = []


class Invoke(Message):
    """Call another method of the session."""

    method: str
    args: list[Value] = []


class Terminate(Message):
    """End the call that this thread of the worker is at, if it is still that request of its lane."""

    thread: int
    request: int


class Touch(Message):
    """Count as a use that does nothing."""


class Hold(Message):
    """Keep the model loaded until Unhold, or until the lane closes."""


class Unhold(Message):
    """The block that Hold began has ended."""


class Trim(Message):
    """Give back the memory that nobody needs now.  No use of the model."""


class Result(Message):
    """What a Call, Again, Invoke, Touch, Hold, Unhold, Trim or Terminate returned."""

    value: Value


class Same(Message):
    """The last Result of this plan, with other bytes in the same places."""


class CallFailed(Message):
    """What a Call, Again or Invoke raised, or why there is no lane."""

    failure: Failure


class Started(Message):
    """A Call in the background runs; its result is still to come."""


class Forgotten(Message):
    """Not executed: the worker does not remember this call.  Say it in full."""


class Draining(Message):
    """Not executed: the worker takes no new work.  Acquire again."""


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
OnTemplate = Spawn | Spawned | SpawnFailed | TemplateReady
LaneRequest = Call | Again | Invoke | Terminate | Touch | Hold | Unhold | Trim | LaneHello | Envelope
LaneReply = LaneOpen | Result | Same | Started | CallFailed | Forgotten | Draining | Envelope

_encoder = msgspec.msgpack.Encoder(enc_hook=to_plain)


def encode(message: Message) -> bytes:
    """The message as msgpack.

    Raises:
        OverflowError, TypeError: a value in it has no form in msgpack.
    """
    return _encoder.encode(message)


class Reader:
    """Decodes the messages of one direction of one socket, and nothing else."""

    def __init__(self, union: Any) -> None:
        self._decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(union)

    def __call__(self, data: bytes | memoryview | msgspec.Raw) -> Any:
        try:
            return self._decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(
                f"Received a message that protocol version {PROTOCOL_VERSION} does not have ({error}). "
                "Both processes must run the same version of onnx-dl."
            ) from None


from_client = Reader(FromClient)
to_client = Reader(ToClient)
from_worker = Reader(FromWorker)
to_worker = Reader(ToWorker)
on_lifeline = Reader(OnLifeline)
on_template = Reader(OnTemplate)
lane_request = Reader(LaneRequest)
lane_reply = Reader(LaneReply)
