"""Where a lane's thread runs, and whether and how long its ends poll: decisions, fed with times."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from onnx_dl.transport.adaptive_polling import FIRST_PAUSE, LONGEST_PAUSE, QUICK, WINDOW, AdaptivePolling
from onnx_dl.transport.affinity import (
    BLOCK,
    RETRY,
    CallMode,
    CallModes,
    MeasuredAffinity,
    ModeChoice,
    SeparateAffinity,
)
from onnx_dl.transport.doorbell import LONGEST_SPIN, SpinBudget

ALL = frozenset(range(4))
ONE = frozenset({2})
TWO = frozenset(range(2))


class Caller:
    """Calls from core 2, with its own clock; a call takes as long as ``cost(way)`` says, in µs."""

    def __init__(self, cost: Callable[[CallMode], float], choice: ModeChoice | None = None) -> None:
        self.choice = choice or MeasuredAffinity(CallModes(ALL))
        self.cost = cost
        self.way = CallMode(ALL, False)
        self.changes = 0
        self.now = 0
        self.took = 0

    def call(self, count: int, cpu: int = 2, gap: float = 10, follows: bool = True) -> list[CallMode]:
        """The way of each of these calls; ``gap``: µs between a reply and the next call."""
        ways = []
        for _ in range(count):
            self.now += int(gap * 1000)
            way = self.choice.next(cpu, self.took, int(gap * 1000), self.now, follows)
            self.changes += way is not self.way
            self.way = way
            self.took = int(self.cost(way) * 1000)
            self.now += self.took
            ways.append(way)
        return ways


def near_costs(near: float, far: float) -> Callable[[CallMode], float]:
    return lambda way: near if len(way.cores) == 1 else far


def is_near(way: CallMode) -> bool:
    return way.cores != ALL


def test_a_worker_follows_a_caller_who_finds_that_faster():
    caller = Caller(near_costs(15, 50))
    caller.call(4 * BLOCK)
    assert all(map(is_near, caller.call(RETRY * BLOCK - 8 * BLOCK)))
    assert caller.way.cores == ONE


def test_a_worker_is_left_alone_where_that_is_faster():
    caller = Caller(near_costs(900, 50))
    ways = caller.call(RETRY * BLOCK * 5)
    assert sum(map(is_near, ways)) / len(ways) < 0.01
    assert caller.way.cores == ALL


def test_what_changes_is_noticed_at_the_next_block():
    caller = Caller(near_costs(15, 50))
    caller.call(4 * BLOCK)
    assert caller.way.cores == ONE
    caller.cost = near_costs(1500, 50)  # somebody else is busy there now
    caller.call(2 * BLOCK)
    assert caller.way.cores == ALL


def test_the_other_way_is_tried_again_in_a_while():
    caller = Caller(near_costs(60, 50))
    caller.call(4 * BLOCK)
    caller.cost = near_costs(15, 50)
    assert is_near(caller.call(2 * RETRY * BLOCK)[-1])


def test_long_calls_are_not_worth_a_thought():
    caller = Caller(near_costs(1, 5000))
    assert not any(map(is_near, caller.call(3 * RETRY * BLOCK)))


def test_a_worker_follows_a_caller_who_moves():
    caller = Caller(near_costs(15, 50))
    caller.call(4 * BLOCK)
    assert caller.call(1, cpu=3)[0].cores == frozenset({3})


def test_a_core_that_the_worker_may_not_use_is_not_followed_to():
    caller = Caller(near_costs(15, 50))
    caller.call(4 * BLOCK, cpu=7)
    caller.call(4 * BLOCK, cpu=-1)
    assert caller.changes == 0 or caller.way.cores == ALL


def test_nothing_is_moved_twice():
    caller = Caller(near_costs(15, 50))
    caller.call(4 * BLOCK)
    before = caller.changes
    caller.call(50 * BLOCK)
    assert caller.changes == before


def test_a_caller_who_polls_has_its_core_to_itself():
    ways = CallModes(ALL)
    caller = Caller(lambda way: 10, SeparateAffinity(ways))
    assert caller.call(1)[0] == CallMode(ALL - {2}, True)
    assert caller.call(1)[0] is ways.apart(2)
    assert caller.call(1, cpu=0)[0].cores == ALL - {0}
    caller.cost = lambda way: 8000
    assert caller.call(2, cpu=0)[-1].cores == ALL, "nobody polls for that long"


# --- polling where it pays -------------------------------------------------------------------------------


class Adaptive(Caller):
    """Calls with ``latency="auto"`` on a machine with ``free`` cores or none."""

    def __init__(self, cost: Callable[[CallMode], float]) -> None:
        self.free = True
        self.counts = 0
        super().__init__(cost, AdaptivePolling(CallModes(TWO), self._has_free_core))

    def _has_free_core(self) -> bool:
        self.counts += 1
        return self.free

    def share(self, count: int, **how: float) -> float:
        """Share of these calls that poll."""
        ways = self.call(count, cpu=0, **how)  # type: ignore[arg-type]
        return sum(way.polls for way in ways) / count


def polling_gains(way: CallMode) -> float:
    return 110 if way.polls else 180


def test_calls_in_quick_succession_poll():
    caller = Adaptive(polling_gains)
    assert caller.share(2 * BLOCK) == 0, "the ways of sleeping first"
    caller.call(2 * BLOCK, cpu=0)
    assert caller.share(50 * BLOCK) == 1
    assert caller.way == CallMode(frozenset({1}), True)
    assert caller.share(4 * RETRY * BLOCK) > 0.95, "sleeping is tried again for a block in a while"


@pytest.mark.parametrize(
    "end", [{"gap": QUICK / 1000 + 1}, {"follows": False}], ids=["silence", "other lane"]
)
def test_polling_ends_at_once(end: dict[str, float]):
    caller = Adaptive(polling_gains)
    caller.call(8 * BLOCK, cpu=0)
    assert caller.way.polls
    assert not caller.call(1, cpu=0, **end)[0].polls  # type: ignore[arg-type]
    assert caller.share(BLOCK - 1) == 0
    assert caller.share(2 * BLOCK) > 0.4, "and begins again"


@pytest.mark.parametrize("how", [{"gap": 32_000}, {"follows": False}], ids=["a stream", "lanes in turn"])
def test_calls_that_do_not_follow_quickly_never_poll(how: dict[str, float]):
    caller = Adaptive(polling_gains)
    assert caller.share(3 * RETRY * BLOCK, **how) == 0
    assert caller.counts == 0


def test_long_calls_never_poll():
    assert Adaptive(lambda way: 310).share(3 * RETRY * BLOCK) == 0


def test_no_core_is_taken_from_threads_that_have_work():
    caller = Adaptive(polling_gains)
    caller.free = False
    assert caller.share(100_000) == 0
    assert caller.counts < 60, "it asks seldom"
    caller.free = True
    caller.call(int(LONGEST_PAUSE / 180_000) + BLOCK, cpu=0)
    assert caller.share(BLOCK) == 1
    caller.free = False
    caller.call(2 * BLOCK, cpu=0)
    assert not caller.way.polls


def test_one_count_of_many_threads_may_hit_a_moment():
    caller = Adaptive(polling_gains)
    caller.call(8 * BLOCK, cpu=0)
    caller.free, before = False, caller.counts
    while caller.counts == before:
        caller.call(1, cpu=0)
    caller.free = True
    assert caller.share(4 * BLOCK) == 1


@pytest.mark.parametrize("polling, calls", [(170, BLOCK + WINDOW), (400, BLOCK)], ids=["slow", "far slower"])
def test_polling_that_does_not_pay_ends_and_is_tried_more_and_more_seldom(polling: float, calls: int):
    caller = Adaptive(lambda way: polling if way.polls else 180)
    assert sum(way.polls for way in caller.call(16 * BLOCK, cpu=0)) <= calls
    assert caller.share(100_000) < 0.01


def test_calls_that_are_held_up_end_polling():
    """The median is good, but one call in 32 waits for a core for 4 ms."""
    held_up = iter(range(1 << 30))

    def cost(way: CallMode) -> float:
        return 180 if not way.polls else 4000 if next(held_up) % 32 == 31 else 110

    assert Adaptive(cost).share(100_000) < 0.02


def test_a_core_that_is_lost_ends_polling_with_the_first_call_that_shows_it():
    caller = Adaptive(polling_gains)
    caller.call(8 * BLOCK, cpu=0)
    caller.free, caller.cost = False, lambda way: 4000 if way.polls else 200
    assert sum(way.polls for way in caller.call(100, cpu=0)) <= 2
    assert caller.choice._not_before - caller.now <= FIRST_PAUSE  # type: ignore[attr-defined]


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
