"""Which served models do not load, from the host's events.  Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from onnx_dl.core.events import EventType, ModelEvent
from onnx_dl.server.interfaces import Served
from onnx_dl.server.repository import specs
from onnx_dl.server.repository.plan import Content, content

_AFTER: Final = 10.0
"""Seconds that a mark lasts beyond the time from which on the host loads again."""


class Health:
    """Knows contents that never worked.  A worker that has worked and then died says nothing of its model:
    the next use loads it again.

    The reason of an event may be the machine's, such as a lack of memory or of processes.  So such a mark
    ends some seconds after the next load may begin: a balancer sends nothing to a model that is not ready,
    and without a request it would never be loaded again."""

    def __init__(self) -> None:
        self._worked: set[str] = set()
        self.failing: dict[Content, str] = {}
        """Reasons by content."""
        self._ends: dict[Content, float] = {}
        """Ends of the marks that events have made."""

    def mark(self, entry: Served, reason: str) -> None:
        """Notes a load that failed because of the file."""
        self.failing = self.failing | {content(entry): reason}
        self._ends.pop(content(entry), None)

    def end(self, now: float) -> bool:
        """Ends the marks whose time is over.  True: there were some."""
        ended = {at for at, when in self._ends.items() if when <= now}
        self._remove(ended)
        return bool(ended)

    def note(self, event: ModelEvent, served: Iterable[Served], now: float) -> bool:
        """Notes an event at this time.  True: what is failing has changed."""
        if event.type is EventType.READY:
            self._worked.add(event.key)
            before = len(self.failing)
            good = {content(entry) for entry in served if _is_of(event, entry)}
            self._remove(good)
            return len(self.failing) != before
        if event.type is not EventType.FAILED or event.key in self._worked:
            return False
        reason = event.detail or "it does not load"
        bad = {
            content(entry): f"failed to load '{entry.name}' version {entry.version}: {reason}"
            for entry in served
            if _is_of(event, entry) and (content(entry) in self._ends or content(entry) not in self.failing)
        }
        self._ends |= dict.fromkeys(bad, now + lasts(event))
        if all(self.failing.get(at) == why for at, why in bad.items()):
            return False
        self.failing = self.failing | bad
        return True

    def _remove(self, ended: set[Content]) -> None:
        self.failing = {at: why for at, why in self.failing.items() if at not in ended}
        self._ends = {at: when for at, when in self._ends.items() if at not in ended}


def lasts(event: ModelEvent) -> float:
    """Seconds that a mark of this failure lasts."""
    return (event.retry_after or 0.0) + _AFTER


def _is_of(event: ModelEvent, entry: Served) -> bool:
    """True if the event is of the entry's own worker: that of a group says nothing of one model in it."""
    return event.key == specs.key_of(entry.generation) and not entry.arguments.get("group")
