"""A proxy's claim to its model: how the model is loaded, on which terms, and the worker in use."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from onnx_dl.client.acquisition import Lease
from onnx_dl.client.host_client import HostClient
from onnx_dl.client.model_table import BlobSources
from onnx_dl.client.remote_model import RemoteModel
from onnx_dl.client.served_model import ServedModel
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.core import model_files
from onnx_dl.core.model_files import Identity, ReadFile
from onnx_dl.core.spec import model_key
from onnx_dl.core.status import ModelDescription
from onnx_dl.core.terms import Terms
from onnx_dl.errors import FilesChanging, ProxyClosedError
from onnx_dl.session.model_source import ModelSource
from onnx_dl.system import installation

_MOST_VERSIONS: Final = 3
"""Workers that are asked for, one after the other, because the files changed after each was loaded."""


class ModelHandle:
    """Owned by one proxy; the model is released when it is closed or collected."""

    def __init__(self, source: ModelSource, terms: Terms, host: HostClient) -> None:
        spec = source.spec
        if host.name is not None and spec.path is not None:
            # To other applications a relative path means another file.
            spec = msgspec.structs.replace(spec, name=os.path.abspath(os.path.join(spec.cwd, spec.path)))
        self.spec = spec
        self.host = host
        self.lease = Lease(terms)
        self.live = source.live
        self.is_gone = False
        """True if onnxruntime would have no native session: its providers could not be set."""
        self.seen: Identity | None = None
        """The file of the model that is meant, also where it has been replaced since; None: what is there."""
        self.takes_any = False
        """True: whatever file the worker of this key has read is the right one, so that all processes that
        name the key have one worker."""
        self.served: ServedModel | None = None
        self._blobs = source.blobs
        self.used: ServedModel | None = None
        """The model, once its worker was found to have read the files that are there."""
        host.join(self)
        # The host by a weak reference: a callback registered there may hold this proxy, which would then hold
        # itself for ever.
        self.release = weakref.finalize(self, _release, self.lease, weakref.ref(host))
        """Gives up the model.  May be called twice."""
        # The interpreter's exit closes the host, which releases everything at once.
        self.release.atexit = False

    def close(self) -> None:
        """Gives up the model and the memory that it was given as."""
        self.release()
        # The model in the client has the memory, too: it hands it to the next host.
        self._blobs, self.served, self.used = {}, None, None

    def give_up_session(self) -> None:
        """Has every later use raise what onnxruntime raises without a native session."""
        self.is_gone, self.used, self.served = True, None, None

    def copied(self) -> ModelHandle:
        """Another claim to the same model, on the same terms."""
        return ModelHandle(ModelSource(self.spec, self.blobs(), self.live), self.lease.terms, self.host)

    def blobs(self) -> BlobSources:
        """The memory that the model is loaded from.  Raises ProxyClosedError if this handle gave it back."""
        blobs = self._blobs
        if not blobs.keys() >= set(self.spec.blobs):
            raise self._is_closed()
        return blobs

    def _is_closed(self) -> ProxyClosedError:
        return ProxyClosedError(f"This proxy of {self.spec.name} is closed; make a new one.")

    def companion(self) -> RemoteModel | None:
        """The model, for others of its group to load it with them; None if this is closed."""
        model = None if self.lease.closed or self.is_gone else self.known()
        return model if isinstance(model, RemoteModel) else None

    def set_ttl(self, ttl: object) -> None:
        """Changes the TTL, also at the supervisor.  Raises ConfigError if it is none of the three modes."""
        self.lease.terms = self.lease.terms.changed({"ttl": ttl})
        if (model := self.host.known_model(self.spec.key)) is not None:
            model.set_ttl(self.lease)

    def model(self, deadline: Deadline | None = None) -> ServedModel:
        """The model, with a worker that this proxy may use: started and loaded if need be, and read from the
        files that are there now, unless this proxy has used it before.

        Raises:
            DeadlinePassed: that took longer.
            FilesChanging: the files had changed after each load, or since they were seen first.
            Exception: the load failed.
        """
        return self.in_use() or self._bind(deadline)

    def in_use(self) -> ServedModel | None:
        """The model, if this proxy uses its present worker already."""
        model, lease = self.used, self.lease
        if model is None or lease.closed or not model.serves(lease):
            return None
        return model

    def _bind(self, deadline: Deadline | None) -> ServedModel:
        self.used = None  # else other threads would use the new worker before its files are looked at
        for _ in range(_MOST_VERSIONS):
            model = self.known(deadline)
            granted = model.grant(self.lease, deadline)
            if (path := self._changed(granted.description.files)) is None:
                self.used = model
                return model
            if self.seen not in (None, model_files.identity(path)):
                raise FilesChanging(f"{path} has changed since it was seen first; load the model again.")
            model.leave_outdated(self.lease, granted, path)
            # Proxies that use the worker keep it.  All that find the same files get the same new key; threads
            # of this proxy may come here at the same time, from the same key.
            now = model_files.identities(self.spec.where, [file.name for file in granted.description.files])
            self.spec = msgspec.structs.replace(self.spec, key=model_key(model.spec.key, now))
        raise FilesChanging(
            f"{path} is not the file that the worker of {self.spec.name} has just read. Either the file "
            "changes all the time, or the host sees other files at the same paths, as in a container."
        )

    def _changed(self, read: Sequence[ReadFile]) -> str | None:
        """The path of a file whose content is not the one that is meant; None: all are."""
        if self.takes_any:
            return None
        if self.seen is None:
            return model_files.changed(self.spec.where, read)
        is_other = any(file.identity != self.seen for file in read if not file.name)
        return self.spec.where("") if is_other else None

    def describe(self) -> ModelDescription:
        """The model's description, which is known or comes with a load; counts as a use.  The one by a worker
        that is gone holds as long as its files do."""
        model = self.known()
        known = model.description
        if known is None or (
            model is not self.used and model_files.changed(self.spec.where, known.files) is not None
        ):
            model = self.model()
        return model.describe(self.lease)

    def known(self, deadline: Deadline | None = None) -> ServedModel:
        """The model as the client knows it, with the supervisor started if need be.  May raise
        DeadlinePassed."""
        if self.is_gone:
            raise AttributeError("'NoneType' object has no attribute 'run'")
        blobs, spec, model = self._blobs, self.spec, self.served
        if self.lease.closed:  # looked at last: close() takes the memory away after that
            raise self._is_closed()
        if model is None or not model.usable or model.spec.key != spec.key:
            if spec.engine == "ort":
                installation.check(spec.provider_names)
            model = self.served = self.host.model(spec, blobs, deadline)
        return model

    def invoke(self, method: str, *args: object) -> Any:
        """Calls another method of the worker's session, by name."""
        if self.is_gone:
            raise AttributeError(f"'NoneType' object has no attribute {method!r}")
        return self.model().invoke(self.lease, method, *args)


def _release(lease: Lease, host_ref: weakref.ref[HostClient]) -> None:
    """Runs when a handle is closed or collected."""
    lease.closed = True
    if (host := host_ref()) is not None:
        host.leave(lease)
