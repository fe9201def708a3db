"""The caller's table of calls that repeat."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_dl.protocol import lane as m
from onnx_dl.tensors.arena import Block
from onnx_dl.tensors.call_plans import MOST, CallPlan, CallPlans, InputLayout, can_repeat, in_place, key_of
from onnx_dl.tensors.values import Packer, Unpacker
from tests.support.builders import arena

X = np.zeros((2, 3), np.float32)
TENSOR = m.Tensor("<f4", (2, 3), 1, 64)


@pytest.mark.parametrize(
    "other",
    [
        (None, {"x": X.astype(np.float64)}),
        (None, {"x": X.T}),
        (None, {"y": X}),
        (None, {"x": X, "y": X}),
        (["a"], {"x": X}),
        (["a", "b"], {"x": X}),
        (None, {"x": X.astype(">f4")}),
        (None, {}),
    ],
)
def test_calls_that_differ_in_more_than_bytes_have_other_keys(other):
    assert key_of(None, {"x": X}, False) == key_of(None, {"x": X + 1}, False)
    assert key_of(*other, False) != key_of(None, {"x": X}, False)
    assert key_of(None, {"x": X}, True) != key_of(None, {"x": X}, False)


class Like(str):
    """Equal to a text."""


@pytest.mark.parametrize("outputs", ["yz", {"y": 1, "z": 2}, ["y", 1], [b"y"], [Like("y")], {"y"}, b"yz"])
def test_names_that_are_no_lists_of_text_are_not_remembered(outputs):
    """What is equal to names that onnxruntime takes may be what it refuses."""
    assert key_of(outputs, {"x": X}, False) is None
    assert key_of(["y", "z"], {"x": X}, False) == key_of(("y", "z"), {"x": X}, False) is not None


def test_inputs_that_move_have_other_keys_than_names():
    keys = [
        key_of(None, {"x": X, "y": X}, False, moved) for moved in (None, {"x": 1}, {"y": 1}, {"x": 1, "y": 1})
    ]
    assert len(set(keys)) == 4


@pytest.mark.parametrize("value", [[1.0], 1, "a", None, np.float32(1), np.ma.masked_array([1.0])])
def test_what_is_no_array_is_not_remembered(value):
    assert key_of(None, {"x": X, "y": value}, False) is None


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("f4", True), ("?", True), ("O", True), ("U3", True), ("V2", False), ("S2", False)],
)
def test_numbers_and_text_repeat(dtype: str, expected: bool):
    assert can_repeat({"x": np.zeros(2, dtype)}) is expected


@pytest.mark.parametrize(
    "value",
    [
        m.Items("list", []),
        m.Items("tuple", [TENSOR]),
        m.Items("list", [TENSOR, m.Plain(1)]),
        m.Items("list", [m.Tensor("<f4", (0,), 0, 0)]),
        TENSOR,
        m.Plain(None),
    ],
)
def test_results_that_cannot_be_written_in_place(value):
    assert in_place(value) is None
    assert in_place(m.Items("list", [TENSOR, TENSOR])) == [TENSOR, TENSOR]


def plan(key: object, number: int, block: Block | None = None) -> CallPlan:
    layout = InputLayout(Packer(arena()[0]), {}, [])
    layout.block = block
    return CallPlan(key, number, layout)


def test_another_scratch_block_ends_all_plans():
    a, _ = arena()
    plans, first, second = CallPlans(), a.scratch(10), a.take(10)
    plans.remember(plan("k", plans.next_number(first), first))
    assert plans.next_number(first) == 1
    assert plans.next_number(None) == 1, "a call without small inputs lies in none"
    assert plans.get("k") is not None
    assert plans.next_number(second) == 0
    assert plans.get("k") is not None, "nothing has changed before the call is answered"
    plans.remember(plan("l", 0, second))
    assert plans.get("k") is None
    assert (plans.next_number(second), plans.next_number(first)) == (1, 0)


def test_it_does_not_grow_without_bounds():
    plans, numbers = CallPlans(), set()
    for key in range(10 * MOST):
        number = plans.next_number(None)
        numbers.add(number)
        plans.remember(plan(key, number))
    assert numbers == set(range(MOST))


def test_numbers_are_never_used_twice_at_a_time():
    """Also where a call is said in full once more, because its place has become too small."""
    plans = CallPlans()
    for _ in range(3):
        plans.remember(plan("same", plans.next_number(None)))
    other = plan("other", plans.next_number(None))
    plans.remember(other)
    plans.remember(other)
    assert (other.number, plans.next_number(None)) == (3, 4)


def test_results_whose_blocks_are_gone_are_forgotten():
    plans, kept, gone = CallPlans(), plan("kept", 0), plan("gone", 1)
    kept.results, gone.results = [m.Packed(1, 0)], [TENSOR, m.Packed(2, 0)]
    plans.remember(kept)
    plans.remember(gone)
    plans.forget_results(lambda number: number == 1)
    assert (kept.results, gone.results) == ([m.Packed(1, 0)], None)


def test_text_is_put_where_it_lay():
    a, peer = arena()
    text = np.array(["a", "b"], object)
    packer = Packer(a)
    values = packer.pack([X, text])
    made = InputLayout(packer, {"x": X, "t": text}, values)
    for other in (["", "ü" * 1000], ["c", "d"]):
        text = np.array(other, object)
        assert made.fill({"x": X + 1, "t": text}, a)
        got = [Unpacker(peer.mappings.block, copy=True).unpack(value) for value in values]
        assert got[0].tolist() == (X + 1).tolist() and got[1].tolist() == other
    assert not made.fill({"x": X, "t": np.array(["", "x" * 100_000], object)}, a)
