"""What every kind of proxy has: a model in a worker, a TTL, ``session()``, ``unload()``, ``close()``.

An engine's own face (:mod:`onnx_dl.session.inference_session`, :mod:`onnx_dl.session.execution_session`) is a subclass.  How a worker is found
and called is :mod:`onnx_dl.client.remote_model`'s.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final, Self, TypeVar

import msgspec
import numpy as np
from numpy.typing import DTypeLike, NDArray

from onnx_dl.client.lease import Lease
from onnx_dl.client.remote_model import RemoteModel
from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.concurrency.forking import importing
from onnx_dl.core import file_identity, parsing
from onnx_dl.core.lifecycle import ModelState
from onnx_dl.core.spec import ModelSpec, model_key
from onnx_dl.core.status import ModelDescription, ModelStatus
from onnx_dl.errors import FilesChanging, LoadTimeout, ProxyClosedError, RunTimeout
from onnx_dl.host.connect import default_host, shared_host
from onnx_dl.host.model_host import ModelHost
from onnx_dl.tensors import segment, shared_bytes

_MOST_VERSIONS: Final = 3
"""Workers that a proxy asks for, one after the other, because files differ from what they have read."""


class ModelProxy:
    """A model that lives in a process of its own.  All proxies of one :class:`ModelSpec` share it."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        ttl: float | str,
        latency: str = "normal",
        pin: bool = False,
        priority: int = 0,
        host: ModelHost | None = None,
        memory: Mapping[str, Callable[[], int]] = MappingProxyType({}),
    ) -> None:
        """``memory``: what must be in shared memory before the model loads, see :meth:`ModelHost.model`.

        Raises:
            ValueError: ``ttl`` is none of the three modes, ``latency`` or ``pin`` neither of its two, or
                ``priority`` no whole number.
        """
        self._lease = Lease(
            parsing.parse_ttl(ttl),
            parsing.parse_latency(latency),
            parsing.parse_pin(pin),
            parsing.parse_priority(priority),
        )
        self._host = host or default_host()
        self._take(spec, memory)

    def _take(self, spec: ModelSpec, memory: Mapping[str, Callable[[], int]]) -> None:
        """From now on this is a proxy of that model."""
        if self._host.name is not None and spec.path is not None:
            # To other applications a relative path means another file.
            spec = msgspec.structs.replace(spec, name=os.path.abspath(os.path.join(spec.cwd, spec.path)))
        self._spec = spec
        self._memory = memory
        self._remote: RemoteModel | None = None
        self._used: RemoteModel | None = None
        """The model whose worker this proxy has found to have read what is there."""
        self._host.join(self)
        # The host by a weak reference: a callback registered there may hold this proxy, which would then hold
        # itself for ever.
        self._finalizer = weakref.finalize(self, _release, self._lease, weakref.ref(self._host))
        # The interpreter's exit closes the host, which releases everything at once.
        self._finalizer.atexit = False

    @property
    def ttl(self) -> float:
        """Seconds without use after which the worker ends; -1: never; 0: after each use.  Settable."""
        return self._lease.ttl

    @ttl.setter
    def ttl(self, value: float | str) -> None:
        self._lease.ttl = parsing.parse_ttl(value)
        if (model := self._host.known_model(self._spec.key)) is not None:
            self._lease.retime(self._lease.ttl, model.connection)

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """An array like ``numpy.empty``'s to build an input in, which then needs no copy.

        That holds for contiguous parts of it of 64 KiB or more, too; smaller ones are copied.  Any model of
        the same host takes it.  Do not write to it while a call with it runs.

        Raises:
            TypeError: the dtype has no fixed size.
            SharedMemoryError: the system has no memory for it.
        """
        return self._host.empty(shape, dtype)

    @property
    def is_loaded(self) -> bool:
        """Whether a worker has the model ready now.  Never loads it, and does not count as a use."""
        model = self._host.known_model(self._spec.key)
        status = model.status(measure=False) if model is not None else None
        if status is None or status.state is not ModelState.READY:
            return False
        return self._spec.group is None or self._spec.key in status.members

    def load(self, *, timeout: float | None = None) -> None:
        """Loads the model now, so that its first call need not wait; returns when it is ready.

        Counts as a use: after a TTL without a call the model is unloaded again.  With ``ttl=0`` it waits for
        its first call.

        Args:
            timeout: seconds to wait; None: as long as the load may take (``ONNX_DL_LOAD_TIMEOUT``).

        Raises:
            LoadTimeout: ``timeout`` passed; the load goes on for the next caller.
            Exception: what the first call would raise.
        """
        self.load_by(Deadline.of(parsing.parse_timeout(timeout)))

    def load_by(self, deadline: Deadline | None) -> None:
        """:meth:`load`, for as long as ``deadline`` says.

        Raises: like :meth:`load`.
        """
        with self._in_time(deadline):
            self._model(deadline).load(self._lease, deadline)

    def adopt(self) -> ModelStatus:
        """Loads the model and has the host itself hold it on this proxy's terms, also when this proxy and
        this application are gone.  Returns how it fares then.

        Raises: what the first call would raise.
        """
        used = self._bound()
        model = self._model()
        model.adopt(self._lease)
        if used is None:  # the worker is the host's alone until this proxy has a use for it
            self._lease.release(model.connection)
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
            LoadTimeout: ``timeout`` passed; the load goes on for the next caller.
            Exception: what the first call would raise.
        """
        deadline = Deadline.of(parsing.parse_timeout(timeout))
        with self._in_time(deadline):
            model = self._model(deadline)
            model.hold(self._lease, deadline)
        try:
            yield self
        finally:
            model.unhold()

    def unload(self, *, force: bool = False, timeout: float | None = None) -> bool:
        """Ends the model's worker, for all its proxies, and waits until its memory is back.

        Running calls and ``session()`` blocks are waited for, unless ``force``: their callers then get
        :class:`~onnx_dl.errors.WorkerDied`.  The next use loads the model again.

        Returns:
            Whether there was a worker to end.

        Raises:
            UnloadTimeout: calls still ran after ``timeout`` seconds; the unload happens when they end.
            SupervisorTimeout: the supervisor does not answer (``ONNX_DL_START_TIMEOUT``).
        """
        deadline = Deadline.of(parsing.parse_timeout(timeout))
        model = self._host.known_model(self._spec.key)
        return model is not None and model.unload(force=force, deadline=deadline)

    def close(self) -> None:
        """Gives up the model; it is unloaded if no other proxy holds it.  May be called twice.

        A model that was given as bytes is not kept any more: from this proxy no copy can be made.
        """
        self._finalizer()
        # The model in the client knows the memory, too: it hands it to the next host.
        self._memory, self._remote, self._used = {}, None, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._spec.name}, ttl={self.ttl:g}>"

    # --- copies -------------------------------------------------------------------------------------------

    def _travelling(self) -> dict[str, Any]:
        """What a subclass adds to a proxy, as it may go to another process."""
        return {}

    def _awake(self) -> None:
        """A copy of a proxy begins its life."""

    def __copy__(self) -> Self:
        """Another proxy of the same model."""
        return _another(type(self), self._spec, self._given(), self._terms(), self._travelling(), self._host)

    def __deepcopy__(self, memo: object) -> Self:
        return self.__copy__()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """A proxy is the name of a model and may be pickled; the other process has a host of its own, unless
        this proxy's is shared.

        Memory that the model is loaded from, if it is no file, goes along as it is now.
        """
        memory = {name: bytes_of(make()) for name, make in self._given().items()}
        rest = (self._terms(), self._travelling(), self._host.name)
        return _unpickled, (type(self), self._spec, memory, *rest)

    def _given(self) -> Mapping[str, Callable[[], int]]:
        """The memory that the model is loaded from.

        Raises:
            ProxyClosedError: this proxy gave it back.
        """
        memory = self._memory
        if not memory.keys() >= set(self._spec.blobs):
            raise self._is_closed()
        return memory

    def _is_closed(self) -> ProxyClosedError:
        return ProxyClosedError(f"This proxy of {self._spec.name} is closed; make a new one.")

    def _terms(self) -> dict[str, Any]:
        """What this proxy asks for; a copy asks for the same."""
        lease = self._lease
        return {"ttl": lease.ttl, "latency": lease.latency, "pin": lease.pin, "priority": lease.priority}

    # --- inside -------------------------------------------------------------------------------------------

    @property
    def group(self) -> str | None:
        """The name of the group whose models share one worker, if it is in one."""
        return self._spec.group

    def companion(self) -> RemoteModel | None:
        """The model, for others of its group to load it with them; None if the proxy is closed."""
        return None if self._lease.closed else self._known(None)

    @contextlib.contextmanager
    def _in_time(self, deadline: Deadline | None) -> Iterator[None]:
        """What takes too long in the block is told as a LoadTimeout."""
        try:
            yield
        except (DeadlinePassed, RunTimeout):
            took = "before it was given up"
            if deadline is not None and deadline.timeout is not None:
                took = f"within {deadline.timeout:g} seconds"
            raise LoadTimeout(f"{self._spec.name} was not ready {took}; its load goes on.") from None

    def _model(self, deadline: Deadline | None = None) -> RemoteModel:
        """The model, with a worker that this proxy may use: started and loaded if need be, and read from the
        files that are there now, unless this proxy has used it before.

        Raises:
            DeadlinePassed: that took longer.
            FilesChanging: they were others each time.
            Exception: the load failed.
        """
        return self._bound() or self._bind(deadline)

    def _bound(self) -> RemoteModel | None:
        """The model, if this proxy uses its present worker already."""
        model, lease = self._used, self._lease
        if model is None or lease.closed or not model.serves(lease):
            return None
        return model

    def _bind(self, deadline: Deadline | None) -> RemoteModel:
        for _ in range(_MOST_VERSIONS):
            model = self._known(deadline)
            worker = model.acquire(self._lease, deadline)
            if (path := file_identity.changed(self._spec.where, worker.description.files)) is None:
                self._used = model
                return model
            model.worker.leave_outdated(self._lease, worker, path)
            self._become_another(model.spec.key, worker.description)
        raise FilesChanging(
            f"{path} is not what the worker of {self._spec.name} has just read. Either it changes all the "
            "time, or the host sees other files under the same paths than this process, as in a container."
        )

    def _become_another(self, key: str, read: ModelDescription) -> None:
        """Files of the model with this key are others than its worker has read.  Who used it keeps it; this
        is from now on a proxy of a model with another key, which all have who find the same files then.
        Threads of this proxy may come to that at the same time, from the same key."""
        now = file_identity.look_at(self._spec.where, [file.name for file in read.files])
        self._spec = msgspec.structs.replace(self._spec, key=model_key(key, now))

    def _described_model(self) -> RemoteModel:
        """The model, whose description is known or comes with a load.  What was said by a worker that is gone
        holds as long as its files do."""
        model = self._known(None)
        known = model.description
        if known is not None and (
            model is self._used or file_identity.changed(self._spec.where, known.files) is None
        ):
            return model
        return self._model()

    def _known(self, deadline: Deadline | None) -> RemoteModel:
        """The model as the client knows it, with the supervisor started if need be.

        Raises:
            DeadlinePassed: that took longer.
        """
        memory, spec, model = self._memory, self._spec, self._remote
        if self._lease.closed:  # looked at last: close() takes the memory away after that
            raise self._is_closed()
        if model is None or not model.connection.usable or model.spec.key != spec.key:
            self._check_installation()
            model = self._remote = self._host.model(spec, memory, deadline)
        return model

    def _check_installation(self) -> None:
        """Raises if what the engine needs is not installed; asked before a worker is."""


_P = TypeVar("_P", bound=ModelProxy)


def _another(
    cls: type[_P],
    spec: ModelSpec,
    memory: Mapping[str, Callable[[], int]],
    terms: dict[str, Any],
    more: dict[str, Any],
    host: ModelHost | None = None,
) -> _P:
    proxy = object.__new__(cls)
    ModelProxy.__init__(proxy, spec, host=host, memory=memory, **terms)
    proxy.__dict__.update(more)
    proxy._awake()
    return proxy


def _unpickled(
    cls: type[ModelProxy],
    spec: ModelSpec,
    memory: dict[str, bytes],
    terms: dict[str, Any],
    more: dict[str, Any],
    host: str | None,
) -> ModelProxy:
    frozen = {name: shared_bytes.keep(name, data).descriptor for name, data in memory.items()}
    return _another(cls, spec, frozen, terms, more, None if host is None else shared_host(host))


def bytes_of(fd: int) -> bytes:
    """What lies in shared memory, whose descriptor is closed."""
    try:
        return segment.thaw(fd)
    finally:
        os.close(fd)


def _release(lease: Lease, host_ref: weakref.ref[ModelHost]) -> None:
    """A proxy is closed or collected."""
    lease.closed = True
    if (host := host_ref()) is not None:
        host.leave(lease)
