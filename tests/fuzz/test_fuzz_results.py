"""Calls of every kind, compared with onnxruntime; in a file of its own, so that it runs beside others."""

from __future__ import annotations

import pytest

from tests.fuzz.playing import play

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]  # it has a limit of its own


def test_results_are_those_of_onnxruntime_and_stay_so() -> None:
    assert "nothing wrong" in play("tests.fuzz.results")
