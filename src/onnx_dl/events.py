"""What happens to models, told to whoever listens.

Covers the event type, its wording as a log line, and a bus that fans events out inside one process.
Who makes events (:mod:`onnx_dl.supervisor.scheduler`) and who listens is not known here.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import itertools
from collections.abc import Callable, Iterator
from typing import Self

import msgspec

from onnx_dl.concurrency import primitives
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.concurrency.forking import refuse
from onnx_dl.concurrency.waits import Mailbox


class EventType(enum.StrEnum):
    """The kinds of event, in the order in which one worker goes through them."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    UNLOADED = "unloaded"
    FAILED = "failed"
    THRASH = "thrash"
    """A warning: models are loaded again and again because they do not fit together."""
    OUTDATED = "outdated"
    """A warning: a file of the model has changed.  Proxies that use its worker keep it, new ones do not."""


class ModelEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One step in the life of one worker.

    Attributes:
        seq: counts all events of a supervisor; a gap means that events were missed, take a snapshot.
        type: what happened.
        at: Unix time in seconds.
        model: the model's path, ``bytes:<digest>``, or ``group:<name>`` of several in one worker.
        key: identity of the model with its options and providers.
        worker_id: identity of this spawn.
        pid: process id of the worker, None before it has one.
        rss: resident bytes of the worker when last measured, None while it has not been.
        gpu: GPU bytes of the worker, None where there is no GPU.
        reason: why it is draining or unloaded: ``ttl``, ``request``, ``evicted``, ``recycled``,
            ``regrouped`` (a model joins its group), ``crash`` or ``exit``.
        seconds: ready: how long the load took; unloaded: how long the model was loaded.
        freed: unloaded: bytes that only this worker held, now returned to the system.
        detail: failed: what went wrong; outdated: the path of the file; thrash: which models, and how much
            of the time their loads took; unloaded: that its worker ended itself for its memory.
        retry_after: failed: seconds until the host will load the model again.
    """

    seq: int
    type: EventType
    at: float
    model: str
    key: str
    worker_id: int
    pid: int | None = None
    rss: int | None = None
    gpu: int | None = None
    reason: str | None = None
    seconds: float | None = None
    freed: int | None = None
    detail: str | None = None
    retry_after: float | None = None

    def __str__(self) -> str:
        if self.type is EventType.THRASH:  # it is about several models
            return f"{self.type}: {self.detail}"
        if self.type is EventType.OUTDATED:
            return (
                f"{self.type} {self.model}, pid {self.pid}: {self.detail} has changed since it was loaded; "
                "sessions that use it keep it until it is unloaded, new ones load what is there now"
            )
        parts = [f"{self.type} {self.model}"]
        if self.reason:
            parts.append(f"reason {self.reason}")
        if self.seconds is not None:
            parts.append(f"{self.seconds:.3f} s")
        if self.freed is not None:
            parts.append(f"gave back {format_bytes(self.freed)}")
        if self.rss is not None and self.freed is None:
            parts.append(f"RSS {format_bytes(self.rss)}")
        if self.gpu is not None:
            parts.append(f"GPU {format_bytes(self.gpu)}")
        if self.pid is not None:
            parts.append(f"pid {self.pid}")
        if self.retry_after:
            parts.append(f"retry in {self.retry_after:.1f} s")
        if self.detail:
            parts.append(self.detail)
        return ", ".join(parts)


def format_bytes(count: int) -> str:
    """``12345678`` as ``12.3 MB``."""
    return f"{count / 1e6:.1f} MB"


class EventStream(Iterator[ModelEvent]):
    """An iterator over events from the moment it was made; blocks until the next one or ``close()``.

    It holds at most ``limit`` events that nobody fetched; beyond that the oldest are dropped, which shows
    as a gap in ``seq``.
    """

    def __init__(self, bus: EventBus, limit: int) -> None:
        self._bus = bus
        self._waiting: collections.deque[ModelEvent] = collections.deque(maxlen=limit)
        self._changed: Mailbox[None] = Mailbox()
        """Holds something if whoever waits should look again.  A Condition has a lock."""
        self._closed = False

    def put(self, event: ModelEvent) -> None:
        self._waiting.append(event)
        self._wake()

    def _wake(self) -> None:
        if self._changed.empty():  # else whoever takes what is there looks after this
            self._changed.put(None)

    def get(self, timeout: float | None = None) -> ModelEvent:
        """The next event.

        Raises:
            TimeoutError: none came within ``timeout`` seconds.
            ReentrantUse: there is none, and this is the thread that would bring it: a callback's.
            StopIteration: the stream was closed.
        """
        deadline = Deadline(timeout)
        while True:
            with contextlib.suppress(IndexError):
                event = self._waiting.popleft()
                self._wake_another()
                return event
            self._check(deadline)
            with contextlib.suppress(primitives.Empty):
                self._changed.get(timeout=deadline.left())

    def _wake_another(self) -> None:
        if self._waiting or self._closed:
            self._wake()

    def _check(self, deadline: Deadline) -> None:
        """Raises why there is nothing to wait for."""
        if self._closed:
            self._wake()  # others that wait
            raise StopIteration
        if self._bus.is_publishing_here:
            refuse("the one that brings events")
        if deadline.passed:
            raise TimeoutError(f"no model event within {deadline.timeout} seconds")

    def __next__(self) -> ModelEvent:
        return self.get()

    def close(self) -> None:
        """Ends the iteration once the events that already came are fetched."""
        self._bus.forget(self)
        self._closed = True
        self._wake()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class EventBus:
    """Hands each event to every listener, in order.  Thread-safe: its dicts change in single steps."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._listeners: dict[int, Callable[[ModelEvent], object]] = {}
        self._streams: dict[int, EventStream] = {}
        self._here = primitives.local()

    @property
    def is_publishing_here(self) -> bool:
        """Whether this thread is calling listeners."""
        return getattr(self._here, "publishing", False)

    def listen(self, callback: Callable[[ModelEvent], object]) -> Callable[[], None]:
        """Calls ``callback`` with every event from now on; returns what ends that."""
        number = next(self._numbers)
        self._listeners[number] = callback

        def stop() -> None:
            self._listeners.pop(number, None)

        return stop

    def stream(self, limit: int = 10_000) -> EventStream:
        stream = EventStream(self, limit)
        self._streams[id(stream)] = stream
        return stream

    def forget(self, stream: EventStream) -> None:
        self._streams.pop(id(stream), None)

    def publish(self, event: ModelEvent) -> list[tuple[Callable[[ModelEvent], object], Exception]]:
        """Delivers one event; a listener that raises hinders no other, and is returned with its error."""
        for stream in list(self._streams.values()):
            stream.put(event)
        self._here.publishing = True
        try:
            return self._call_all(event)
        finally:
            self._here.publishing = False

    def _call_all(self, event: ModelEvent) -> list[tuple[Callable[[ModelEvent], object], Exception]]:
        failed = []
        for callback in list(self._listeners.values()):
            try:
                callback(event)
            except Exception as error:  # a user's callback may raise anything
                failed.append((callback, error))
        return failed

    def close(self) -> None:
        for stream in list(self._streams.values()):
            stream.close()
