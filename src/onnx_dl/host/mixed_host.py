"""A host of both kinds of models: those in worker processes, and those in this process."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import DTypeLike, NDArray

from onnx_dl.client.acquisition import Lease
from onnx_dl.client.host_client import HostClient
from onnx_dl.client.model_table import BlobSources
from onnx_dl.client.served_model import ServedModel
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.concurrency.forking import importing
from onnx_dl.core.parsing import parse_timeout
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import Snapshot
from onnx_dl.system import resources

if TYPE_CHECKING:
    from onnx_dl.inprocess.local_host import LocalHost

_ALIGNMENT = 64


class MixedHost(HostClient):
    """The one place that decides by ``ModelSpec.isolation`` where a model runs.

    Without models in this process, nothing of them is imported; without others, no supervisor is started.
    """

    _local: LocalHost | None = None

    def model(self, spec: ModelSpec, blobs: BlobSources, deadline: Deadline | None = None) -> ServedModel:
        if spec.isolation:
            return super().model(spec, blobs, deadline)
        if (local := self._local) is None:
            made = importing("onnx_dl.inprocess.local_host").LocalHost(self._settings, self._bus)
            local = self.__dict__.setdefault("_local", made)  # two threads get the same one
        return local.model(spec, blobs)

    def known_model(self, key: str) -> ServedModel | None:
        local = None if self._local is None else self._local.known_model(key)
        return local or super().known_model(key)

    def leave(self, lease: Lease) -> None:
        super().leave(lease)
        if self._local is not None:
            self._local.leave(lease)

    def start(self) -> None:
        """Starts the supervisor now, so that the first use of a model need not wait for it.  Does nothing
        where models run in this process: on other systems than Linux, and with ``ONNX_DL_ISOLATION=off``.

        Raises:
            SupervisorStartError: the process did not come up.
        """
        if self.name is not None or (resources.is_platform() and self._settings.isolation == "on"):
            super().start()

    def close(self) -> None:
        """Ends all workers and the supervisor, unloads models in this process, and waits for that.  May be
        called twice.

        A shared host stays, but releases all models that this application holds.  Iterators from
        :meth:`events` end after the last event.  A proxy of it that is used afterwards starts it again.
        """
        if self._local is not None:
            self._local.close()
        super().close()

    def forget(self) -> None:
        super().forget()
        if self._local is not None:
            self._local.forget()

    def unload(self, model: str, *, force: bool = False, timeout: float | None = None) -> bool:
        """Ends the workers of a model, for all its users, and returns when their memory is free.  A model
        in this process is unloaded in the same way.

        Args:
            model: its name as in :meth:`snapshot` or in the host's file, or its path.  For a model in a
                group, the whole group is unloaded.
            force: do not wait for running calls; their callers get WorkerDied.  In this process, running
                calls are told to end.

        Returns:
            Whether there was one.

        Raises:
            UnloadTimeout: (a TimeoutError) calls still ran after ``timeout`` seconds; the model is unloaded
                when they end.
            SupervisorTimeout: the supervisor does not answer.
        """
        deadline, here = Deadline.of(parse_timeout(timeout)), False
        if self._local is not None:
            here = self._local.unload({model, os.path.abspath(model)}, force=force, deadline=deadline)
        left = None if deadline is None else deadline.left()
        return super().unload(model, force=force, timeout=left) or here

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """An array like ``numpy.empty``'s that any model of this host is fed without a copy.

        Raises:
            TypeError: the dtype has no fixed size.
            SharedMemoryError: the system has no memory for it.
        """
        return super().empty(shape, dtype) if resources.is_platform() else _aligned(shape, np.dtype(dtype))

    def snapshot(self) -> Snapshot:
        """All models, measured now.  Starts and loads nothing and touches no timer.

        Those in this process have ``isolated=False``.  ``memory_limit`` holds for each of both kinds.
        """
        found = super().snapshot()
        if self._local is None:
            return found
        here = self._local.statuses()
        return msgspec.structs.replace(
            found,
            models=[*found.models, *here],
            memory_limit=found.memory_limit or self._local.memory_limit,
            memory_in_use=found.memory_in_use + sum(status.usage.pss for status in here),
        )


def _aligned(shape: int | tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array of this process alone, aligned like onnxruntime's own."""
    if dtype.hasobject or not dtype.itemsize:
        raise TypeError(f"An array of dtype {dtype} has no fixed size; use numpy.empty().")
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if min(shape, default=0) < 0:
        return np.empty(shape, dtype)  # raises numpy's error
    memory = np.empty(math.prod(shape) * dtype.itemsize + _ALIGNMENT, np.uint8)
    return np.ndarray(shape, dtype, memory, int(-memory.ctypes.data % _ALIGNMENT))
