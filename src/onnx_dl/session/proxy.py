"""Base of all proxies: a TTL, ``load()``, ``session()``, ``unload()``, ``close()``, copies."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, Self, SupportsIndex

import numpy as np
from numpy.typing import DTypeLike

from onnx_dl.client.host_client import HostClient
from onnx_dl.client.host_registry import default_host, shared_host
from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.concurrency.forking import importing
from onnx_dl.core import parsing
from onnx_dl.core.lifecycle import ModelState
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelStatus
from onnx_dl.core.terms import Terms
from onnx_dl.core.types import Array
from onnx_dl.errors import LoadTimeout, RunTimeout
from onnx_dl.session.model_handle import ModelHandle
from onnx_dl.session.model_source import ModelSource
from onnx_dl.tensors import segment, shared_bytes


class ModelProxy:
    """A model in a worker process, or in this process.  All proxies of one ``ModelSpec`` share it."""

    _handle: ModelHandle

    def __init__(self, source: ModelSource, terms: Terms, host: HostClient | None = None) -> None:
        """``host``: None: this application's default host."""
        self._handle = ModelHandle(source, terms, host or default_host())

    @property
    def ttl(self) -> float:
        """Seconds without use after which the worker ends; -1: never; 0: after each use.  Settable."""
        return self._handle.lease.terms.ttl

    @ttl.setter
    def ttl(self, value: float | str) -> None:
        self._handle.set_ttl(value)

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float32) -> Array:
        """An array like ``numpy.empty``'s.  As an input, it is not copied.

        Contiguous parts of it of 64 KiB or more are not copied either; smaller parts are.  Any model of
        the same host takes it.  Do not write to it while a call with it runs.

        Raises:
            TypeError: the dtype has no fixed size.
            SharedMemoryError: the system has no memory for it.
        """
        return self._handle.host.empty(shape, dtype)

    @property
    def is_loaded(self) -> bool:
        """True if a worker has the model ready now.  Reading this never loads the model, and is not a use."""
        model = self._handle.host.known_model(self._handle.spec.key)
        status = model.status(measure=False) if model is not None else None
        if status is None or status.state is not ModelState.READY:
            return False
        return self._handle.spec.group is None or self._handle.spec.key in status.members

    def load(self, *, timeout: float | None = None) -> None:
        """Loads the model now, so that its first call need not wait; returns when it is ready.

        Counts as a use: after a TTL without a call the model is unloaded again.  With ``ttl=0`` it waits for
        its first call.

        Args:
            timeout: seconds to wait; None: as long as the load may take (``ONNX_DL_LOAD_TIMEOUT``).

        Raises:
            LoadTimeout: ``timeout`` passed; the load continues for the next caller.
            Exception: like the first call.
        """
        self.load_by(Deadline.of(parsing.parse_timeout(timeout)))

    def load_by(self, deadline: Deadline | None) -> None:
        """Like :meth:`load`, for as long as ``deadline`` says."""
        with _in_time(self._handle.spec.name, deadline):
            self._handle.model(deadline).load(self._handle.lease, deadline)

    def adopt(self) -> ModelStatus:
        """Loads the model and has the host itself hold it on this proxy's terms, also when this proxy and
        this application are gone.  Returns its status; raises like the first call."""
        used = self._handle.in_use()
        model = self._handle.model()
        model.adopt(self._handle.lease)
        if used is None:  # only the host holds the worker until this proxy makes a call
            model.release(self._handle.lease)
        status = model.status()
        assert status is not None
        return status

    async def aload(self, *, timeout: float | None = None) -> None:
        """:meth:`load` for asyncio and trio, in a thread, which ends when the coroutine is cancelled."""
        asynchronous = importing("onnx_dl.client.awaited_calls")
        await asynchronous.in_thread(self.load_by, parsing.parse_timeout(timeout))

    @contextlib.contextmanager
    def session(self, *, timeout: float | None = None) -> Iterator[Self]:
        """Holds the model loaded for the block; its TTL starts when the last block ends.

        Blocks nest.  ``unload()`` waits for them; ``unload(force=True)`` does not.

        Args:
            timeout: seconds that the block may take to begin.

        Raises:
            LoadTimeout: ``timeout`` passed; the load continues for the next caller.
            Exception: like the first call.
        """
        deadline = Deadline.of(parsing.parse_timeout(timeout))
        with _in_time(self._handle.spec.name, deadline):
            model = self._handle.model(deadline)
            model.hold(self._handle.lease, deadline)
        try:
            yield self
        finally:
            model.unhold()

    def unload(self, *, force: bool = False, timeout: float | None = None) -> bool:
        """Ends the model's worker, for all its proxies, and waits until its memory is free.

        Running calls and ``session()`` blocks are waited for, unless ``force``: their callers then get
        :class:`~onnx_dl.errors.WorkerDied`.  The next use loads the model again.

        Returns:
            Whether there was a worker to end.

        Raises:
            UnloadTimeout: calls still ran after ``timeout`` seconds; the unload happens when they end.
            SupervisorTimeout: the supervisor does not answer (``ONNX_DL_START_TIMEOUT``).
        """
        deadline = Deadline.of(parsing.parse_timeout(timeout))
        model = self._handle.host.known_model(self._handle.spec.key)
        return model is not None and model.unload(force=force, deadline=deadline)

    def close(self) -> None:
        """Gives up the model; it is unloaded if no other proxy holds it.  May be called twice.

        A model that was given as bytes is not kept any more: from this proxy no copy can be made.
        """
        self._handle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if (handle := vars(self).get("_handle")) is None:  # its constructor raised
            return f"<{type(self).__name__}, not set up>"
        if handle.lease.closed:
            state = "closed"
        else:
            state = "loaded" if handle.in_use() is not None else "not known to be loaded"
        return f"<{type(self).__name__} of {handle.spec.name}, ttl={handle.lease.terms.ttl:g}, {state}>"

    # --- copies -------------------------------------------------------------------------------------------

    def __getstate__(self) -> tuple[object, ...]:
        """State beside the model that a copy has, too; it may go to another process."""
        return ()

    def __setstate__(self, state: Any) -> None:
        """Sets up a copy: of its handle, and of what :meth:`__getstate__` returned."""
        (self._handle,) = state

    def __copy__(self) -> Self:
        """Another proxy of the same model."""
        made = object.__new__(type(self))
        made.__setstate__((self._handle.copied(), *self.__getstate__()))
        return made

    def __deepcopy__(self, memo: object) -> Self:
        return self.__copy__()

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """A pickled proxy is the name of a model; the other process has a host of its own, unless this
        proxy's is shared.  Memory that the model is loaded from goes along as it is now."""
        handle = self._handle
        memory = {name: bytes_of(make()) for name, make in handle.blobs().items()}
        where = (handle.spec, memory, handle.lease.terms, handle.host.name)
        return _unpickled, (type(self), *where, self.__getstate__())


def _unpickled(
    cls: type[ModelProxy],
    spec: ModelSpec,
    memory: dict[str, bytes],
    terms: Terms,
    host: str | None,
    state: tuple[object, ...],
) -> ModelProxy:
    frozen = {name: shared_bytes.keep(name, data).descriptor for name, data in memory.items()}
    made = object.__new__(cls)
    at = default_host() if host is None else shared_host(host)
    made.__setstate__((ModelHandle(ModelSource(spec, frozen), terms, at), *state))
    return made


@contextlib.contextmanager
def _in_time(name: str, deadline: Deadline | None) -> Iterator[None]:
    """Raises LoadTimeout where the block raises that its deadline has passed."""
    try:
        yield
    except (DeadlinePassed, RunTimeout):
        took = "before the wait was cancelled"
        if deadline is not None and deadline.timeout is not None:
            took = f"within {deadline.timeout:g} seconds"
        raise LoadTimeout(f"{name} was not ready {took}; its load continues.") from None


def bytes_of(fd: int) -> bytes:
    """The contents of shared memory, whose descriptor is closed."""
    try:
        return segment.thaw(fd)
    finally:
        os.close(fd)
