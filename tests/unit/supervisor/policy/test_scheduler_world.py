"""Random histories of clients, workers, a saver, a file and a clock around the scheduler.

``python -m tests.world`` walks on for as long as one likes.
"""

from __future__ import annotations

import pytest

from tests.world.machine import Machine, walk

TRANSITIONS = 10_000


@pytest.mark.slow
def test_whatever_happens_in_whatever_order() -> None:
    walk(TRANSITIONS)
    assert Machine.done > TRANSITIONS // 2
    assert Machine.events > TRANSITIONS // 20  # the walk goes somewhere
