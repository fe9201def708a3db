"""A repeated call: which calls it takes, and that its results are the caller's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from onnx_dl.protocol.lane import Tensor
from onnx_dl.tensors.arena import Arena, NoPeer
from onnx_dl.tensors.call_plans import CallPlan, InputLayout, key_of
from onnx_dl.tensors.repeated_call import RepeatedCall
from onnx_dl.tensors.values import Packer

FEED = {"x": np.ones((2, 3), np.float32), "n": np.array(7, np.int64), "none": np.ones((0, 2), np.float32)}
RESULTS = [Tensor("<f4", (2, 3), 1, 0), Tensor("<i8", (), 1, 64), Tensor("|b1", (5,), 1, 128)]


class Call:
    """A call, and both ends' memory."""

    def __init__(self, feed: dict[str, Any] = FEED, outputs: list[str] | None = None) -> None:
        self.arena = Arena(NoPeer())
        packer = Packer(self.arena)
        values = packer.pack(feed.values())
        key = key_of(outputs, feed, keep=False)
        assert key is not None
        self.plan = CallPlan(key, 0, InputLayout(packer, feed, values), results=list(RESULTS))
        self.block = Arena(NoPeer()).scratch(1000)
        self.plan.prepare_repeating(lambda number: self.block)

    def takes(self, feed: dict[str, Any], outputs: Any = None) -> bool:
        assert self.plan.repeated is not None
        return self.plan.repeated.fill(outputs, feed, self.arena)


@pytest.fixture
def call() -> Iterator[Call]:
    yield Call()


def test_arrays_of_the_same_form_are_copied_to_their_places(call: Call) -> None:
    x, n = np.arange(6, dtype=np.float32).reshape(3, 2).T, np.array(8)
    assert call.takes({"x": x, "n": n, "none": FEED["none"]})
    targets = call.plan.inputs.targets
    assert np.array_equal(targets[0], x) and targets[1] == 8 and targets[2] is None


class Text(str):
    """Is equal to a name, and no plain text."""


@pytest.mark.parametrize(
    "feed",
    [
        {**FEED, "x": FEED["x"].astype(np.float64)},
        {**FEED, "x": FEED["x"].astype(">f4")},
        {**FEED, "x": FEED["x"][:1]},
        {**FEED, "x": FEED["x"].tolist()},
        {**FEED, "x": FEED["x"].view(np.matrix)},
        {**FEED, "n": np.int64(7)},
        {**FEED, "m": FEED["n"]},
        {name: FEED[name] for name in ("x", "n")},
        {name: FEED[name] for name in ("n", "x", "none")},
        {Text(name): value for name, value in FEED.items()},
    ],
    ids=["dtype", "bytes order", "shape", "list", "class", "scalar", "more", "fewer", "order", "names"],
)
def test_another_call_is_not_taken(call: Call, feed: dict[str, Any]) -> None:
    assert not call.takes(feed)
    assert call.takes(FEED)


def test_names_of_outputs() -> None:
    named = Call(outputs=["a", "b"])
    assert named.takes(FEED, ["a", "b"])
    for other in (None, [], ["a"], ["b", "a"], ("a", "b"), [Text("a"), "b"]):
        assert not named.takes(FEED, other)
    assert not Call().takes(FEED, ["a", "b"])


def test_a_scratch_block_that_is_gone(call: Call) -> None:
    call.arena.trim()
    assert not call.takes(FEED)


def test_results_are_copies(call: Call) -> None:
    repeated = call.plan.repeated
    assert isinstance(repeated, RepeatedCall)
    places = [call.block.array(value.dtype, value.shape, value.offset) for value in RESULTS]
    kept = []
    for turn in range(40):  # more than are prepared at once
        for place in places:
            place[...] = turn
        kept.append(repeated.results())
    for turn, results in enumerate(kept):
        for result, value in zip(results, RESULTS, strict=True):
            assert type(result) is np.ndarray and (result.dtype.str, result.shape) == (
                value.dtype,
                value.shape,
            )
            assert result.flags.c_contiguous and result.flags.writeable and result.flags.aligned
            assert result.ctypes.data % 64 == 0 and np.all(result == np.full(value.shape, turn, value.dtype))


@pytest.mark.parametrize(
    ("feed", "outputs"),
    [
        ({"x": np.ones(1 << 14, np.float32)}, None),
        ({"t": np.array(["text"], object)}, None),
        (FEED, ["a", "a"]),
    ],
    ids=["large input", "text", "one name twice"],
)
def test_other_calls_take_the_usual_steps(feed: dict[str, Any], outputs: list[str] | None) -> None:
    assert Call(feed, outputs).plan.repeated is None


def test_large_results_take_the_usual_steps(call: Call) -> None:
    call.plan.forget_results()
    call.plan.results = [Tensor("<f4", (600,), 1, 0)]
    call.plan.prepare_repeating(lambda number: Arena(NoPeer()).scratch(4000))
    assert call.plan.repeated is None


def test_names_that_refuse_to_be_compared_are_left_to_the_usual_way() -> None:
    call = Call(outputs=["y", "z", "w"])
    assert not call.takes(FEED, [np.array(["y", "z"])] * 3)
    assert call.takes(FEED, ["y", "z", "w"])


def test_a_feed_that_changes_meanwhile_is_left_to_the_usual_way(call: Call) -> None:
    class Changing(dict[str, Any]):
        """Says what a dict says that another thread has changed."""

        def items(self) -> Any:
            yield from [("x", FEED["x"])]
            raise RuntimeError("dictionary changed size during iteration")

    assert not call.takes(Changing(FEED))


def test_a_result_with_the_most_dimensions_is_left_to_the_usual_way() -> None:
    call = Call()
    call.plan.results = [Tensor("<f4", (1,) * 32, 1, 0)]
    call.plan.repeated = None
    call.plan.prepare_repeating(lambda number: call.block)
    assert call.plan.repeated is None
