"""Which served models do not load, from the host's events.  Pure."""

from __future__ import annotations

from collections.abc import Iterable

from onnx_dl.core.events import EventType, ModelEvent
from onnx_dl.server.interfaces import Served
from onnx_dl.server.repository import specs
from onnx_dl.server.repository.plan import Content, content


class Health:
    """Knows contents that never worked.  A worker that has worked and then died says nothing of its model:
    the next use loads it again."""

    def __init__(self) -> None:
        self._worked: set[str] = set()
        self.failing: dict[Content, str] = {}
        """Reasons by content."""

    def mark(self, entry: Served, reason: str) -> None:
        """Notes a load that failed."""
        self.failing = self.failing | {content(entry): reason}

    def note(self, event: ModelEvent, served: Iterable[Served]) -> bool:
        """Notes an event.  True: what is failing has changed."""
        if event.type is EventType.READY:
            self._worked.add(event.key)
            before = len(self.failing)
            good = {content(entry) for entry in served if _is_of(event, entry)}
            self.failing = {at: why for at, why in self.failing.items() if at not in good}
            return len(self.failing) != before
        if event.type is not EventType.FAILED or event.key in self._worked:
            return False
        reason = event.detail or "it does not load"
        bad = {
            content(entry): f"failed to load '{entry.name}' version {entry.version}: {reason}"
            for entry in served
            if _is_of(event, entry)
        }
        if all(self.failing.get(at) == why for at, why in bad.items()):
            return False
        self.failing = self.failing | bad
        return True


def _is_of(event: ModelEvent, entry: Served) -> bool:
    """True if the event is of the entry's own worker: that of a group says nothing of one model in it."""
    return event.key == specs.key_of(entry.generation) and not entry.arguments.get("group")
