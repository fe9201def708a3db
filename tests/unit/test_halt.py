"""Which call is told to end: the one that is meant, and no other."""

from __future__ import annotations

import pytest

from onnx_dl.workers.cancellation import Halt


@pytest.mark.parametrize("number", [0, 1])
def test_no_call_ends_unless_that_was_asked_for(number: int) -> None:
    """0 is the number of a call over ZeroMQ that overtook the page with the numbers."""
    halt, ended = Halt(), []
    halt.begin(number)
    halt.attach(lambda: ended.append(number))
    assert not halt.was_asked and not ended


def test_a_word_that_comes_early_or_in_time_ends_the_call_it_means() -> None:
    halt, ended = Halt(), []
    halt.ask(2)
    for number in (1, 2, 3):
        halt.begin(number)
        halt.attach(lambda number=number: ended.append(number))
        assert halt.was_asked == (number == 2)
    halt.ask(3)
    halt.detach()
    halt.ask(3)
    assert ended == [2, 3]
