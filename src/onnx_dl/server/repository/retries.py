"""Repetition of loads that failed for a reason that may pass.  Pure."""

from __future__ import annotations

from typing import Final, NamedTuple

from onnx_dl.server.repository.loads import Outcome

_FIRST: Final = 10.0
_LONGEST: Final = 600.0
"""Seconds between two tries after a worker has died or taken too long."""


class _Try(NamedTuple):
    """``wait``: seconds after the last failure; ``due``: when that has passed."""

    wait: float
    due: float


class Retries:
    """Names of models that are taken over again though their files are the same."""

    def __init__(self) -> None:
        self._tries: dict[str, _Try] = {}

    def note(self, name: str, failed: list[Outcome], now: float) -> None:
        """Notes how loads of a model have ended.  The wait doubles each time if a worker was at fault, which
        costs a start and memory; other errors that pass are tried again at the next look."""
        passing = [outcome for outcome in failed if outcome.may_pass]
        if not passing:
            self.forget(name)
            return
        before = self._tries.get(name, _Try(0.0, 0.0)).wait
        is_workers = any(not outcome.is_passing for outcome in passing)
        wait = min(_LONGEST, max(_FIRST, 2 * before)) if is_workers else 0.0
        self._tries[name] = _Try(wait, now + wait)

    def forget(self, name: str) -> None:
        """The model is loaded, or has other files."""
        self._tries.pop(name, None)

    def is_due(self, name: str, now: float) -> bool:
        """True if the model is to be taken over now."""
        found = self._tries.get(name)
        return found is not None and now >= found.due
