"""Saves for the load cache: which model is saved next, and when there is memory for it.

One saver runs at a time.  It is the first to make way: a load that needs its memory has it ended, and its
model is saved later.  The process is :mod:`onnx_dl.supervisor.processes.saver_process`'s.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from onnx_dl.core.environment import NOTHING as NO_VARIABLES
from onnx_dl.core.environment import Environment
from onnx_dl.supervisor.policy.memory_amount import NOTHING, MemoryAmount

BASE: Final = 96 << 20
"""Bytes of a saver without a model, and for a run."""
GROWTH: Final = 2.2
"""Memory of a saver, in sizes of its model."""
_MOST: Final = 64
"""Models that wait to be saved.  A model that finds no place asks again after its next load."""
_TRIES: Final = 3
_MORE: Final = 2
"""Factor for the memory of a saver that needed more than it was given."""
_CHECK_EVERY: Final = 0.1
"""Seconds between two looks at all workers while a saver runs."""


@dataclasses.dataclass(frozen=True)
class SaveRequest:
    """A model to be saved."""

    key: str
    order: str
    blob: str | None
    need: MemoryAmount
    tries: int = 1
    environment: Environment = NO_VARIABLES


def need(nbytes: int) -> MemoryAmount:
    """Memory that the saver of a model of this size may take."""
    return MemoryAmount(BASE + int(GROWTH * nbytes))


class CacheSaves:
    """The models that wait to be saved, and the saver that runs."""

    def __init__(self) -> None:
        self._requests: dict[str, SaveRequest] = {}
        self._running: SaveRequest | None = None
        self._ending = False
        self._closed = False
        self.look_at: float | None = None
        """Time when the loop is to measure all workers, because their growth counts."""

    @property
    def taken(self) -> MemoryAmount:
        """Memory that is reserved for the saver."""
        return NOTHING if self._running is None else self._running.need

    @property
    def leaving(self) -> MemoryAmount:
        """The part of it that is being freed."""
        return self.taken if self._ending else NOTHING

    def request(self, request: SaveRequest) -> None:
        """Adds a model that is worth saving."""
        is_saved = self._running is not None and self._running.key == request.key
        is_known = is_saved or request.key in self._requests
        if not (self._closed or is_known or len(self._requests) >= _MOST):
            self._requests[request.key] = request

    def schedule_look(self, now: float) -> None:
        """Asks for a look at all workers if a model waits: there may be memory for it now."""
        if self._requests and self._running is None:
            self.look_at = now

    def start(self, free: MemoryAmount, limit: MemoryAmount, now: float) -> SaveRequest | None:
        """Returns the model whose saver is to be started now, if any.  ``free`` was measured at this moment;
        models that need more than ``limit`` are dropped."""
        self._requests = {key: each for key, each in self._requests.items() if each.need.fits(limit)}
        found = None
        if self._running is None:
            found = next((each for each in self._requests.values() if each.need.fits(free)), None)
        if found is not None:
            self._running = self._requests.pop(found.key)
        self.look_at = None if self._running is None else now + _CHECK_EVERY
        return found

    def end(self) -> bool:
        """Ends the saver, because its memory is needed.  False if none runs that was not ended already."""
        if self._running is None or self._ending:
            return False
        self._ending = True
        return True

    def ended(self, *, short: bool) -> None:
        """The saver is reaped.  ``short``: it needed more memory than it was given."""
        request, was_ended = self._running, self._ending
        self._running, self._ending, self.look_at = None, False, None
        if request is not None and (was_ended or short) and request.tries < _TRIES:
            more = MemoryAmount(request.need.ram * _MORE) if short else request.need
            self.request(dataclasses.replace(request, need=more, tries=request.tries + 1))

    def close(self) -> None:
        """Drops all requests and accepts no more."""
        self._requests.clear()
        self._closed = True
