"""Which model is saved for the load cache, and when: one at a time, where there is room for it.

Pure.  A saver is the first to make way: a load that needs its room has it ended, and its model is saved
later.  The process is :mod:`onnx_dl.supervisor.processes.saver_process`'s.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from onnx_dl.core.environment import NOTHING as NO_VARIABLES
from onnx_dl.core.environment import Environment
from onnx_dl.supervisor.policy.requirements import NOTHING, Bytes

BASE: Final = 96 << 20
"""Bytes of a saver without a model, and for a run."""
GROWTH: Final = 2.2
"""Memory of a saver, in sizes of its model."""
_MOST: Final = 64
"""Models that wait to be saved; the next load of one that finds no place asks again."""
_TRIES: Final = 3
_MORE: Final = 2
"""How much more one gets that has taken more than it was thought to need."""
_MIND_EVERY: Final = 0.1


@dataclasses.dataclass(frozen=True)
class Wish:
    """A model to be saved."""

    key: str
    order: str
    blob: str | None
    need: Bytes
    tries: int = 1
    environment: Environment = NO_VARIABLES


def need(nbytes: int) -> Bytes:
    """What the saver of a model of this size may take."""
    return Bytes(BASE + int(GROWTH * nbytes))


class Saving:
    """The models that wait to be saved, and the one that is."""

    def __init__(self) -> None:
        self._wishes: dict[str, Wish] = {}
        self._running: Wish | None = None
        self._ending = False
        self._closed = False
        self.look_at: float | None = None
        """When the loop is to look at all workers, so that what they have grown by counts."""

    @property
    def taken(self) -> Bytes:
        """What of the limits the saver takes."""
        return NOTHING if self._running is None else self._running.need

    @property
    def leaving(self) -> Bytes:
        """What of it will soon be back."""
        return self.taken if self._ending else NOTHING

    def ask(self, wish: Wish) -> None:
        """A model is worth saving."""
        is_saved = self._running is not None and self._running.key == wish.key
        if not (self._closed or is_saved or wish.key in self._wishes or len(self._wishes) >= _MOST):
            self._wishes[wish.key] = wish

    def stir(self, now: float) -> None:
        """Somebody has come or gone: there may be room."""
        if self._wishes and self._running is None:
            self.look_at = now

    def start(self, free: Bytes, limit: Bytes, now: float) -> Wish | None:
        """The model whose saver is to be started, if one is.

        Args:
            free: bytes that nobody takes, by what was measured right now.
            limit: bytes that there are; what needs more will never be saved.
        """
        self._wishes = {key: wish for key, wish in self._wishes.items() if wish.need.fits(limit)}
        found = None
        if self._running is None:
            found = next((wish for wish in self._wishes.values() if wish.need.fits(free)), None)
        if found is not None:
            self._running = self._wishes.pop(found.key)
        self.look_at = None if self._running is None else now + _MIND_EVERY
        return found

    def end(self) -> bool:
        """The saver is to make way; whether there is one that does not know."""
        if self._running is None or self._ending:
            return False
        self._ending = True
        return True

    def ended(self, *, short: bool) -> None:
        """The saver is gone, and all that it took; ``short``: it would have taken more than it may."""
        wish, was_ended = self._running, self._ending
        self._running, self._ending, self.look_at = None, False, None
        if wish is not None and (was_ended or short) and wish.tries < _TRIES:
            more = Bytes(wish.need.ram * _MORE) if short else wish.need
            self.ask(dataclasses.replace(wish, need=more, tries=wish.tries + 1))

    def close(self) -> None:
        """Nothing is saved any more."""
        self._wishes.clear()
        self._closed = True
