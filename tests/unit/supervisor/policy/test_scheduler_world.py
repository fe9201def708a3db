"""Random histories of clients, workers, a saver, a file and a clock around the scheduler.

``python -m tests.world`` walks on for as long as one likes.
"""

from __future__ import annotations

import pytest

from tests.world import turns
from tests.world.machine import Machine, walk

TRANSITIONS = 10_000
HISTORIES = 250


@pytest.mark.slow
def test_whatever_happens_in_whatever_order() -> None:
    walk(TRANSITIONS)
    assert Machine.done > TRANSITIONS // 2
    assert Machine.events > TRANSITIONS // 20  # the walk goes somewhere


@pytest.mark.slow
def test_whatever_happens_to_processes_that_start_early() -> None:
    seen = turns.walk(HISTORIES, seed=1)
    assert seen["started"] > HISTORIES // 4
    for end in ("lost while its load waited", "lost after Load", "hung", "ended by the scheduler"):
        assert seen[end] > 5, f"{end}: {seen}"  # the walk goes there
