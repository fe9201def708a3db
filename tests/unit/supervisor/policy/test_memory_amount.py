"""Amounts and limits of memory, by device where limits are."""

from __future__ import annotations

import pytest

from onnx_dl.supervisor.policy.memory_amount import NOTHING, UNLIMITED, MemoryAmount, placed

LIMIT = MemoryAmount(100, UNLIMITED, {0: 50, 1: 30})


@pytest.mark.parametrize(
    ("amount", "fits"),
    [
        (MemoryAmount(100, 999), True),
        (MemoryAmount(0, 80, {0: 50, 1: 30}), True),
        (MemoryAmount(0, 51, {0: 51}), False),
        (MemoryAmount(0, 31, {1: 31}), False),
        (MemoryAmount(0, 999, {2: 999}), True),  # a device without a limit
        (MemoryAmount(101), False),
    ],
)
def test_each_device_has_its_limit(amount: MemoryAmount, fits: bool) -> None:
    assert amount.fits(LIMIT) is fits


def test_arithmetic_is_by_device() -> None:
    one, other = MemoryAmount(1, 5, {0: 5}), MemoryAmount(2, 7, {0: 3, 1: 4})
    assert one + other == MemoryAmount(3, 12, {0: 8, 1: 4})
    assert other - one == MemoryAmount(1, 2, {0: -2, 1: 4})
    assert one.maximum(other) == MemoryAmount(2, 7, {0: 5, 1: 4})
    assert one.decayed(other) == MemoryAmount(2, 7, {0: 4, 1: 4})
    assert other.times(2) == MemoryAmount(4, 14, {0: 6, 1: 8})
    assert sum([one, other], NOTHING) == one + other


def test_what_is_left_of_a_limit_is_a_limit() -> None:
    left = LIMIT - MemoryAmount(10, 99, {0: 60, 2: 39})
    assert left.devices == {0: -10, 1: 30}  # a device that had none gets none
    assert left.maximum(NOTHING).devices == {0: 0, 1: 30}
    assert not MemoryAmount(0, 1, {0: 1}).fits(left.maximum(NOTHING))


def test_an_amount_is_reduced_to_a_limit() -> None:
    amount = MemoryAmount(200, 100, {0: 70, 2: 30})
    assert amount.minimum(LIMIT) == MemoryAmount(100, 80, {0: 50, 2: 30})
    assert amount.minimum(MemoryAmount(UNLIMITED, 60)) == MemoryAmount(200, 60, {0: 70, 2: 30})


def test_excess_is_of_what_is_limited() -> None:
    over = MemoryAmount(120, 80, {0: 40, 1: 31, 2: 9}).over(LIMIT)
    assert (over.ram, over.devices, over.is_nothing) == (20, {0: -10, 1: 1}, False)
    assert MemoryAmount(-1, 0, {0: 0}).is_nothing


@pytest.mark.parametrize(
    ("nbytes", "measured", "numbers", "expected"),
    [
        (9, {}, {1}, {1: 9}),
        (9, {0: 2, 1: 7}, {1}, {1: 9}),  # what lies elsewhere counts on the device that is named
        (9, {0: 2, 1: 7}, {0, 1}, {0: 2, 1: 7}),
        (9, {1: 7}, {0, 1}, {0: 2, 1: 7}),
        (9, {0: 4, 1: 7}, {0, 1}, {0: 4, 1: 7}),
        (9, {3: 9}, {1, 2}, {1: 9, 2: 0}),
        (9, {0: 9}, set(), {}),
        (0, {}, {0}, {}),
    ],
)
def test_memory_counts_where_the_options_say(
    nbytes: int, measured: dict[int, int], numbers: set[int], expected: dict[int, int]
) -> None:
    assert placed(nbytes, measured, numbers) == expected


def test_figures_are_near_if_they_are_so_on_each_device() -> None:
    assert MemoryAmount(100, 100, {0: 100}).is_near(MemoryAmount(101, 102, {0: 98}))
    assert not MemoryAmount(100, 100, {0: 100}).is_near(MemoryAmount(100, 100, {1: 100}))


def test_amounts_can_be_members_of_sets() -> None:
    assert len({MemoryAmount(1, 2, {0: 2}), MemoryAmount(1, 2, {0: 2}), MemoryAmount(1, 2, {1: 2})}) == 2
