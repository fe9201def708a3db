"""Which call is told to end: the one that is meant, and no other."""

from __future__ import annotations

import pytest

from onnx_dl.workers.engines.base import CancelToken


@pytest.mark.parametrize("number", [0, 1])
def test_no_call_ends_unless_that_is_cancelled_for(number: int) -> None:
    """0 is the number of a call over ZeroMQ that overtook the page with the numbers."""
    token, ended = CancelToken(), []
    token.number = number
    token.attach(lambda: ended.append(number))
    assert not token.is_cancelled and not ended


def test_a_word_that_comes_early_or_in_time_ends_the_call_it_means() -> None:
    token, ended = CancelToken(), []
    token.cancel(2)
    for number in (1, 2, 3):
        token.number = number
        token.attach(lambda number=number: ended.append(number))
        assert token.is_cancelled == (number == 2)
    token.cancel(3)
    token.detach()
    token.cancel(3)
    assert ended == [2, 3]
