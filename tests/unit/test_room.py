"""Who makes way for whom."""

from __future__ import annotations

import random

import pytest

from onnx_dl.supervisor.needs import NOTHING, UNLIMITED, Bytes
from onnx_dl.supervisor.room import Answer, Candidate, decide, guess, refusal

MB = 1 << 20


def idle(
    worker_id: int, mb: int, idle_for: float = 1.0, seconds: float = 1.0, priority: int = 0
) -> Candidate:
    return Candidate(worker_id, Bytes(mb * MB), idle_for, seconds, priority)


def gpu(worker_id: int, ram: int, vram: int, idle_for: float = 1.0) -> Candidate:
    return Candidate(worker_id, Bytes(ram, vram), idle_for, 1.0)


@pytest.mark.parametrize(
    ("need", "limit", "counted", "leaving", "candidates", "expected"),
    [
        (500, None, 10_000, 0, [], (Answer.LOAD, [])),
        (100, 400, 300, 0, [], (Answer.LOAD, [])),
        (101, 400, 300, 0, [], (Answer.WAIT, [])),
        (401, 400, 0, 0, [], (Answer.NEVER, [])),
        (400, 400, 0, 0, [], (Answer.LOAD, [])),
        (150, 400, 300, 150, [], (Answer.WAIT, [])),  # who leaves is enough
        (150, 400, 300, 0, [idle(1, 150)], (Answer.EVICT, [1])),
        (150, 400, 300, 40, [idle(1, 10), idle(2, 150)], (Answer.EVICT, [2])),  # cheaper per byte
        (250, 400, 300, 0, [idle(1, 100)], (Answer.WAIT, [])),  # all of them are not: nobody goes for nothing
        (150, 400, 300, 0, [idle(1, 150, 5), idle(2, 150, 50)], (Answer.EVICT, [2])),
        (150, 400, 300, 0, [idle(1, 150, 5, 9), idle(2, 150, 5, 1)], (Answer.EVICT, [2])),
        (150, 400, 300, 0, [idle(1, 150, 500, 0.1, 1), idle(2, 150, 1, 9, 0)], (Answer.EVICT, [2])),
        (
            150,
            400,
            300,
            0,
            [idle(1, 20, 500), idle(2, 150, 5)],
            (Answer.EVICT, [2]),
        ),  # the small one need not
    ],
)
def test_decisions(
    need: int, limit: int | None, counted: int, leaving: int, candidates: list, expected: tuple
):
    most = Bytes(UNLIMITED if limit is None else limit * MB, UNLIMITED)
    assert decide(Bytes(need * MB), most, Bytes(counted * MB), Bytes(leaving * MB), candidates) == expected


@pytest.mark.parametrize(
    ("need", "counted", "leaving", "candidates", "expected"),
    [
        (Bytes(10, 10), Bytes(50, 50), NOTHING, [], (Answer.LOAD, [])),
        (Bytes(10, 101), NOTHING, NOTHING, [], (Answer.NEVER, [])),
        (Bytes(101, 10), NOTHING, NOTHING, [], (Answer.NEVER, [])),
        # Only what frees the kind that is missing goes, however long the other was idle.
        (Bytes(10, 60), Bytes(60, 60), NOTHING, [gpu(1, 50, 0, 900), gpu(2, 10, 60)], (Answer.EVICT, [2])),
        (Bytes(60, 0), Bytes(60, 90), NOTHING, [gpu(1, 0, 90, 900), gpu(2, 30, 0)], (Answer.EVICT, [2])),
        # Both are missing, and nobody has both.
        (Bytes(60, 60), Bytes(60, 60), NOTHING, [gpu(1, 50, 0), gpu(2, 10, 60)], (Answer.EVICT, [1, 2])),
        # One frees both, so the other need not go.
        (Bytes(60, 60), Bytes(60, 60), NOTHING, [gpu(1, 30, 0, 900), gpu(2, 30, 60)], (Answer.EVICT, [2])),
        # Enough of one kind leaves; for the other, somebody must.
        (Bytes(60, 60), Bytes(60, 60), Bytes(40, 0), [gpu(1, 20, 0), gpu(2, 0, 30)], (Answer.EVICT, [2])),
        (Bytes(0, 60), Bytes(0, 60), NOTHING, [gpu(1, 50, 10)], (Answer.WAIT, [])),
    ],
)
def test_two_kinds_of_memory(
    need: Bytes, counted: Bytes, leaving: Bytes, candidates: list, expected: tuple
) -> None:
    answer, chosen = decide(need, Bytes(100, 100), counted, leaving, candidates)
    assert (answer, sorted(chosen)) == expected


def test_whoever_goes_is_enough_and_none_of_them_is_spare():
    rng = random.Random(0)
    limit, seen = Bytes(600, 300), set()

    def some(most: int) -> Bytes:
        return Bytes(rng.randrange(most), rng.choice([0, rng.randrange(most // 2)]))

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
        if answer is Answer.EVICT:
            assert left.fits(limit)
            assert all(not (left + held[i]).fits(limit) for i in chosen)
        elif answer is Answer.WAIT:
            assert left.fits(limit) or not (left - everything).fits(limit)
    assert seen == set(Answer)


def test_a_guess_grows_with_the_files_and_refuses_nobody_who_may_fit():
    unlimited, most = Bytes(UNLIMITED, UNLIMITED), Bytes(200 * MB, 400 * MB)
    assert guess(0, unlimited).ram < guess(100 * MB, unlimited).ram < guess(200 * MB, unlimited).ram
    assert guess(100 * MB, most).ram == 200 * MB < guess(100 * MB, unlimited).ram
    assert guess(200 * MB, most).ram > 200 * MB
    assert guess(100 * MB, unlimited).gpu == 0
    assert guess(0, unlimited, True).gpu < guess(100 * MB, unlimited, True).gpu
    assert guess(100 * MB, most, True).gpu == 400 * MB


@pytest.mark.parametrize(
    ("need", "in_use", "resource", "told"),
    [
        (Bytes(101, 1), NOTHING, "memory", "is more than the limit of 0.0 MB"),
        (Bytes(1, 101), NOTHING, "gpu memory", "Raise gpu_memory_limit, or run"),
        (Bytes(50, 1), Bytes(60, 0), "memory", "within 5 seconds"),
        (Bytes(50, 50), Bytes(0, 60), "gpu memory", "of GPU memory, which did not become free within 5"),
    ],
)
def test_a_refusal_tells_which_memory(need: Bytes, in_use: Bytes, resource: str, told: str) -> None:
    error = refusal("m.onnx", need, Bytes(100, 100), in_use, 5.0)
    assert error.resource == resource and told in str(error)
    kind = "ram" if resource == "memory" else "gpu"
    assert (error.needed, error.in_use) == (getattr(need, kind), getattr(in_use, kind))
