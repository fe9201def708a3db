"""Limits of what calls take: places, bytes of answers that are not sent, and time to arrive."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

import grpc

from onnx_dl.server.interfaces import Inference
from onnx_dl.server.v2.failures import RequestFailure, invalid, too_many

_PATIENCE: Final = 0.25
"""Seconds that a call without its message keeps its place while others want it."""
_SLOW: Final = 30.0
"""Seconds from which on a call that awaits its message is a slow one."""
MOST_SLOW: Final = 16
"""Slow calls that may go on.  What has come of a message lies in grpcio, which does not tell how much."""


class Places:
    """A bound of calls of one kind that are open.  Thread-safe.

    A call has its place until its answer has been sent, so that a client that does not read is bounded, too.
    """

    def __init__(
        self, most: int, what: str, most_unsent: int = 0, inference: Inference | None = None
    ) -> None:
        """``what``: plural, for errors.  ``most_unsent``: bytes of answers, 0: no bound.  ``inference``:
        counts these bytes, too; None: there are few."""
        self._most = most
        self._what = what
        self._most_unsent = most_unsent
        self._inference = inference
        self._lock = threading.Lock()
        self._taken = 0
        self._unsent = 0

    @property
    def taken(self) -> int:
        return self._taken

    @property
    def is_full(self) -> bool:
        return self._taken >= self._most

    @property
    def unsent(self) -> int:
        return self._unsent

    def take(self) -> Place:
        """Raises RequestFailure (RESOURCE_EXHAUSTED) if there is none."""
        with self._lock:
            if self._taken >= self._most:
                raise too_many(f"{self._most} {self._what} are open, the most at one time")
            if self._most_unsent and self._unsent > self._most_unsent:
                raise too_many(f"{self._unsent} bytes of answers wait for clients to read them")
            self._taken += 1
        return Place(self)

    def _change(self, places: int, unsent: int) -> None:
        with self._lock:
            self._taken += places
            self._unsent += unsent
        if self._inference is not None and unsent > 0:
            self._inference.owe(unsent)
        elif self._inference is not None and unsent < 0:
            self._inference.paid(-unsent)


class Place:
    """One of the places."""

    def __init__(self, places: Places) -> None:
        self.places: Final = places
        self._unsent = 0
        self._lock = threading.Lock()
        self._is_given_back = False

    def owe(self, nbytes: int) -> None:
        """An answer of this size waits.  It is sent when :meth:`paid` says so, or the place is given back."""
        with self._lock:  # the call may end in another thread meanwhile
            if not self._is_given_back:
                self._unsent += nbytes
                self.places._change(0, nbytes)

    def paid(self, nbytes: int) -> None:
        """So many bytes of answers are sent."""
        with self._lock:
            if not self._is_given_back:
                self._unsent -= nbytes
                self.places._change(0, -nbytes)

    def give_back(self) -> None:
        """Idempotent."""
        with self._lock:
            if not self._is_given_back:
                self._is_given_back = True
                self.places._change(-1, -self._unsent)


class _Awaited(NamedTuple):
    """A call whose message is awaited, by ``until`` at the latest."""

    since: float
    until: float
    place: Place
    context: grpc.ServicerContext


class Arrivals:
    """Messages that are awaited.  A call whose message takes too long is cancelled: it keeps a thread.

    Any thread may await a message; :class:`Upkeep` looks at all of them.
    """

    def __init__(self) -> None:
        self._awaited: dict[int, _Awaited] = {}
        """Calls in the order in which they came."""

    def take(self, places: Places) -> Place:
        """A place for a new call: a free one, or that of the call that has awaited its message longest, which
        is cancelled.  Else whoever opens calls and sends nothing would keep all others out.

        Raises RequestFailure (RESOURCE_EXHAUSTED).
        """
        try:
            return places.take()
        except RequestFailure:
            if not (places.is_full and self._make_room(places)):
                raise
        return places.take()

    def first(
        self, messages: Iterator[bytes], context: grpc.ServicerContext, place: Place, seconds: float
    ) -> bytes:
        """The call's only message, if it is there within ``seconds``.

        Raises:
            RequestFailure: 400: the client sent none.
            grpc.RpcError: the call has ended.
        """
        key, now = id(context), time.monotonic()
        self._awaited[key] = _Awaited(now, now + seconds, place, context)
        try:
            return next(messages)
        except StopIteration:
            raise invalid("the call has no message") from None
        finally:
            self._awaited.pop(key, None)

    def _make_room(self, places: Places) -> bool:
        latest = time.monotonic() - _PATIENCE
        for key, awaited in list(self._awaited.items()):
            is_idle = awaited.place.places is places and awaited.since < latest
            if is_idle and self._awaited.pop(key, None) is not None:  # not by two threads
                awaited.place.give_back()
                awaited.context.cancel()
                return True
        return False

    def look(self, now: float) -> None:
        """Cancels the calls whose time has passed, and the slowest ones if there are too many."""
        kept = []
        for awaited in list(self._awaited.values()):
            if awaited.until < now:
                awaited.context.cancel()
            elif awaited.since < now - _SLOW:
                kept.append(awaited)
        for awaited in kept[: max(0, len(kept) - MOST_SLOW)]:  # the order is that of their begin
            awaited.context.cancel()
