"""Contract of the parts of the server: plain data and protocols only.

Both protocols (``http``, ``grpc``) need a :class:`Server` and nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.server.options import ServeOptions
from onnx_dl.server.v2.failures import RequestFailure
from onnx_dl.server.v2.messages import InferRequest, InferResponse
from onnx_dl.server.v2.operations import Operation
from onnx_dl.session.inference_session import InferenceSessionProxy


class TensorInfo(msgspec.Struct, frozen=True):
    """One input or output of a model.  ``shape`` has -1 for a free size, and includes the batch."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    is_optional: bool = False
    is_unranked: bool = False
    """The model does not say how many sizes it has; ``shape`` is empty, and any shape may be given."""


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """One version of one model that is served: all that a process needs to make its proxy.

    ``config`` is the whole configuration in Triton's JSON form, completed.  ``generation`` tells contents of
    the same path apart; ``identity`` is the file's (``core/model_files.py``).
    ``arguments`` are keywords of InferenceSessionProxy as plain data (ttl, pin,
    priority, max_memory, group, providers and so on).
    """

    name: str
    version: str
    path: str
    generation: str
    identity: tuple[int, int, int, int] | None = None
    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()
    platform: str = "onnxruntime_onnx"
    max_batch_size: int = 0
    config: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    is_eager: bool = False
    max_queue_size: int = 0
    """Requests that may wait or run; 0: the default."""
    slot: int = 0
    """Column of the version's count in the page that all processes share (``inference/limits.py``)."""


class IndexRow(msgspec.Struct, frozen=True):
    """One row of the repository's index.  ``state``: READY, LOADING, UNLOADING or UNAVAILABLE."""

    name: str
    version: str
    state: str
    reason: str = ""


class ServedTable(msgspec.Struct, frozen=True):
    """All that is served, and the index.  ``served`` is sorted by name, then version, the newest last."""

    served: list[Served] = []
    rows: list[IndexRow] = []
    is_ready: bool = False
    """Eager models are loaded (with strict readiness: all models are ready)."""


class ServedModel(Protocol):
    """One version of one model in this process.  Its proxy closes when a newer one has replaced it and the
    last use has ended."""

    entry: Served
    proxy: InferenceSessionProxy


class Models(Protocol):
    """Models that this process serves.  Thread-safe."""

    def find(self, name: str, version: str = "") -> Served:
        """Raises RequestFailure (404, "Request for unknown model: ...") if it is not served."""

    def use(self, name: str, version: str = "") -> contextlib.AbstractContextManager[ServedModel]:
        """Keeps the version's proxy open for the block.  Raises like :meth:`find`."""

    def versions(self, name: str) -> list[str]:
        """Versions that are served, the newest last; empty: none."""

    def check_ready(self, name: str, version: str = "") -> None:
        """Model readiness: raises RequestFailure if it cannot be inferred now, even if :meth:`find` has it:
        its load has failed.  One that would load on use is ready."""

    @property
    def table(self) -> ServedTable: ...


class RegionStatus(msgspec.Struct, frozen=True):
    """A registered region of shared memory."""

    name: str
    key: str
    offset: int
    byte_size: int


class DurationCount(msgspec.Struct):
    """Number and total nanoseconds of some step."""

    count: int = 0
    ns: int = 0


class VersionStatistics(msgspec.Struct, kw_only=True):
    """Counts of one version, as Triton's statistics extension has them.  Times are since the epoch."""

    name: str
    version: str
    last_inference_ms: int = 0
    inference_count: int = 0
    execution_count: int = 0
    success: DurationCount = msgspec.field(default_factory=DurationCount)
    fail: DurationCount = msgspec.field(default_factory=DurationCount)
    queue: DurationCount = msgspec.field(default_factory=DurationCount)
    compute_input: DurationCount = msgspec.field(default_factory=DurationCount)
    compute_infer: DurationCount = msgspec.field(default_factory=DurationCount)
    compute_output: DurationCount = msgspec.field(default_factory=DurationCount)
    failures: dict[str, int] = {}
    """Failures by reason."""
    pending: int = 0
    """Requests that wait or run now."""


class ModelState(msgspec.Struct, kw_only=True):
    """Ours: how one version fares in the host."""

    name: str
    version: str
    state: str
    ttl: float | None = None
    idle_seconds: float | None = None
    pid: int | None = None
    memory: int | None = None
    loads: int = 0
    last_unload: str = ""


class Control(Protocol):
    """Operations that concern all processes of a server; one of them carries them out.  Each raises
    RequestFailure.  Coroutines of the server's event loop."""

    async def load(self, name: str, parameters: dict[str, Any]) -> None: ...
    async def unload(self, name: str, parameters: dict[str, Any]) -> None: ...
    async def register_region(self, name: str, key: str, offset: int, byte_size: int) -> None: ...
    async def unregister_region(self, name: str | None) -> None: ...
    async def region_status(self, name: str | None) -> list[RegionStatus]: ...
    async def statistics(self, name: str = "", version: str = "") -> list[VersionStatistics]: ...
    async def model_state(self, name: str, version: str = "") -> ModelState: ...
    async def metrics(self, accept: str = "") -> tuple[bytes, str]:
        """The text of all families in the format that ``accept`` asks for, a header of that name, and its
        content type."""


class Inference(Protocol):
    """Makes inferences.  Thread-safe."""

    def allocate(self, nbytes: int) -> memoryview:
        """Writable memory for a request's body; of 64 KiB or more it lies in an arena block, and inputs in it
        are not copied.  It is free again when no view of it is left.

        Raises:
            RequestFailure: 429: too many bytes are in flight.
        """

    def owe(self, nbytes: int) -> None:
        """Count bytes of answers that wait for their clients.  They are in flight, too, and while that is too
        much, inferences are refused (429)."""

    def paid(self, nbytes: int) -> None:
        """Count them out: they are sent, or their client is gone."""

    def note_size(self, nbytes: int) -> None:
        """Take note of a message that comes or goes whose memory this process has allocated in pieces: after
        large ones, the heap gives its free pages back."""

    async def infer(self, request: InferRequest) -> InferResponse:
        """One inference.  Cancelling the coroutine ends the run.  Raises RequestFailure."""

    def infer_blocking(self, request: InferRequest, cancel: Deadline) -> InferResponse:
        """The same for a thread.  ``cancel``: a movable deadline; :meth:`Deadline.end` ends the run."""

    def refused(self, model: str, version: str, failure: RequestFailure) -> None:
        """Note that a request for a model was refused.  Counts it, unless :meth:`infer` has, or the model is
        not known."""


class Caller(NamedTuple):
    """Sender of a request."""

    authorization: str | None
    """The value of ``Authorization``."""
    is_loopback: bool
    """True if it came over loopback."""
    certificate: str | None = None
    """Subject of the certificate that the client showed; None: it showed none."""
    peer: str = ""
    """The client's IP address, without the port: for the log of refused requests."""


class Access(Protocol):
    """Rights of callers.  Thread-safe."""

    def check(self, operation: Operation, caller: Caller) -> None:
        """Raises RequestFailure (401, 403) if the caller may not."""

    def check_browser(self, host: str | None, origin: str | None) -> None:
        """Raises RequestFailure (403, 421) for a request that a page of another site made."""


class Server(Protocol):
    """One process of the server, as both protocols see it."""

    options: ServeOptions
    models: Models
    inference: Inference
    control: Control
    access: Access
    version: str

    @property
    def extensions(self) -> Sequence[str]:
        """Extensions whose every call works with these options."""

    @property
    def is_draining(self) -> bool: ...

    @property
    def is_ready(self) -> bool:
        """The host answers and the table is ready."""
