"""Who makes way for whom."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest

from onnx_dl.supervisor.policy.eviction import (
    Candidate,
    Guess,
    LoadPlan,
    RefusedLoad,
    Verdict,
    decide,
    guess,
    plan,
    refusal,
)
from onnx_dl.supervisor.policy.memory_amount import NOTHING, UNLIMITED, MemoryAmount
from onnx_dl.supervisor.policy.requirements import Peak, Requirement

MB = 1 << 20


def idle(
    worker_id: int,
    mb: int,
    idle_for: float = 1.0,
    seconds: float = 1.0,
    priority: int = 0,
    uses: float = 1.0,
) -> Candidate:
    return Candidate(worker_id, MemoryAmount(mb * MB), idle_for, seconds, priority, uses)


def gpu(worker_id: int, ram: int, vram: int, idle_for: float = 1.0) -> Candidate:
    return Candidate(worker_id, MemoryAmount(ram, vram), idle_for, 1.0)


@pytest.mark.parametrize(
    ("need", "limit", "counted", "leaving", "candidates", "expected"),
    [
        (500, None, 10_000, 0, [], (Verdict.LOAD, [])),
        (100, 400, 300, 0, [], (Verdict.LOAD, [])),
        (101, 400, 300, 0, [], (Verdict.WAIT, [])),
        (401, 400, 0, 0, [], (Verdict.WAIT, [])),
        (400, 400, 0, 0, [], (Verdict.LOAD, [])),
        (150, 400, 300, 150, [], (Verdict.WAIT, [])),  # who leaves is enough
        (150, 400, 300, 0, [idle(1, 150)], (Verdict.EVICT, [1])),
        (150, 400, 300, 40, [idle(1, 10), idle(2, 150)], (Verdict.EVICT, [2])),  # cheaper per byte
        (
            250,
            400,
            300,
            0,
            [idle(1, 100)],
            (Verdict.WAIT, []),
        ),  # all of them are not: nobody goes for nothing
        (150, 400, 300, 0, [idle(1, 150, 5), idle(2, 150, 50)], (Verdict.EVICT, [2])),
        (150, 400, 300, 0, [idle(1, 150, 5, 9), idle(2, 150, 5, 1)], (Verdict.EVICT, [2])),
        (150, 400, 300, 0, [idle(1, 150, 5, uses=3), idle(2, 150, 1)], (Verdict.EVICT, [2])),
        (150, 400, 300, 0, [idle(1, 150, 300, uses=9), idle(2, 150, 1)], (Verdict.EVICT, [1])),  # long ago
        (150, 400, 300, 0, [idle(1, 150, 1e6), idle(2, 150, 2e6, 9)], (Verdict.EVICT, [2])),
        (150, 400, 300, 0, [idle(1, 150, 500, 0.1, 1), idle(2, 150, 1, 9, 0)], (Verdict.EVICT, [2])),
        (
            150,
            400,
            300,
            0,
            [idle(1, 20, 500), idle(2, 150, 5)],
            (Verdict.EVICT, [2]),
        ),  # the small one need not
    ],
)
def test_decisions(
    need: int, limit: int | None, counted: int, leaving: int, candidates: list, expected: tuple
):
    most = MemoryAmount(UNLIMITED if limit is None else limit * MB, UNLIMITED)
    assert (
        decide(
            MemoryAmount(need * MB), most, MemoryAmount(counted * MB), MemoryAmount(leaving * MB), candidates
        )
        == expected
    )


@pytest.mark.parametrize(
    ("need", "counted", "leaving", "candidates", "expected"),
    [
        (MemoryAmount(10, 10), MemoryAmount(50, 50), NOTHING, [], (Verdict.LOAD, [])),
        (MemoryAmount(10, 101), NOTHING, NOTHING, [], (Verdict.WAIT, [])),
        (MemoryAmount(101, 10), NOTHING, NOTHING, [], (Verdict.WAIT, [])),
        # Only what frees the kind that is missing goes, however long the other was idle.
        (
            MemoryAmount(10, 60),
            MemoryAmount(60, 60),
            NOTHING,
            [gpu(1, 50, 0, 900), gpu(2, 10, 60)],
            (Verdict.EVICT, [2]),
        ),
        (
            MemoryAmount(60, 0),
            MemoryAmount(60, 90),
            NOTHING,
            [gpu(1, 0, 90, 900), gpu(2, 30, 0)],
            (Verdict.EVICT, [2]),
        ),
        # Both are missing, and nobody has both.
        (
            MemoryAmount(60, 60),
            MemoryAmount(60, 60),
            NOTHING,
            [gpu(1, 50, 0), gpu(2, 10, 60)],
            (Verdict.EVICT, [1, 2]),
        ),
        # One frees both, so the other need not go.
        (
            MemoryAmount(60, 60),
            MemoryAmount(60, 60),
            NOTHING,
            [gpu(1, 30, 0, 900), gpu(2, 30, 60)],
            (Verdict.EVICT, [2]),
        ),
        # Enough of one kind leaves; for the other, somebody must.
        (
            MemoryAmount(60, 60),
            MemoryAmount(60, 60),
            MemoryAmount(40, 0),
            [gpu(1, 20, 0), gpu(2, 0, 30)],
            (Verdict.EVICT, [2]),
        ),
        (MemoryAmount(0, 60), MemoryAmount(0, 60), NOTHING, [gpu(1, 50, 10)], (Verdict.WAIT, [])),
    ],
)
def test_two_kinds_of_memory(
    need: MemoryAmount, counted: MemoryAmount, leaving: MemoryAmount, candidates: list, expected: tuple
) -> None:
    answer, chosen = decide(need, MemoryAmount(100, 100), counted, leaving, candidates)
    assert (answer, sorted(chosen)) == expected


def test_whoever_goes_is_enough_and_none_of_them_is_spare():
    rng = random.Random(0)
    limit, seen = MemoryAmount(600, 300), set()

    def some(most: int) -> MemoryAmount:
        return MemoryAmount(rng.randrange(most), rng.choice([0, rng.randrange(most // 2)]))

    for _ in range(4000):
        candidates = [
            Candidate(i, some(200), rng.random() * 10, rng.random(), rng.randrange(2)) for i in range(6)
        ]
        held = {c.worker_id: c.held for c in candidates}
        everything = sum(held.values(), NOTHING)
        counted, need, leaving = everything + some(200), some(700), some(100)
        answer, chosen = decide(need, limit, counted, leaving, candidates)
        seen.add(answer)
        left = counted - leaving - sum((held[i] for i in chosen), NOTHING) + need
        if answer is Verdict.EVICT:
            assert left.fits(limit)
            assert all(not (left + held[i]).fits(limit) for i in chosen)
        elif answer is Verdict.WAIT:
            assert left.fits(limit) or not (left - everything).fits(limit)
    assert seen == set(Verdict)


def test_a_guess_grows_with_the_files():
    sizes = [guess(mb * MB, on_gpu) for on_gpu in (False, True) for mb in (0, 100, 200)]
    cpu, gpus = sizes[:3], sizes[3:]
    assert [g.likely.ram for g in cpu] == sorted({g.likely.ram for g in cpu})
    assert all(g.least.ram <= g.likely.ram and g.likely.gpu == 0 for g in cpu)
    assert [g.likely.gpu for g in gpus] == sorted({g.likely.gpu for g in gpus})


# --- terms of a load ---------------------------------------------------------------------------------------

LEFT = MemoryAmount(200, 100)
GUESS = Guess(MemoryAmount(50), MemoryAmount(150, 40))


def known(load: int = 0, steady: int = 0, peak: int = 0, **more: Any) -> Requirement:
    return Requirement(load=Peak(load), steady=MemoryAmount(steady), peak=MemoryAmount(peak), **more)


@pytest.mark.parametrize(
    ("measured", "guessed", "saved", "expected"),
    [
        # What was never measured: a guess, all there is, or what it takes at least.
        (None, GUESS, False, LoadPlan(MemoryAmount(150, 40))),
        (None, Guess(MemoryAmount(50), MemoryAmount(300, 400)), False, LoadPlan(MemoryAmount(200, 100))),
        (None, Guess(MemoryAmount(210), MemoryAmount(300)), False, LoadPlan(MemoryAmount(210))),
        # What was measured counts, more or less.
        (known(180, 60, 70), GUESS, False, LoadPlan(MemoryAmount(180), True)),
        (known(300, 60, 70), GUESS, False, LoadPlan(MemoryAmount(300), True)),
        # Runs alone refuse nobody.
        (known(60, 50, 500), GUESS, False, LoadPlan(MemoryAmount(200), True)),
        # From the load cache, which takes what the model holds, also before the first such load.
        (known(180, 60, 70, mapped=Peak(90)), GUESS, True, LoadPlan(MemoryAmount(90), True, True)),
        (known(180, 60, 70, mapped=Peak(90)), GUESS, False, LoadPlan(MemoryAmount(180), True)),
        (known(180, 60, 70), GUESS, True, LoadPlan(MemoryAmount(70), False, True)),
        (known(300, 60, 70), GUESS, True, LoadPlan(MemoryAmount(70), False, True)),
        (known(300, 60, 70, mapped=Peak(90, True)), GUESS, True, LoadPlan(MemoryAmount(91), False, True)),
        (known(0, 60, 70, mapped=Peak(90)), GUESS, False, LoadPlan(MemoryAmount(150, 40))),
    ],
)
def test_terms(measured: Requirement | None, guessed: Guess, saved: bool, expected: LoadPlan) -> None:
    assert plan(measured, guessed, LEFT, saved=saved) == expected


def test_weights_of_a_model_on_a_gpu_pass_through_memory_while_they_are_mapped() -> None:
    """It does not hold them in RAM, so what it held when it was ready says nothing about its load."""
    guessed = Guess(MemoryAmount(80), MemoryAmount(150, 40))
    on_gpu = Requirement(load=Peak(170), steady=MemoryAmount(60, 30), peak=MemoryAmount(60, 30))
    assert plan(on_gpu, guessed, LEFT, saved=True) == LoadPlan(MemoryAmount(140, 30), False, True)
    large = Guess(MemoryAmount(500), MemoryAmount(900, 40))  # no reason to refuse it
    assert plan(on_gpu, large, LEFT, saved=True) == LoadPlan(MemoryAmount(LEFT.ram, 30), False, True)
    measured = msgspec.structs.replace(on_gpu, mapped=Peak(70))
    assert plan(measured, guessed, LEFT, saved=True) == LoadPlan(MemoryAmount(70, 30), True, True)


@pytest.mark.parametrize(("had", "needs"), [(120, 150), (160, 161), (205, 206)])
def test_one_that_was_ended_needs_more_than_it_had(had: int, needs: int) -> None:
    assert plan(Requirement(load=Peak(had, ended=True)), GUESS, LEFT, saved=True) == LoadPlan(
        MemoryAmount(needs, 40)
    )


def test_a_load_may_take_what_was_promised_or_what_is_free():
    assert LoadPlan(MemoryAmount(100)).bound(150) == 150
    assert LoadPlan(MemoryAmount(100)).bound(50) == 100
    assert LoadPlan(MemoryAmount(100), measured=True).bound(50) == 105


@pytest.mark.parametrize(
    ("need", "in_use", "resource", "told"),
    [
        (MemoryAmount(101, 1), NOTHING, "memory", "is more than the limit of 0.0 MB"),
        (MemoryAmount(1, 101), NOTHING, "gpu memory", "Raise gpu_memory_limit, or run"),
        (MemoryAmount(50, 1), MemoryAmount(60, 0), "memory", "within 5 seconds"),
        (
            MemoryAmount(50, 50),
            MemoryAmount(0, 60),
            "gpu memory",
            "of GPU memory, which did not become free within 5",
        ),
    ],
)
def test_a_refusal_tells_which_memory(
    need: MemoryAmount, in_use: MemoryAmount, resource: str, told: str
) -> None:
    error = refusal(RefusedLoad("m.onnx", need, MemoryAmount(100, 100), in_use), 5.0)
    assert error.resource == resource and told in str(error)
    kind = "ram" if resource == "memory" else "gpu"
    assert (error.needed, error.in_use) == (getattr(need, kind), getattr(in_use, kind))


@pytest.mark.parametrize(
    ("case", "told"),
    [
        (
            RefusedLoad(
                "m", MemoryAmount(421 * MB), MemoryAmount(300 * MB), NOTHING, size=MemoryAmount(200 * MB)
            ),
            "m needs about 441.5 MB to load (and 209.7 MB once it is loaded), which is more than the limit",
        ),
        (
            RefusedLoad(
                "m", MemoryAmount(201 * MB), MemoryAmount(200 * MB), NOTHING, file_bytes=90 * MB, ended=True
            ),
            "m needs more than 210.8 MB to load (its worker was ended at this size; its files have 94.4 MB)",
        ),
        (
            RefusedLoad(
                "m",
                MemoryAmount(100 * MB),
                MemoryAmount(200 * MB),
                MemoryAmount(150 * MB),
                stays=MemoryAmount(110 * MB),
            ),
            "more than pinned models leave of the limit of 209.7 MB (they hold 115.3 MB; 157.3 MB are in",
        ),
    ],
)
def test_a_refusal_has_all_figures(case: RefusedLoad, told: str) -> None:
    error = refusal(case, 5.0)
    assert told in str(error)
    assert (error.needed, error.limit, error.size) == (case.need.ram, case.limit.ram, case.size.ram)
