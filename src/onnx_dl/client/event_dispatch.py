"""Delivers events inside one process: to the log, to listeners, and to iterators."""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Final, Self

from onnx_dl.concurrency import primitives, spawning
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.concurrency.forking import refuse
from onnx_dl.concurrency.spawning import Thread
from onnx_dl.concurrency.waits import Mailbox
from onnx_dl.core.events import EventType, ModelEvent

logger = logging.getLogger("onnx_dl")

_WARNINGS: Final = (EventType.THRASH, EventType.OUTDATED)


class EventStream(Iterator[ModelEvent]):
    """An iterator over the events since it was made.  It waits for the next event, or ``close()``.

    It keeps 10,000 events that were not read yet.  Beyond that it drops the oldest, which shows as a gap in
    the numbers ``seq``.
    """

    def __init__(self, bus: EventBus, limit: int) -> None:
        self._bus = bus
        self._waiting: collections.deque[ModelEvent] = collections.deque(maxlen=limit)
        self._changed: Mailbox[None] = Mailbox()
        """Holds an item if a waiting thread must look again.  Not a Condition, which has a lock."""
        self._closed = False

    def put(self, event: ModelEvent) -> None:
        self._waiting.append(event)
        self._wake()

    def _wake(self) -> None:
        if self._changed.empty():  # else the thread that takes the item looks after this
            self._changed.put(None)

    def get(self, timeout: float | None = None) -> ModelEvent:
        """Waits for the next event.

        Args:
            timeout: seconds to wait; None: no limit.

        Raises:
            TimeoutError: ``timeout`` passed.
            StopIteration: the stream is closed.
            ReentrantUse: this is the thread that delivers events.
        """
        deadline = Deadline(timeout)
        while True:
            with contextlib.suppress(IndexError):
                event = self._waiting.popleft()
                if self._waiting or self._closed:
                    self._wake()  # another thread that waits
                return event
            if self._closed:
                self._wake()  # others that wait
                raise StopIteration
            if self._bus.is_publishing_here:
                refuse("the one that delivers events")
            if deadline.passed:
                raise TimeoutError(f"no model event within {deadline.timeout} seconds")
            with contextlib.suppress(primitives.Empty):
                self._changed.get(timeout=deadline.left())

    def __next__(self) -> ModelEvent:
        return self.get()

    def close(self) -> None:
        """Ends the iteration after the events that have already come."""
        self._bus.forget(self)
        self._closed = True
        self._wake()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


Listener = Callable[[ModelEvent], object]


class EventBus:
    """Hands each event to every listener, in order.  Thread-safe: its dicts change in single steps."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._listeners: dict[int, Listener] = {}
        self._streams: dict[int, EventStream] = {}
        self._here = primitives.local()

    @property
    def is_publishing_here(self) -> bool:
        """True if this thread is calling listeners."""
        return getattr(self._here, "publishing", False)

    def listen(self, callback: Listener) -> Callable[[], None]:
        """Calls ``callback`` with every event from now on; returns a function that ends that."""
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

    def publish(self, event: ModelEvent) -> list[tuple[Listener, Exception]]:
        """Delivers one event; a listener that raises hinders no other, and is returned with its error."""
        for stream in list(self._streams.values()):
            stream.put(event)
        failed = []
        self._here.publishing = True
        try:
            for callback in list(self._listeners.values()):
                try:
                    callback(event)
                except Exception as error:  # a user's callback may raise anything
                    failed.append((callback, error))
        finally:
            self._here.publishing = False
        return failed

    def close(self) -> None:
        for stream in list(self._streams.values()):
            stream.close()


class EventDispatcher:
    """Queue and thread between one that must not wait and the log and listeners of a bus."""

    def __init__(self, bus: EventBus) -> None:
        self._bus = bus
        self._events: primitives.SimpleQueue[ModelEvent | None] = primitives.SimpleQueue()
        self._thread: Thread | None = None

    def start(self) -> None:
        """Raises ProcessesExhausted: there is no thread for it."""
        thread = Thread(self._dispatch, "onnx-dl-events")
        spawning.start(thread, "The connection to a host")
        self._thread = thread

    def put(self, event: ModelEvent) -> None:
        self._events.put(event)

    def end(self) -> None:
        """Ends the thread after the events that were put before.  May be called twice."""
        self._events.put(None)

    def join(self, timeout: float) -> None:
        """Waits until all is delivered, or ``timeout`` seconds; not in a listener."""
        if self._thread is not None and not self._thread.is_this:
            self._thread.join(timeout)

    def _dispatch(self) -> None:
        while (event := self._events.get()) is not None:
            level = logging.WARNING if event.type in _WARNINGS else logging.INFO
            logger.log(level, "%s", event, extra={"onnx_dl_event": event})
            for callback, error in self._bus.publish(event):
                logger.error("An event callback failed: %r", callback, exc_info=error)
