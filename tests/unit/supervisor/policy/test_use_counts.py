"""How often models were used lately."""

from __future__ import annotations

import pytest

from onnx_dl.supervisor.policy import use_counts
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
