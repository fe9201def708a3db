"""Warning of models that evict each other: the host mostly reloads what it has just evicted.

Only evicted models count, so a TTL that is short on purpose causes no warning.
"""

from __future__ import annotations

import collections
from typing import Final, NamedTuple

_WINDOW: Final = 30.0
_SHARE: Final = 0.1
"""Share of the time.  Callers who wait less than this for reloads are not worth a warning."""
_REMEMBERED: Final = 4096


class _Reload(NamedTuple):
    began: float
    ended: float
    model: str


class ReloadWatch:
    """Models that were evicted, and the reloads of the last 30 seconds."""

    def __init__(self) -> None:
        self._evicted: dict[str, None] = {}
        self._reloads: collections.deque[_Reload] = collections.deque()
        self._quiet_until = 0.0

    def evicted(self, key: str) -> None:
        """Notes that the model was evicted."""
        self._evicted[key] = None
        if len(self._evicted) > _REMEMBERED:
            del self._evicted[next(iter(self._evicted))]

    def loaded(self, key: str, model: str, since: float, now: float) -> str | None:
        """Notes that the model is ready, for which callers have waited since ``since``.

        Returns:
            A warning, at most one within 30 seconds, or None.
        """
        if key not in self._evicted:
            return None
        del self._evicted[key]
        self._reloads.append(_Reload(since, now, model))
        while self._reloads[0].ended < now - _WINDOW:
            self._reloads.popleft()
        share = self._waited(now) / _WINDOW
        if share <= _SHARE or now < self._quiet_until:
            return None
        self._quiet_until = now + _WINDOW
        names = ", ".join(sorted({reload.model for reload in self._reloads}))
        return (
            f"{names} were loaded again {len(self._reloads)} times within {_WINDOW:.0f} s, {share:.0%} of "
            "the time, after they had made way for others; raise memory_limit (or gpu_memory_limit), use "
            "fewer models in turn, or pin some"
        )

    def _waited(self, now: float) -> float:
        """Seconds of the window in which at least one reload was waited for."""
        waited, reached = 0.0, now - _WINDOW
        for reload in sorted(self._reloads):
            waited += max(0.0, reload.ended - max(reload.began, reached))
            reached = max(reached, reload.ended)
        return waited
