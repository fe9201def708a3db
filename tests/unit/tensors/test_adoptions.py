"""Which blocks of others a peer knows, and which go when."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from onnx_dl.tensors import segment
from onnx_dl.tensors.adoptions import MOST
from onnx_dl.tensors.arena import Arena, NoPeer
from onnx_dl.tensors.block import Block
from tests.support.builders import arena


@pytest.fixture(autouse=True)
def descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks keep theirs."""
    monkeypatch.setattr(segment, "KEPT_DESCRIPTORS", 2 * MOST)


def blocks(count: int) -> tuple[Arena, list[Block]]:
    """Of another arena, whose owner keeps them."""
    other = Arena(NoPeer(), keep_descriptors=True)
    return other, [block for _ in range(count) if (block := other.take(1000))]


def test_a_block_has_one_number_for_as_long_as_it_is_known():
    mine, _ = arena()
    _, (one, two) = blocks(2)
    first = mine.adoptions.number(one)
    assert mine.adoptions.number(two) != first
    assert mine.adoptions.number(one) == first
    assert mine.adoptions.nbytes == one.size + two.size
    mine.trim()
    assert mine.adoptions.nbytes == 0
    assert mine.adoptions.number(one) not in (None, first), "a number is never given twice"


def test_what_its_owner_lets_go_is_dropped_with_the_next_message():
    mine, peer = arena()
    other, (one, two) = blocks(2)
    numbers = mine.adoptions.number(one), mine.adoptions.number(two)
    one.release()
    del one
    other.trim()
    gc.collect()
    mine.adoptions.next_message()
    assert not peer.mappings.has(numbers[0])
    assert peer.mappings.has(numbers[1])
    assert mine.adoptions.nbytes == two.size


def test_what_is_gone_is_dropped_when_nothing_is_adopted_any_more():
    mine, peer = arena()
    other, (one,) = blocks(1)
    number = mine.adoptions.number(one)
    one.release()
    del one
    other.trim()
    for _ in range(100):
        mine.scratch(10)
    assert not peer.mappings.has(number)


def test_the_one_that_was_named_longest_ago_makes_room():
    mine, peer = arena()
    _, many = blocks(MOST + 2)
    numbers = []
    for block in many[:MOST]:
        mine.adoptions.next_message()
        numbers.append(mine.adoptions.number(block))
    mine.adoptions.next_message()
    assert mine.adoptions.number(many[0]) == numbers[0]
    assert mine.adoptions.number(many[MOST]) is not None
    assert peer.mappings.has(numbers[0])
    assert not peer.mappings.has(numbers[1])
    assert len([number for number in numbers if peer.mappings.has(number)]) == MOST - 1


def test_what_one_message_names_makes_no_room_for_more_of_it():
    mine, _ = arena()
    _, many = blocks(MOST + 1)
    mine.adoptions.next_message()
    numbers = [mine.adoptions.number(block) for block in many]
    assert None not in numbers[:MOST]
    assert numbers[MOST] is None
    mine.adoptions.next_message()
    assert mine.adoptions.number(many[MOST]) is not None


def test_memory_stays_readable_for_who_has_it():
    mine, peer = arena()
    _, (one,) = blocks(1)
    one.array("<f4", (4,), 0)[:] = 7
    number = mine.adoptions.number(one)
    assert number is not None
    mapped = peer.mappings.block(number)
    assert mapped is not None
    assert np.array_equal(mapped.array("<f4", (4,), 0), [7] * 4)
