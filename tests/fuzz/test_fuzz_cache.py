"""The load cache with every kind of damage; in a file of its own, so that it runs beside others."""

from __future__ import annotations

import pytest

from tests.fuzz.playing import play

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]  # it has a limit of its own


def test_no_damage_of_the_load_cache_changes_an_answer() -> None:
    assert "nothing wrong" in play("tests.fuzz.cache")
