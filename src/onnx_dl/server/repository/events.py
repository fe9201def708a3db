"""The host's events, in the loop's thread: they tell which served models do not load."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable

from onnx_dl.client.host_client import HostClient
from onnx_dl.core.events import EventType, ModelEvent
from onnx_dl.server.repository.health import Health, lasts
from onnx_dl.server.repository.tables import Tables
from onnx_dl.server.repository.tasks import Tasks


class Events:
    """Follows the events, and publishes what they change.  Belongs to the loop's thread."""

    def __init__(self, health: Health, tables: Tables, tasks: Tasks) -> None:
        self._health = health
        self._tables = tables
        self._tasks = tasks
        self._stop: Callable[[], None] | None = None

    def follow(self, host: HostClient) -> None:
        """Begins to follow the events of a host."""
        self._stop = host.on_event(functools.partial(_hand_over, asyncio.get_running_loop(), self._note))

    def close(self) -> None:
        """Follows them no longer."""
        if self._stop is not None:
            self._stop()

    def _note(self, event: ModelEvent) -> None:
        """Notes which models do not load, or do again."""
        now = time.monotonic()
        if self._health.note(event, self._tables.all(), now):
            self._tasks.begin(self._tables.publish())
        if event.type is EventType.FAILED:
            self._tasks.begin(self._end(event, now))

    async def _end(self, event: ModelEvent, noted: float) -> None:
        """Ends what the event has marked, when its time is over.  ``noted``: when that was."""
        await asyncio.sleep(lasts(event))
        # uvloop counts whole milliseconds, so the sleep may end a moment early, and nobody would look again.
        if self._health.end(max(time.monotonic(), noted + lasts(event))):
            await self._tables.publish()


def _hand_over(
    loop: asyncio.AbstractEventLoop, call: Callable[[ModelEvent], None], event: ModelEvent
) -> None:
    """Has the loop's thread make a call.  Runs in the thread that delivers events."""
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(call, event)
