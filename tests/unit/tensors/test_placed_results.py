"""Results of a call with places, as a worker may tell them."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_dl.errors import ProtocolError
from onnx_dl.protocol import lane as m
from onnx_dl.tensors.arena import Arena, Mappings, NoPeer
from onnx_dl.tensors.call_codec import CallCodec
from onnx_dl.tensors.call_plans import EncodedCall
from onnx_dl.tensors.foreign import Written

F4 = "<f4"
CALL = EncodedCall(m.PlacedCall(outputs=["a", "b", "c"]), None)


@pytest.fixture
def codec() -> CallCodec:
    return CallCodec(Arena(NoPeer()), Mappings(keep_descriptors=False))


def reply(values: list[m.Value], *written: m.WrittenResult) -> m.PlacedResult:
    return m.PlacedResult(value=m.Items("list", values), written=list(written))


def test_results_come_in_the_order_of_their_names(codec: CallCodec) -> None:
    told = reply([m.Plain("in the middle")], m.WrittenResult(0, F4, (2,)), m.WrittenResult(2, F4, (3,)))
    dtype = np.dtype(np.float32)
    assert codec.decode(CALL, told) == [Written(dtype, (2,)), "in the middle", Written(dtype, (3,))]


@pytest.mark.parametrize(
    "indices", [(0, 1), (0, 1, 2, 3), (0, 0, 1), (1, 0, 2), (0, 1, 3), (-1, 0, 1), (0, 1, 1 << 40)], ids=str
)
def test_others_than_these_are_an_error(codec: CallCodec, indices: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError, match="3 results"):
        codec.decode(CALL, reply([], *(m.WrittenResult(index, F4, (2,)) for index in indices)))


def test_more_values_than_names(codec: CallCodec) -> None:
    with pytest.raises(ProtocolError, match="3 results"):
        codec.decode(CALL, reply([m.Plain(1)] * 3, m.WrittenResult(0, F4, (2,))))
    with pytest.raises(ProtocolError, match="3 results"):
        codec.decode(CALL, m.PlacedResult(value=m.Plain(1), written=[]))


@pytest.mark.parametrize(("dtype", "shape"), [("no dtype", (2,)), ("|O", (2,)), (F4, (-1,))])
def test_a_result_that_cannot_be(codec: CallCodec, dtype: str, shape: tuple[int, ...]) -> None:
    told = [m.WrittenResult(0, dtype, shape), m.WrittenResult(1, F4, ()), m.WrittenResult(2, F4, ())]
    with pytest.raises(ProtocolError, match="cannot be"):
        codec.decode(CALL, reply([], *told))


def test_an_answer_to_something_else(codec: CallCodec) -> None:
    with pytest.raises(ProtocolError, match="another request"):
        codec.decode(m.Touch(), reply([]))
