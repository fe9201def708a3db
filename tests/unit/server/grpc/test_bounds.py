"""Places of calls, and which calls are cancelled because they bring no message."""

from __future__ import annotations

import time
from typing import Any

from onnx_dl.server.grpc.bounds import MOST_SLOW, Arrivals, Places


class Call:
    """A call that somebody may cancel."""

    def __init__(self) -> None:
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


def test_a_call_is_cancelled_when_its_message_is_late() -> None:
    arrivals, place = Arrivals(), Places(1, "calls").take()
    early: Any = Call()
    late: Any = Call()

    def looking(now: float) -> Any:
        """A message that comes after somebody has looked."""
        arrivals.look(now)
        yield b"here"

    assert arrivals.first(looking(0.0), early, place, 10.0) == b"here"
    assert not early.is_cancelled
    assert arrivals.first(looking(1e12), late, place, 10.0) == b"here"
    assert late.is_cancelled


def test_places_are_given_back_once() -> None:
    places = Places(2, "calls", most_unsent=10)
    first, second = places.take(), places.take()
    first.owe(11)
    assert (places.taken, places.unsent) == (2, 11)
    first.give_back()
    first.give_back()
    first.owe(5)  # the call had ended
    assert (places.taken, places.unsent) == (1, 0)
    second.give_back()
    assert places.taken == 0


def test_few_calls_are_awaited_for_long() -> None:
    """Calls that all sent half a message: the oldest are cancelled, and none before it is slow."""
    arrivals = Arrivals()
    places = Places(100, "calls")
    calls: list[Any] = [Call() for _ in range(MOST_SLOW + 3)]

    def messages(index: int) -> Any:
        """The message of this call, when those of all later calls have been awaited."""
        if index + 1 < len(calls):
            arrivals.first(messages(index + 1), calls[index + 1], places.take(), 300.0)
        else:
            arrivals.look(time.monotonic() + 29)
            assert not any(call.is_cancelled for call in calls)
            arrivals.look(time.monotonic() + 31)
        yield b"here"

    arrivals.first(messages(0), calls[0], places.take(), 300.0)
    assert [call.is_cancelled for call in calls] == [True] * 3 + [False] * MOST_SLOW
