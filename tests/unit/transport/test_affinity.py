"""Where a lane's thread runs, and for how long to look for messages: decisions, fed with times."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from onnx_dl.transport.affinity import BLOCK, RETRY, MeasuredAffinity, SeparateAffinity
from onnx_dl.transport.doorbell import LONGEST_SPIN, SpinBudget

ALL = frozenset(range(4))
ONE = frozenset({2})


class Caller:
    """Calls from core 2; a call takes as long as ``cost(near)`` says, in µs."""

    def __init__(self, cost: Callable[[bool], float]) -> None:
        self.placement = MeasuredAffinity(ALL)
        self.cost = cost
        self.cores = ALL
        self.moves = 0

    def call(self, count: int, cpu: int = 2) -> list[bool]:
        """Whether each of these calls ran near its caller."""
        were_near = []
        for _ in range(count):
            near = self.cores != ALL
            moved = self.placement.note(cpu, int(self.cost(near) * 1000))
            if moved is not None:
                self.cores, self.moves = moved, self.moves + 1
            were_near.append(self.cores != ALL)
        return were_near


def test_a_worker_follows_a_caller_who_finds_that_faster():
    caller = Caller(lambda near: 15 if near else 50)
    caller.call(4 * BLOCK)
    assert all(caller.call(RETRY * BLOCK - 8 * BLOCK))
    assert caller.cores == ONE


def test_a_worker_is_left_alone_where_that_is_faster():
    caller = Caller(lambda near: 900 if near else 50)
    were_near = caller.call(RETRY * BLOCK * 5)
    assert were_near.count(True) / len(were_near) < 0.01
    assert caller.cores == ALL


def test_what_changes_is_noticed_at_the_next_block():
    caller = Caller(lambda near: 15 if near else 50)
    caller.call(4 * BLOCK)
    assert caller.cores == ONE
    caller.cost = lambda near: 3000 / 2 if near else 50  # somebody else is busy there now
    caller.call(2 * BLOCK)
    assert caller.cores == ALL


def test_the_other_way_is_tried_again_in_a_while():
    caller = Caller(lambda near: 60 if near else 50)
    caller.call(4 * BLOCK)
    caller.cost = lambda near: 15 if near else 50
    assert caller.call(2 * RETRY * BLOCK)[-1]


def test_long_calls_are_not_worth_a_thought():
    caller = Caller(lambda near: 1 if near else 5000)
    assert not any(caller.call(3 * RETRY * BLOCK))


def test_a_worker_follows_a_caller_who_moves():
    caller = Caller(lambda near: 15 if near else 50)
    caller.call(4 * BLOCK)
    caller.call(1, cpu=3)
    assert caller.cores == frozenset({3})


def test_a_core_that_the_worker_may_not_use_is_not_followed_to():
    caller = Caller(lambda near: 15 if near else 50)
    assert not any(caller.call(4 * BLOCK, cpu=7))
    assert not any(caller.call(4 * BLOCK, cpu=-1))
    assert caller.moves == 0


def test_nothing_is_moved_twice():
    caller = Caller(lambda near: 15 if near else 50)
    caller.call(4 * BLOCK)
    before = caller.moves
    caller.call(50 * BLOCK)
    assert caller.moves == before


def test_a_caller_who_polls_has_its_core_to_itself():
    apart = SeparateAffinity(ALL)
    assert apart.note(2, 10) == ALL - {2}
    assert apart.note(2, 10) is None
    assert apart.note(0, 10) == ALL - {0}
    assert apart.note(0, 8_000_000) == ALL, "nobody polls for that long"
    assert apart.note(0, 8_000_000) is None


# --- patience --------------------------------------------------------------------------------------------


def test_short_waits_are_looked_out_for_twice_as_long():
    patience = SpinBudget()
    for _ in range(100):
        patience.note(30e-6)
    assert 50e-6 < patience.seconds < 100e-6


def test_long_waits_are_slept_through():
    patience = SpinBudget()
    for _ in range(100):
        patience.note(0.032)
    assert patience.seconds == 0.0


def test_it_is_bounded():
    patience = SpinBudget()
    for wait in (1e-6, 1e-3, 10.0, 50e-6, 240e-6) * 20:
        patience.note(wait)
        assert 0.0 <= patience.seconds <= LONGEST_SPIN


def test_a_stream_that_goes_on_after_a_silence_is_soon_looked_out_for_again():
    patience = SpinBudget()
    for _ in range(100):
        patience.note(30e-6)
    patience.note(3600.0)
    for _ in range(8):
        patience.note(30e-6)
    assert patience.seconds > 0


@pytest.mark.parametrize("wait", [1e-6, 100e-6, 200e-6])
def test_the_budget_covers_the_usual_wait(wait: float):
    patience = SpinBudget()
    for _ in range(200):
        patience.note(wait)
    assert patience.seconds > wait
