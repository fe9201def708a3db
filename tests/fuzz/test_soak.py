"""Calls and faults; in a file of its own, so that it runs beside others."""

from __future__ import annotations

import pytest

from tests.fuzz.playing import play

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]  # it has a limit of its own


def test_calls_and_faults_at_random() -> None:
    told = play("benchmarks.soak")
    assert "wrong: 0" in told and "left: 0" in told and "recoveries:" in told
