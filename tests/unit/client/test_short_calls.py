"""Time for which an event loop waits itself."""

from __future__ import annotations

import itertools

from onnx_dl.client.short_calls import Patience


def test_it_waits_while_replies_come_at_once() -> None:
    patience = Patience()
    for _ in range(100):
        assert patience.milliseconds == 1
        patience.note(30e-6)


def test_it_stops_when_they_do_not_and_tries_again_now_and_then() -> None:
    patience = Patience()
    waited = 0
    for _ in range(10):
        if patience.milliseconds:
            waited += 1
            patience.note(None)
    assert waited <= 3
    tries = []
    for number in range(1000):
        if patience.milliseconds:
            tries.append(number)
            patience.note(None)
    assert len(tries) in (3, 4)
    assert {later - earlier for earlier, later in itertools.pairwise(tries)} == {256}


def test_one_quick_reply_is_enough_to_go_on() -> None:
    patience = Patience()
    for _ in range(20):
        patience.note(None)
    while not patience.milliseconds:
        pass
    patience.note(40e-6)
    assert patience.milliseconds == 1


def test_one_slow_reply_among_quick_ones_is_forgiven() -> None:
    patience = Patience()
    for _ in range(10):
        patience.note(20e-6)
    patience.note(None)
    assert patience.milliseconds == 1
