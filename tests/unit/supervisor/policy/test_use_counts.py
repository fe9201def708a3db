"""How often models were used lately."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from onnx_dl.supervisor.policy import use_counts
from onnx_dl.supervisor.policy.eviction import Candidate
from onnx_dl.supervisor.policy.memory_amount import MemoryAmount
from onnx_dl.supervisor.policy.use_counts import UseCounts


def test_calls_between_two_loads_are_one_use() -> None:
    counts = UseCounts()
    counts.note_load("a", 1.0)
    for at in (1.1, 1.2, 1.3):  # of the load that it was loaded for
        counts.note_use("a", at)
    assert counts.of("a") == 1.0
    counts.note_load("b", 2.0)
    for at in (2.1, 2.2, 2.2):
        counts.note_use("a", at)
    assert counts.of("a") == pytest.approx(1.9) and counts.of("b") == 1.0


def test_a_use_that_was_noted_before_is_none() -> None:
    counts = UseCounts()
    counts.note_use("a", 1.0)
    counts.note_load("b", 2.0)
    counts.note_use("a", 1.0)
    assert counts.of("a") == pytest.approx(0.9)


def test_loads_make_a_count_fade() -> None:
    counts = UseCounts()
    for at in range(30):
        counts.note_load("a", float(at))
    before = counts.of("a")
    assert 9.0 < before < 10.0  # the limit of the sum
    for at in range(30, 60):
        counts.note_load("b", float(at))
    assert counts.of("a") == pytest.approx(before * 0.9**30) and counts.of("b") > 9.0


def test_the_models_used_least_recently_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(use_counts, "_REMEMBERED", 2)
    counts = UseCounts()
    for at, key in enumerate("aabac"):
        counts.note_load(key, float(at))
    assert counts.of("a") > 2.0  # "b" is forgotten
    assert counts.of("b") == 1.0 and counts.of("c") == 1.0


def share_of_hits(order: Sequence[int], room: int, *, counted: bool) -> float:
    """Share of requests that find their model loaded, where equal models make way by their rank."""
    counts, used_at, hits = UseCounts(), dict[int, float](), 0
    loaded: set[int] = set()
    for now, model in enumerate(order, start=1):
        at = float(now)
        if model in loaded:
            hits += 1
        else:
            for each in loaded:
                counts.note_use(str(each), used_at[each])
            ranks = {
                each: Candidate(
                    each,
                    MemoryAmount(1),
                    idle_for=at - used_at[each],
                    seconds=1.0,
                    uses=counts.of(str(each)) if counted else 1.0,
                ).rank(MemoryAmount(1))
                for each in loaded
            }
            if len(loaded) == room:
                loaded.remove(min(loaded, key=ranks.__getitem__))
            counts.note_load(str(model), at)
            loaded.add(model)
        used_at[model] = at + 0.5
    return hits / len(order)


def zipf(seed: int) -> list[int]:
    weights = [each**-1.1 for each in range(1, 9)]
    return random.Random(seed).choices(range(8), weights, k=300)


def test_counts_find_the_popular_models() -> None:
    """Requests for eight models by Zipf's law: the least recently used one goes, or the least often used."""
    for room in (2, 3):
        traces = [zipf(seed) for seed in range(10)]
        gains = [share_of_hits(t, room, counted=True) - share_of_hits(t, room, counted=False) for t in traces]
        assert min(gains) > 0.0 and sum(gains) / len(gains) > 0.05


def test_models_that_became_popular_replace_those_that_were() -> None:
    order = [*([0, 1, 2] * 30), *([5, 6, 7] * 30)]
    assert share_of_hits(order, 3, counted=True) > 0.75
