"""What was measured of a model, and what that says of its next load."""

from __future__ import annotations

import msgspec
import pytest

from onnx_dl.core.status import Usage
from onnx_dl.supervisor.policy.memory_amount import UNLIMITED, MemoryAmount
from onnx_dl.supervisor.policy.requirements import (
    Peak,
    Requirement,
    RequirementHistory,
    decayed,
    grown,
    loaded,
    outgrown,
    requirement_key,
)

MB = 1 << 20
LIMIT = MemoryAmount(200 * MB, 100 * MB)


def used(pss: int, peak: int = 0, gpu: int | None = None) -> Usage:
    return Usage(pss=pss * MB, peak=peak * MB, gpu=None if gpu is None else gpu * MB)


def need(load: int, steady: int, peak: int, gpu: int = 0, gpu_peak: int = 0) -> Requirement:
    return Requirement(
        load=Peak(load * MB),
        steady=MemoryAmount(steady * MB, gpu * MB),
        peak=MemoryAmount(peak * MB, gpu_peak * MB),
    )


def test_the_first_load_tells_what_the_next_one_needs() -> None:
    known = loaded(None, used(40, 90, gpu=30))
    assert known == need(90, 40, 40, 30, 30)
    assert known.in_use(LIMIT) == MemoryAmount(40 * MB, 30 * MB)


def test_runs_may_take_more_than_the_load() -> None:
    known = grown(loaded(None, used(40, 90)), used(50, 120, gpu=7))
    assert known == need(90, 40, 120, 0, 7)
    assert known.in_use(LIMIT) == MemoryAmount(120 * MB, 7 * MB)
    assert grown(known, used(45, 60)) == known


def test_more_counts_at_once_and_less_by_half_of_the_way() -> None:
    known = need(100, 40, 300)
    assert decayed(known, MemoryAmount(100 * MB)).peak.ram == 200 * MB
    assert decayed(known, MemoryAmount(400 * MB)).peak.ram == 400 * MB
    assert loaded(known, used(80, 60)) == need(90, 80, 300)
    for _ in range(20):
        known = decayed(known, MemoryAmount(50 * MB))
    assert known.peak.ram == pytest.approx(50 * MB, rel=0.01)
    assert (
        decayed(known, MemoryAmount()).peak == known.steady
    )  # never less than it takes when it does nothing


def test_only_what_changed_is_news() -> None:
    known = need(100, 40, 300)
    assert known.differs(None)
    assert not need(103, 41, 310).differs(known)
    assert need(110, 40, 300).differs(known)
    assert need(100, 44, 300).differs(known)
    assert need(100, 40, 270).differs(known)
    assert need(100, 40, 300, gpu=1).differs(known)
    assert not msgspec.structs.replace(known, at=80_000.0).differs(known)
    assert msgspec.structs.replace(known, at=90_000.0).differs(known)


def test_what_this_host_measured_counts_before_what_others_did() -> None:
    history = RequirementHistory({"a": need(1, 1, 1), "b": need(2, 2, 2)}.get)
    history.note("a", need(9, 9, 9))
    assert (history.of("a"), history.of("b")) == (need(9, 9, 9), need(2, 2, 2))
    assert history.of("c") is None


def test_news_is_told_once() -> None:
    history = RequirementHistory({"a": need(10, 10, 10)}.get)
    history.note("a", need(10, 10, 10))
    assert history.to_store("a", 5.0) is None  # the store has it
    history.note("a", need(20, 10, 20))
    told = history.to_store("a", 6.0)
    assert told is not None and (told.load, told.at) == (Peak(20 * MB), 6.0)
    assert history.to_store("a", 7.0) is None
    assert history.to_store("never measured", 7.0) is None


def test_a_host_that_sees_many_models_does_not_grow_for_ever() -> None:
    history = RequirementHistory({}.get)
    for i in range(5000):
        history.note(str(i), need(i, i, i))
    assert history.of("0") is None and history.of("4999") is not None


def test_a_group_is_known_by_its_members() -> None:
    """Another program may have a group of the same name."""
    assert requirement_key("m", []) == "m"
    assert requirement_key("group:g", ["a", "b"]) == requirement_key("group:g", ["b", "a"])
    assert requirement_key("group:g", ["a", "b"]) != requirement_key("group:g", ["a", "c"])


def test_sums() -> None:
    assert sum([MemoryAmount(1, 2), MemoryAmount(3, 4)], MemoryAmount()) == MemoryAmount(4, 6)
    assert MemoryAmount(5, 1) - MemoryAmount(1, 5) == MemoryAmount(4, -4)
    assert MemoryAmount(1, 9).maximum(MemoryAmount(2, 3)) == MemoryAmount(2, 9) and MemoryAmount(
        1, 9
    ).minimum(MemoryAmount(2, 3)) == MemoryAmount(1, 3)
    assert MemoryAmount(10**15, 10**15).fits(MemoryAmount(UNLIMITED, UNLIMITED))


# --- loads in two ways, and those that were ended ----------------------------------------------------------


def test_loads_from_the_load_cache_are_known_apart() -> None:
    known = loaded(None, used(40, 90), "ab12")
    assert (known.load, known.mapped, known.entry) == (Peak(90 * MB), Peak(), "ab12")
    known = loaded(known, used(30, 50), "ab12", mapped=True)
    assert (known.load, known.mapped) == (Peak(90 * MB), Peak(50 * MB))
    assert known.differs(loaded(None, used(40, 90), "ab12"))


def test_a_load_that_takes_much_the_same_is_the_same() -> None:
    """So that what just fits is not refused for a thousandth the next time."""
    known = loaded(None, used(40, 100))
    assert loaded(known, used(40, 104)).load == loaded(known, used(40, 97)).load == known.load
    assert loaded(known, used(40, 110)).load == Peak(110 * MB)


def test_a_load_that_was_ended_needs_more() -> None:
    known = outgrown(None, 90 * MB)
    assert known.load == Peak(90 * MB, ended=True) and not known.load.is_measured and not known.is_loaded
    assert known.differs(need(90, 0, 0)) and outgrown(None, 120 * MB).differs(known)
    assert loaded(known, used(40, 200)).load == Peak(200 * MB)
    assert outgrown(need(1, 2, 3), 9, mapped=True).load == Peak(MB)


@pytest.mark.parametrize(
    ("known", "there_is", "could"),
    [
        (need(90, 40, 60), MemoryAmount(90 * MB), True),
        (need(90, 40, 60), MemoryAmount(89 * MB), False),
        (need(9, 40, 60), MemoryAmount(59 * MB), False),
        (outgrown(None, 1 << 49), MemoryAmount(1 << 40), False),
        (need(9, 9, 9, gpu_peak=8), MemoryAmount(1 << 40, 7 * MB), False),
    ],
)
def test_what_cannot_have_been_measured_here(known: Requirement, there_is: MemoryAmount, could: bool) -> None:
    assert known.could_be(there_is) is could
