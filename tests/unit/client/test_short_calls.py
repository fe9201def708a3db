"""Time for which an event loop waits itself, and deadlines."""

from __future__ import annotations

import asyncio
import itertools

from onnx_dl.client import short_calls
from onnx_dl.client.short_calls import Patience, ShortCall
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.transport.client_lane import Reply


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


class Pool:
    """Knows a worker that ended without an answer."""

    def __init__(self) -> None:
        self.asked: list[Deadline | None] = []

    def retire(self) -> None:
        pass

    def check_end(self, deadline: Deadline | None) -> None:
        self.asked.append(deadline)


class Lane:
    """Its worker is gone."""

    reply_fd = 0

    def close(self) -> None:
        pass

    def receive_early(self, milliseconds: int) -> Reply:
        return None


def test_the_question_how_a_worker_ended_has_the_deadline_of_the_call() -> None:
    pool, lane = Pool(), Lane()
    call = ShortCall(pool, lane, None)  # type: ignore[arg-type]
    in_thread, awaited = Deadline(7), Deadline(8)
    assert short_calls.finish(call, in_thread) is None
    assert asyncio.run(short_calls.afinish(call, awaited, Patience())) is None
    assert pool.asked == [in_thread, awaited]
