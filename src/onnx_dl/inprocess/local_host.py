"""The in-process models of one host."""

from __future__ import annotations

import weakref
from collections.abc import Set
from types import MappingProxyType

from onnx_dl.client.acquisition import Lease
from onnx_dl.client.event_dispatch import EventBus
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.core.settings import Settings
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelStatus
from onnx_dl.inprocess.driver import CLIENT, Driver, ModelFiles
from onnx_dl.inprocess.local_model import LocalModel, unload
from onnx_dl.inprocess.local_worker import BlobSources
from onnx_dl.system.owned_descriptors import keep_for_ever


class LocalHost:
    """Models by key, held by weak references, and the thread that loads them.  Thread-safe."""

    def __init__(self, settings: Settings, bus: EventBus) -> None:
        """``bus``: events of models go there."""
        self._settings = settings
        self._bus = bus
        self._models: weakref.WeakValueDictionary[str, LocalModel] = weakref.WeakValueDictionary()
        self._driver = self._make_driver()

    def _make_driver(self) -> Driver:
        models = self._models

        def files(key: str) -> ModelFiles:
            model = models.get(key)
            return ModelFiles(MappingProxyType({}), 0) if model is None else model.files

        return Driver(self._settings, self._bus, files)

    def forget(self) -> None:
        """Drops the parent's models in a forked child.  Their sessions are never freed there, also not when
        the interpreter ends: that would wait for threads which the child does not have, or call abort()."""
        keep_for_ever(self._driver)
        known = [model for ref in self._models.valuerefs() if (model := ref()) is not None]
        for model in known:
            model.forget()
        self._models = weakref.WeakValueDictionary({model.spec.key: model for model in known})
        self._driver = self._make_driver()

    def close(self) -> None:
        """Unloads all models.  One that is used afterwards is loaded again."""
        driver, self._driver = self._driver, self._make_driver()
        driver.close()

    def model(self, spec: ModelSpec, blobs: BlobSources) -> LocalModel:
        """The one model of this spec."""
        if (model := self._models.get(spec.key)) is None:
            model = self._models.setdefault(spec.key, LocalModel(spec, blobs, lambda: self._driver))
        return model

    def count(self) -> int:
        """The number of models that this application uses or has used and still holds."""
        return len(self._models)

    def known_model(self, key: str) -> LocalModel | None:
        return self._models.get(key)

    def leave(self, lease: Lease) -> None:
        """Releases the lease of a closed or collected proxy.  Runs in finalizers: no lock, no wait."""
        number = lease.id
        self._driver.tell(lambda scheduler, now: scheduler.on_release(CLIENT, number, now))

    def unload(self, names: Set[str], *, force: bool, deadline: Deadline | None) -> bool:
        """Unloads the models of these names; whether there were any.  May raise UnloadTimeout."""
        found = {status.key: status.model for status in self.statuses() if status.model in names}
        ended = [
            unload(self._driver, key, name, force=force, deadline=deadline) for key, name in found.items()
        ]
        return any(ended)

    def statuses(self) -> list[ModelStatus]:
        """All models that are loaded, held or failing."""
        return self._driver.look()

    @property
    def memory_limit(self) -> int | None:
        """Bytes that these models together may take."""
        return self._driver.memory_limit
