"""Who makes way for whom."""

from __future__ import annotations

import random

import pytest

from onnx_dl.supervisor.room import Answer, Candidate, decide, guess

MB = 1 << 20


def idle(
    worker_id: int, mb: int, idle_for: float = 1.0, seconds: float = 1.0, priority: int = 0
) -> Candidate:
    return Candidate(worker_id, mb * MB, idle_for, seconds, priority)


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
    assert decide(need * MB, limit and limit * MB, counted * MB, leaving * MB, candidates) == expected


def test_whoever_goes_is_enough_and_none_of_them_is_spare():
    rng = random.Random(0)
    for _ in range(2000):
        candidates = [
            idle(i, rng.randrange(1, 200), rng.random() * 10, rng.random(), rng.randrange(2))
            for i in range(6)
        ]
        counted = sum(c.nbytes for c in candidates) + rng.randrange(200) * MB
        need, limit, leaving = rng.randrange(1, 500) * MB, 600 * MB, rng.randrange(100) * MB
        answer, chosen = decide(need, limit, counted, leaving, candidates)
        sizes = {c.worker_id: c.nbytes for c in candidates}
        left = counted - leaving - sum(sizes[i] for i in chosen) + need
        if answer is Answer.EVICT:
            assert left <= limit
            assert all(left + sizes[i] > limit for i in chosen)
        elif answer is Answer.WAIT:
            everything = counted - leaving - sum(sizes.values()) + need
            assert counted - leaving + need <= limit or everything > limit


def test_a_guess_grows_with_the_files_and_refuses_nobody_who_may_fit():
    assert guess(0, None) < guess(100 * MB, None) < guess(200 * MB, None)
    assert guess(100 * MB, 200 * MB) == 200 * MB < guess(100 * MB, None)
    assert guess(200 * MB, 200 * MB) > 200 * MB
