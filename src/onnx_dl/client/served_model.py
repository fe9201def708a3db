"""Interface of a model as sessions use it, wherever it runs.

:class:`~onnx_dl.client.remote_model.RemoteModel` runs it in a worker process, and
``onnx_dl.inprocess.local_model.LocalModel`` in this process.  A host chooses by ``ModelSpec.isolation``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from onnx_dl.client.acquisition import Lease
from onnx_dl.client.cancellation import CancelWatch
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelDescription, ModelStatus
from onnx_dl.protocol.control import Granted
from onnx_dl.tensors import foreign_results
from onnx_dl.tensors.call_codec import CallCodec, Request
from onnx_dl.tensors.call_plans import EngineValue, Feed
from onnx_dl.tensors.foreign import ForeignArray, ForeignPlace


class RunArguments(NamedTuple):
    """Arguments of one run: names of outputs (None: all), values by input, RunOptions as plain data."""

    outputs: EngineValue
    feed: Feed
    options: dict[str, EngineValue] | None

    @property
    def nbytes(self) -> int:
        """Bytes of all inputs that have a size."""
        return sum(getattr(value, "nbytes", 0) for value in self.feed.values())

    def encode(self, codec: CallCodec) -> Request:
        """The request for a lane."""
        return codec.encode_call(*self)


class PlacedArguments(NamedTuple):
    """Arguments of one run with inputs or results in foreign memory, for a worker that may have that."""

    outputs: list[str]
    feed: Feed
    places: Mapping[str, ForeignPlace]

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs that this process copies."""
        here = (value for value in self.feed.values() if type(value) is not ForeignArray)
        return sum(getattr(value, "nbytes", 0) for value in here)

    @property
    def foreign_bytes(self) -> int:
        """Bytes of the inputs and places in foreign memory."""
        inputs = (value.nbytes for value in self.feed.values() if type(value) is ForeignArray)
        return sum(inputs) + sum(place.nbytes for place in self.places.values())

    @property
    def memories(self) -> int:
        """Number of memories that the run names."""
        inputs = {value.memory.serial for value in self.feed.values() if type(value) is ForeignArray}
        return len(inputs | {place.memory.serial for place in self.places.values()})

    def copied(self) -> RunArguments:
        """The arguments with copies of what lies in foreign memory.  Raises like ``ForeignArray.copy``."""
        feed = {n: value.copy() if type(value) is ForeignArray else value for n, value in self.feed.items()}
        return RunArguments(self.outputs, feed, None)

    def written(self, results: Sequence[EngineValue]) -> list[EngineValue]:
        """Writes results to their places and returns them.  Raises like ``foreign_results.placed``."""
        return foreign_results.placed(self.outputs, results, self.places)

    def encode(self, codec: CallCodec) -> Request:
        """The request for a lane.  Raises like :meth:`CallCodec.encode_placed`."""
        return codec.encode_placed(*self)


Done = Callable[[EngineValue, str], object]
"""Gets the results of a run in the background, and the text of its error."""


class Outputs(Protocol):
    """Results of :meth:`ServedModel.keep`, to be fed to other models of the same host."""

    @property
    def values(self) -> list[EngineValue]: ...

    def release(self) -> None:
        """Gives the results' memory back."""


class ServedModel(Protocol):
    """One model, shared by all proxies of this application that name it.  Thread-safe.

    A ``lease`` is the claim of one proxy.  Each method but :meth:`status`, :meth:`unload`, :meth:`set_ttl`
    and :meth:`release` loads the model if need be, and raises the reason if that fails.
    """

    spec: ModelSpec
    description: ModelDescription | None
    """The description as last loaded; None: it never was."""

    @property
    def usable(self) -> bool:
        """True if the host that this belongs to is there."""

    def run(
        self,
        lease: Lease,
        outputs: EngineValue,
        feed: Feed,
        options: dict[str, EngineValue] | None,
        watch: CancelWatch | None = None,
    ) -> EngineValue:
        """One inference; arrays in the result are the caller's own."""

    def repeat(self, lease: Lease, outputs: EngineValue, feed: Feed) -> list[EngineValue] | None:
        """One inference like the last one, in fewer steps.  None: it was not executed; call :meth:`run`."""

    def keep(
        self, lease: Lease, outputs: EngineValue, feed: Feed, options: dict[str, EngineValue] | None
    ) -> Outputs:
        """Like :meth:`run`, for a next model of the same kind."""

    def invoke(
        self, lease: Lease, method: str, *args: EngineValue, watch: CancelWatch | None = None
    ) -> EngineValue:
        """Calls another method of the session by name; raises like :meth:`run`."""

    def describe(self, lease: Lease) -> ModelDescription:
        """The model's description.  Counts as a use."""

    def serves(self, lease: Lease) -> bool:
        """True if a proxy that has used the present load may go on to."""

    def grant(self, lease: Lease, deadline: Deadline | None = None) -> Granted:
        """Has the model loaded for this proxy; what was granted."""

    def leave_outdated(self, lease: Lease, granted: Granted, path: str) -> None:
        """Gives up a load that has read other contents of this file than are there now."""

    def load(self, lease: Lease, deadline: Deadline | None = None) -> None:
        """Has the model ready.  A load that nobody needed counts as a use, so that its TTL ends it."""

    def adopt(self, lease: Lease) -> None:
        """Has the host itself hold the model on these terms."""

    def hold(self, lease: Lease, deadline: Deadline | None = None) -> None:
        """Keeps the model loaded until :meth:`unhold`.  Holds nest."""

    def unhold(self) -> None:
        """Ends one hold; with the last one the TTL starts."""

    def set_ttl(self, lease: Lease) -> None:
        """Puts the lease's present TTL in force."""

    def release(self, lease: Lease) -> None:
        """Gives up what was granted until the next use."""

    def unload(self, *, force: bool, deadline: Deadline | None) -> bool:
        """Unloads the model and returns when its memory is back; whether it was loaded."""

    def status(self, *, measure: bool = True) -> ModelStatus | None:
        """The model's status; None if the host does not know the model."""


@runtime_checkable
class BeginsRuns(Protocol):
    """A model that begins runs in the background by itself, not over lanes."""

    def begin(self, lease: Lease, arguments: RunArguments, watch: CancelWatch, done: Done) -> None:
        """Begins an inference as ``run_async`` does, and returns.  Raises errors found before it runs."""


FindModel = Callable[[Deadline], ServedModel]
"""Finds a model whose host must be started first."""
