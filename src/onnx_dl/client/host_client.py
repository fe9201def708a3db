"""The application's side of one supervisor: its models, their memory, a snapshot, events.

:mod:`onnx_dl.client.supervisor_link` connects; :mod:`onnx_dl.client.remote_model` makes one model's calls.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from onnx_dl.client import launcher, supervisor_link
from onnx_dl.client.acquisition import Lease
from onnx_dl.client.connection import Connection, ConnectionListener
from onnx_dl.client.event_dispatch import EventBus, EventStream
from onnx_dl.client.model_table import BlobSources, GroupMember, HostModels, alive
from onnx_dl.client.remote_model import HostServices, RemoteModel, unload
from onnx_dl.client.served_model import ServedModel
from onnx_dl.client.supervisor_link import FAREWELL, SupervisorLink
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.core.events import ModelEvent
from onnx_dl.core.parsing import parse_timeout
from onnx_dl.core.settings import Settings
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import Snapshot
from onnx_dl.errors import ConfigError, SupervisorDied
from onnx_dl.linux_only import register_at_fork
from onnx_dl.protocol import control as m
from onnx_dl.protocol import failures
from onnx_dl.tensors.shared_arrays import SharedArrays


class HostClient:
    """One supervisor with the models of this application.  Starts nothing until a model is used."""

    def __init__(self, settings: Settings, explicit: Sequence[str] = (), name: str | None = None) -> None:
        """``explicit``: settings that a host's file does not change; ``name``: of a host that several
        applications share, None: this application's own."""
        self.name = name
        self._settings = settings
        self._explicit = explicit
        self._bus = EventBus()
        self._models = HostModels()
        self._reset(starts=True)
        _hosts[id(self)] = self

    def _reset(self, *, starts: bool) -> None:
        self._buffers = SharedArrays()

        # By tidy(), the connection's thread keeps this alive while it is connected: a host that the program
        # drops without close() is closed at the interpreter's exit.
        def tidy() -> bool:
            self._buffers.trim()
            return self._models.tidy()

        listener = ConnectionListener(self._models.on_event, self._models.shut, tidy)
        self.link = SupervisorLink(self._settings, self._explicit, self.name, self._bus, listener)
        self.link.starts = starts

    def forget(self) -> None:
        """Drops the parent's state in a forked child."""
        self.link.disown()
        self._models.forget()
        self._reset(starts=self.link.starts)

    def start(self) -> None:
        """Starts the supervisor now, so that the first use of a model need not wait for it.

        Raises:
            PlatformError: onnx-dl cannot run on this system.
            SupervisorStartError: the process did not come up.
        """
        self.link.connect()

    def close(self) -> None:
        """Ends all workers and the supervisor, and waits until they are gone.  May be called twice.

        A shared host continues, without the models that only this application held.  Iterators from
        :meth:`events` end after the last event.  A proxy of this host that is used afterwards starts the host
        again.
        """
        self.link.close()
        self._buffers.trim()
        self._bus.close()

    def stop(self) -> None:
        """Ends the host and all its models, also for other applications; returns when it is gone.

        Running calls have a few seconds (``ONNX_DL_EXIT_GRACE``) to end.

        Raises:
            TimeoutError: the host still runs after that.
        """
        pid = None if self.name is None else self.link.ask_to_end()
        self.close()
        if self.name is not None and pid is not None:  # calls that waited may have started the next one
            launcher.await_end(self.name, pid, FAREWELL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- models -------------------------------------------------------------------------------------------

    def model(self, spec: ModelSpec, blobs: BlobSources, deadline: Deadline | None = None) -> ServedModel:
        """The one model of this application for the spec.  Starts the supervisor if need be, and raises
        like :meth:`SupervisorLink.connect`."""
        connection = self.link.connect(deadline)
        if (model := self._models.get(spec.key)) is None:
            model = self._models.add(
                RemoteModel(
                    connection,
                    spec,
                    self._settings,
                    HostServices(
                        functools.partial(self._renew, blobs),
                        functools.partial(self._models.companions, spec),
                        self._models.close_idle_lanes,
                        is_shared=self.name is not None,
                    ),
                    self._models.share(connection, spec, blobs),
                )
            )
        self._models.move(model, connection, blobs)
        return model

    def _renew(
        self, blobs: BlobSources, model: RemoteModel, failed: Connection, deadline: Deadline | None
    ) -> None:
        """Moves a model to the next host, found or started: the one at this connection is gone or going."""
        failed.end()
        self._models.move(model, self.link.connect(deadline), blobs)

    def known_model(self, key: str) -> ServedModel | None:
        """The model if there is one and its supervisor lives.  Starts nothing."""
        model = self._models.get(key)
        return model if model is not None and model.connection.usable else None

    def join(self, member: GroupMember) -> None:
        """Notes a new claim to a model: those of one group are loaded together."""
        self._models.join(member)

    def leave(self, lease: Lease) -> None:
        """Releases a closed or collected proxy's lease.  Runs in finalizers: takes no lock and never waits.

        The model is not used: the garbage collector may have found both in one cycle, and then it has
        emptied the weak references to the model before it calls the finalizer of the proxy.
        """
        if (connection := self.link.connection) is not None:
            connection.send(m.Release(proxy=lease.id))

    @property
    def has_names(self) -> bool:
        """True if the host may have a file that names models."""
        return bool(self.name or self._settings.config)

    def named(self, name: str) -> m.Named:
        """The model of this name in the host's file.  Raises ConfigError if there is none."""
        answer: m.Named | m.Denied = self.link.connect().ask(
            lambda ticket: m.AskModel(ticket=ticket, name=name)
        )
        if isinstance(answer, m.Denied):
            raise failures.rebuild(answer.failure)
        return answer

    def unload(self, model: str, *, force: bool = False, timeout: float | None = None) -> bool:
        """Ends the workers of a model, for all its users, and returns when their memory is free.

        Args:
            model: name of the model as in :meth:`snapshot` or in the host's file, or its path.  If the model
                is in a group, the whole group is unloaded.
            force: do not wait for running calls; their callers get WorkerDied.
            timeout: seconds to wait for running calls; None: no limit.

        Returns:
            True if the model was loaded.

        Raises:
            UnloadTimeout: (a TimeoutError) calls still ran after ``timeout`` seconds; the model is unloaded
                when they end.
            SupervisorTimeout: the supervisor does not answer.
        """
        if (connection := self.link.present()) is None:
            return False
        names = {model, os.path.abspath(model)}
        if self.has_names:
            with contextlib.suppress(ConfigError):  # then it is no name in the host's file
                names.add(self.named(model).spec.name)
        models = self.snapshot().models
        keys = {status.key for status in models if names & {status.model, *status.members.values()}}
        deadline = Deadline.of(parse_timeout(timeout))
        answers = [unload(connection, key, model, force=force, deadline=deadline) for key in keys]
        return any(answer.was_loaded for answer in answers)

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """An array like ``numpy.empty``'s that models of this host read without a copy.

        Args:
            shape: as for ``numpy.empty``.
            dtype: any dtype of fixed size.

        Raises:
            TypeError: the dtype has no fixed size.
            SharedMemoryError: the system has no memory for it.
        """
        if (connection := self.link.connection) is not None:
            connection.arm()  # gives back the memory of arrays that are gone by then
        return self._buffers.empty(shape, dtype)

    # --- what happens -------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """All models, measured now.  Starts nothing, loads nothing, and is not a use of a model."""
        try:
            if (connection := self.link.present()) is None:
                return Snapshot(seq=0, supervisor_pid=None, models=[])
            status = connection.ask(lambda ticket: m.AskStatus(ticket=ticket))
        except SupervisorDied:
            if self.name is None:
                raise
            return self.snapshot()  # there may be another
        return Snapshot(**{field: getattr(status, field) for field in Snapshot.__struct_fields__})

    def events(self) -> EventStream:
        """An iterator over the events from now on.

        ``get(timeout)`` waits for one event, ``close()`` ends the iteration.
        """
        return self._bus.stream()

    def on_event(self, callback: Callable[[ModelEvent], object]) -> Callable[[], None]:
        """Calls ``callback`` with each :class:`~onnx_dl.ModelEvent` from now on, in a thread of its own.

        Returns:
            A function that ends the calls.
        """
        return self._bus.listen(callback)


def recent_events(host: HostClient, limit: int) -> list[ModelEvent]:
    """The last events of a host, oldest first; none if it has not started."""
    try:
        if (connection := host.link.present()) is None:
            return []
        answer: m.RecentEvents = connection.ask(lambda ticket: m.AskEvents(ticket=ticket, limit=limit))
    except SupervisorDied:
        if host.name is None:
            raise
        return recent_events(host, limit)  # there may be another
    return answer.events


_hosts: weakref.WeakValueDictionary[int, HostClient] = weakref.WeakValueDictionary()


def _close_all() -> None:
    supervisor_link.refuse_starts()
    for host in alive(_hosts):
        host.close()


def _after_fork() -> None:
    """A forked child starts a supervisor of its own when it uses a model."""
    for host in alive(_hosts):
        host.forget()


atexit.register(_close_all)
register_at_fork(after_in_child=_after_fork)
