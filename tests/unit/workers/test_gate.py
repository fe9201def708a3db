"""The gate: calls, holds, TTLs and drains, at times that the test names."""

from __future__ import annotations

import random
import threading

import pytest

from onnx_dl.workers.gate import Gate, GateDecision

IDLE = GateDecision(expired=False, drained=False, wait=None)


class Wakes:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1


@pytest.fixture
def wakes() -> Wakes:
    return Wakes()


@pytest.fixture
def gate(wakes) -> Gate:
    """TTL 10, ready at 100."""
    return Gate(10.0, 100.0, wakes)


def use(gate: Gate, now: float) -> None:
    assert gate.enter()
    gate.leave(now)


# --- TTL -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ttl", [-1.0, 0.0, 10.0])
def test_ttl_does_not_count_before_the_first_use(wakes, ttl):
    gate = Gate(ttl, 100.0, wakes)
    assert gate.judge(1e9) == IDLE
    assert gate.enter()


def test_ttl_n_counts_from_the_end_of_the_last_call(gate):
    assert gate.enter()
    assert gate.judge(150.0) == IDLE  # in flight, however long
    gate.leave(200.0)
    assert gate.judge(200.0) == GateDecision(False, False, 10.0)
    assert gate.judge(209.0) == GateDecision(False, False, 1.0)
    use(gate, 209.5)
    assert gate.judge(211.0) == GateDecision(False, False, 8.5)
    assert gate.judge(219.4) == GateDecision(False, False, pytest.approx(0.1))
    assert gate.judge(219.5) == GateDecision(True, True, None)


def test_expiry_is_told_once_and_nothing_enters_after_it(gate):
    use(gate, 100.0)
    assert gate.judge(110.0).expired
    assert gate.judge(111.0) == GateDecision(False, True, None)
    assert not gate.enter()
    assert not gate.hold()
    assert gate.judge(112.0) == GateDecision(False, True, None)


def test_call_that_begins_before_the_verdict_wins(gate):
    use(gate, 100.0)
    assert gate.enter()  # the TTL runs out now, but the call is in flight
    assert gate.judge(110.0) == IDLE
    gate.leave(111.0)
    assert gate.judge(111.0) == GateDecision(False, False, 10.0)


def test_call_that_comes_after_the_verdict_is_turned_away(gate):
    use(gate, 100.0)
    assert gate.judge(110.0) == GateDecision(True, True, None)
    assert not gate.enter()


def test_overlapping_calls_count_from_the_last(gate):
    assert gate.enter() and gate.enter()
    gate.leave(100.0)
    assert gate.judge(120.0) == IDLE
    gate.leave(121.0)
    assert gate.judge(121.0).wait == 10.0


def test_times_out_of_order_never_shorten_a_ttl(gate):
    assert gate.enter() and gate.enter()
    gate.leave(105.0)
    gate.leave(103.0)
    assert gate.judge(105.0).wait == 10.0


def test_ttl_zero_closes_with_the_last_call(wakes):
    gate = Gate(0.0, 100.0, wakes)
    assert gate.enter() and gate.enter()
    gate.leave(101.0)
    assert gate.judge(101.0) == IDLE
    gate.leave(102.0)
    assert not gate.enter()  # closed there and then, not when somebody judges
    assert gate.judge(102.0) == GateDecision(True, True, None)
    assert gate.judge(102.0) == GateDecision(False, True, None)


def test_ttl_minus_one_stays(wakes):
    gate = Gate(-1.0, 100.0, wakes)
    use(gate, 101.0)
    assert gate.judge(1e9) == IDLE
    assert gate.enter()


def test_touch_counts_as_a_use(gate):
    use(gate, 100.0)
    assert gate.judge(109.0, touched=108.0) == GateDecision(False, False, 9.0)
    assert gate.judge(110.0) == GateDecision(False, False, 8.0)
    assert gate.judge(117.0, touched=50.0).wait == 1.0  # an old one does not turn time back
    assert gate.judge(118.0, touched=118.0) == GateDecision(False, False, 10.0)
    assert gate.judge(128.0).expired


# --- holds -----------------------------------------------------------------------------------------------


def test_hold_keeps_loaded_and_its_end_starts_the_ttl(gate):
    assert gate.hold()
    use(gate, 101.0)
    assert gate.judge(1000.0) == IDLE
    gate.unhold(1000.0)
    assert gate.judge(1000.0) == GateDecision(False, False, 10.0)
    assert gate.judge(1010.0).expired


def test_holds_nest(gate):
    assert gate.hold() and gate.hold()
    gate.unhold(101.0)
    assert gate.judge(500.0) == IDLE
    gate.unhold(501.0)
    assert gate.judge(511.0) == GateDecision(True, True, None)


def test_ttl_zero_within_a_hold(wakes):
    gate = Gate(0.0, 100.0, wakes)
    assert gate.hold()
    use(gate, 101.0)
    use(gate, 102.0)
    assert gate.judge(103.0) == IDLE
    gate.unhold(104.0)
    assert not gate.enter()
    assert gate.judge(104.0) == GateDecision(True, True, None)


# --- drain -----------------------------------------------------------------------------------------------


def test_drain_of_an_idle_gate(gate, wakes):
    gate.drain()
    assert wakes.count == 1
    assert gate.judge(100.0) == GateDecision(False, True, None)
    assert not gate.enter()
    assert not gate.hold()


def test_drain_waits_for_calls_and_admits_no_new_ones(gate):
    assert gate.enter()
    gate.drain()
    assert gate.judge(100.0) == IDLE
    assert not gate.enter()
    gate.leave(101.0)
    assert gate.judge(101.0) == GateDecision(False, True, None)


def test_drain_while_held_lets_calls_in_until_the_block_ends(gate):
    assert gate.hold()
    gate.drain()
    assert gate.judge(100.0) == IDLE
    use(gate, 101.0)  # the block that holds the model goes on using it
    assert not gate.hold()  # but no new block begins
    assert gate.judge(102.0) == IDLE
    gate.unhold(103.0)
    assert gate.judge(103.0) == GateDecision(False, True, None)
    assert not gate.enter()


def test_end_of_the_last_hold_closes_a_drain_although_calls_are_in_flight(gate):
    """Else callers who overlap keep it open for ever: nobody judges while something is in flight."""
    assert gate.hold()
    assert gate.enter()
    gate.drain()
    assert gate.judge(100.0) == IDLE
    gate.unhold(101.0)
    assert not gate.enter()
    gate.leave(102.0)
    assert gate.judge(102.0).drained


def test_drain_is_no_expiry(gate):
    use(gate, 100.0)
    gate.drain()
    assert gate.judge(200.0) == GateDecision(False, True, None)


def test_drain_after_expiry_tells_nothing_new(gate):
    use(gate, 100.0)
    assert gate.judge(110.0).expired
    gate.drain()
    assert gate.judge(111.0) == GateDecision(False, True, None)


# --- retime ----------------------------------------------------------------------------------------------


def test_retime_live(gate):
    use(gate, 100.0)
    gate.retime(50.0)
    assert gate.judge(110.0) == GateDecision(False, False, 40.0)
    gate.retime(-1.0)
    assert gate.judge(1000.0) == IDLE
    gate.retime(2000.0)
    assert gate.judge(1000.0) == GateDecision(False, False, 1100.0)
    gate.retime(5.0)
    assert gate.judge(1000.0) == GateDecision(True, True, None)


def test_retime_to_zero_unloads_an_idle_model(gate):
    use(gate, 100.0)
    gate.retime(0.0)
    assert gate.judge(100.0) == GateDecision(True, True, None)


def test_retime_does_not_reopen(gate):
    use(gate, 100.0)
    assert gate.judge(110.0).expired
    gate.retime(-1.0)
    assert not gate.enter()


# --- wakes -----------------------------------------------------------------------------------------------


def test_first_call_wakes_then_none_while_the_timer_is_armed(gate, wakes):
    use(gate, 101.0)
    assert wakes.count == 1
    assert gate.judge(101.0).wait == 10.0
    for n in range(1000):
        use(gate, 101.0 + n * 0.001)
    assert wakes.count == 1
    assert gate.judge(111.0).wait == pytest.approx(0.999)  # the timer fires early and is set again


def test_timer_that_fires_during_a_call_is_set_again_by_its_end(gate, wakes):
    use(gate, 101.0)
    gate.judge(101.0)
    assert gate.enter()
    assert gate.judge(111.0) == IDLE
    gate.leave(112.0)
    assert wakes.count == 2
    assert gate.judge(112.0).wait == 10.0


def test_no_wakes_without_a_ttl(wakes):
    gate = Gate(-1.0, 100.0, wakes)
    for n in range(100):
        use(gate, 101.0 + n)
    assert wakes.count == 0


def test_only_the_last_of_overlapping_calls_wakes(gate, wakes):
    for _ in range(5):
        assert gate.enter()
    for n in range(5):
        gate.leave(101.0 + n)
    assert wakes.count == 1


def test_ttl_zero_wakes_when_it_closes(wakes):
    gate = Gate(0.0, 100.0, wakes)
    use(gate, 101.0)
    assert wakes.count == 1


def test_last_call_of_a_drain_wakes(gate, wakes):
    assert gate.enter() and gate.enter()
    gate.drain()
    gate.judge(100.0)
    before = wakes.count
    gate.leave(101.0)
    assert wakes.count == before
    gate.leave(102.0)
    assert wakes.count == before + 1


def test_drain_and_retime_wake(gate, wakes):
    gate.retime(5.0)
    gate.drain()
    assert wakes.count == 2


def test_wake_is_called_outside_of_the_lock():
    gates = []
    gate = Gate(0.0, 0.0, lambda: gates[0].judge(5.0))  # would deadlock inside
    gates.append(gate)
    use(gate, 5.0)
    gate.drain()


# --- all together ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_random_walk(seed):
    """Against a plain model: what is admitted, when it closes, and that whoever sleeps is woken in time."""
    rng = random.Random(seed)
    for _ in range(60):
        walk(rng)


def walk(rng: random.Random) -> None:
    wakes = Wakes()
    now, ttl = 0.0, rng.choice([-1.0, 0.0, 3.0, 10.0])
    gate = Gate(ttl, now, wakes)
    calls = holds = 0
    last, used, draining, closed = 0.0, False, False, False
    expiries, seen, alarm = 0, 0, None

    def judge() -> None:
        nonlocal closed, expiries, seen, alarm
        seen = wakes.count
        due = used and not calls and not holds and ttl >= 0 and now >= last + ttl
        verdict = gate.judge(now)
        expiries += verdict.expired
        assert expiries <= 1
        if draining and not holds:
            closed = True
        elif not draining and due:
            closed = True
            assert expiries == 1
        assert verdict.drained == (closed and not calls)
        alarm = None if verdict.wait is None else now + verdict.wait

    for _ in range(200):
        now += rng.choice([0.0, 0.01, 1.0, 4.0])
        action = rng.randrange(7)
        if action in (0, 1):
            admitted = gate.enter()
            assert admitted == (not closed) or (ttl == 0 and used and not admitted)
            calls += admitted
            closed = closed or not admitted
        elif action == 2 and calls:
            calls -= 1
            gate.leave(now)
            last, used = now, True
            closed = closed or (draining and not holds)
        elif action == 3 and not (closed or draining):
            admitted = gate.hold()
            holds += admitted
            closed = closed or not admitted
        elif action == 4 and holds:
            holds -= 1
            gate.unhold(now)
            last, used = now, True
            closed = closed or (draining and not holds)
        elif action == 5 and rng.random() < 0.05:
            draining = True
            gate.drain()
        elif action == 6 and rng.random() < 0.2 and not closed:
            ttl = rng.choice([-1.0, 0.0, 3.0, 10.0])
            gate.retime(ttl)
        # The thread that judges: it runs when it is woken or its timer fires, and not else.
        if wakes.count > seen or (alarm is not None and now >= alarm):
            judge()
        idle = not calls and not holds
        if idle and used and not closed and not draining and ttl >= 0:
            assert alarm is not None and alarm <= last + ttl, "it would sleep through the TTL"
        if idle and (closed or draining):
            assert gate.judge(now).drained


def test_threads_hammer_while_a_drain_closes():
    """No call is admitted after closing, and the gate is drained only when none is in flight."""
    for _ in range(20):
        gate = Gate(-1.0, 0.0, lambda: None)
        inside, lock = [0], threading.Lock()
        begin = threading.Barrier(9)
        closed = threading.Event()
        broken: list[str] = []

        def hammer(gate=gate, inside=inside, lock=lock, begin=begin, closed=closed, broken=broken) -> None:
            begin.wait()
            for _ in range(100_000):
                late = closed.is_set()
                if not gate.enter():
                    return
                if late:
                    broken.append("a call was admitted after closing")
                with lock:
                    inside[0] += 1
                with lock:
                    inside[0] -= 1
                gate.leave(1.0)
            broken.append("never closed")

        threads = [threading.Thread(target=hammer) for _ in range(8)]
        for thread in threads:
            thread.start()
        begin.wait()
        gate.drain()
        gate.judge(1.0)
        closed.set()
        while not gate.judge(1.0).drained:
            pass
        with lock:
            assert inside[0] == 0
        for thread in threads:
            thread.join()
        assert not broken


def test_a_load_that_nobody_will_call_counts_as_a_use(gate):
    gate.retime(10.0, 105.0)
    assert gate.judge(106.0) == GateDecision(False, False, 9.0)
    gate.retime(10.0, 110.0)  # there was one
    assert gate.judge(115.0) == GateDecision(True, True, None)


def test_a_load_that_nobody_will_call_may_make_room(gate):
    gate.retime(-1.0, 105.0)
    gate.close_if_idle()
    assert gate.judge(106.0) == GateDecision(True, True, None)
    assert gate.reason == "evicted"
