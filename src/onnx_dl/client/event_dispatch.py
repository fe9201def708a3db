"""Dispatches events to the log and to the listeners of the bus, in a thread of its own."""

from __future__ import annotations

import logging
from typing import Final

from onnx_dl.client.event_stream import EventBus
from onnx_dl.concurrency import primitives, spawning
from onnx_dl.concurrency.spawning import Thread
from onnx_dl.core.events import EventType, ModelEvent

logger = logging.getLogger("onnx_dl")

_WARNINGS: Final = (EventType.THRASH, EventType.OUTDATED)


class EventDispatcher:
    """Queue between a thread that must not wait and listeners that may take their time."""

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
