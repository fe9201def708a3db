"""The models of one host that this application uses, and the memory that they are loaded from."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from onnx_dl.client.acquisition import SharedBlob
from onnx_dl.client.connection import TIDY_EVERY, Connection
from onnx_dl.client.lane_pool import LanePool
from onnx_dl.client.remote_model import RemoteModel
from onnx_dl.concurrency.forking import Guard
from onnx_dl.core.events import ModelEvent
from onnx_dl.core.spec import ModelSpec
from onnx_dl.errors import OnnxDLError

BlobSources = Mapping[str, Callable[[], int]]
"""Functions that open a descriptor of a blob's memory, by the name of the blob."""

_K = TypeVar("_K")
_T = TypeVar("_T")


class GroupMember(Protocol):
    """A claim to a model that may be in a group."""

    spec: ModelSpec

    def companion(self) -> RemoteModel | None: ...


class HostModels:
    """Models by key, held by weak references."""

    def __init__(self) -> None:
        self._members: weakref.WeakValueDictionary[int, GroupMember] = weakref.WeakValueDictionary()
        self.forget()

    def forget(self) -> None:
        """Drops the parent's models in a forked child.  Claims to groups stay: the child has them, too."""
        self._lock = Guard()
        self._handing_over = Guard()
        self._models: weakref.WeakValueDictionary[str, RemoteModel] = weakref.WeakValueDictionary()

    def get(self, key: str) -> RemoteModel | None:
        return self._models.get(key)

    def count(self) -> int:
        """The number of models that this application uses or has used and still holds."""
        return len(self._models)

    def add(self, model: RemoteModel) -> RemoteModel:
        """The model of this key: this one, or the one that another thread added meanwhile."""
        with self._lock.alone():
            return self._models.setdefault(model.spec.key, model)

    def join(self, member: GroupMember) -> None:
        """Notes a claim whose model is in a group: the models of one group are loaded together."""
        if member.spec.group is not None:
            self._members[id(member)] = member

    def companions(self, spec: ModelSpec) -> list[RemoteModel]:
        """The models of the same group.  One that fails is left out; its own callers get the error."""
        found: dict[str, RemoteModel] = {}
        for member in alive(self._members) if spec.group is not None else ():
            with contextlib.suppress(OnnxDLError, OSError):
                if member.spec.group != spec.group or (model := member.companion()) is None:
                    continue
                if model.spec.unit == spec.unit:
                    found[model.spec.key] = model
        return list(found.values())

    def close_idle_lanes(self) -> bool:
        """Closes the idle lanes of all models, to free descriptors.  Returns whether there were any."""
        closed = [pool.close_idle() for pool in self._pools()]  # all of them, not until the first
        return any(closed)

    def share(self, connection: Connection, spec: ModelSpec, sources: BlobSources) -> list[SharedBlob]:
        """Hands the model's blobs to the supervisor."""
        return [self._blob(connection, name, sources[name]) for name in spec.blobs]

    def move(self, model: RemoteModel, connection: Connection, sources: BlobSources) -> None:
        """Has the model served at this connection from now on."""
        if model.connection is not connection:
            model.move(connection, self.share(connection, model.spec, sources))

    def _blob(self, connection: Connection, name: str, source: Callable[[], int]) -> SharedBlob:
        """One for all threads: each would copy a model of a gigabyte."""
        if self._handing_over.is_mine:
            # A signal handler interrupted this thread in the block below: one more copy.
            return SharedBlob(connection, name, source)
        with self._handing_over:
            blob: SharedBlob | None = connection.blobs.get(name)
            if blob is None:
                blob = connection.blobs[name] = SharedBlob(connection, name, source)
            return blob

    # --- in the connection's thread: must not wait --------------------------------------------------------

    def on_event(self, event: ModelEvent) -> None:
        for model in alive(self._models):
            model.worker.on_event(event)

    def shut(self, connection: Connection) -> None:
        """Closes the lanes of all models: their connection has ended."""
        for model in alive(self._models):
            if model.connection is connection:  # otherwise the model has moved to another host
                model.worker.leave()

    def tidy(self) -> bool:
        """Has idle lanes give their memory back.  Returns whether there will be more to do."""
        left = [pool.tidy(TIDY_EVERY) for pool in self._pools()]
        return any(left)

    def _pools(self) -> list[LanePool]:
        """Lanes to the present workers."""
        return [pool for model in alive(self._models) if (pool := model.worker.pool) is not None]


def alive(known: weakref.WeakValueDictionary[_K, _T]) -> list[_T]:
    """The values, taken in one step: iterating fails if another thread adds one meanwhile."""
    return [value for ref in known.valuerefs() if (value := ref()) is not None]
