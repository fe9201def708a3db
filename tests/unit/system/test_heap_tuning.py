"""The variable that sets the heap of our processes: what the user has set there stays."""

from __future__ import annotations

import pytest

from onnx_dl.system import heap_tuning

NAME = "GLIBC_TUNABLES"


@pytest.mark.parametrize(
    "given", [{}, {NAME: "glibc.malloc.arena_max=2"}, {NAME: "glibc.malloc.tcache_count=3"}, {"A": "b"}]
)
def test_an_environment_is_as_before_when_the_process_has_begun(given: dict[str, str]) -> None:
    changed = heap_tuning.put_in(given)
    assert "glibc.malloc.tcache_count=" in changed[NAME]
    assert changed[NAME].startswith(given.get(NAME, ""))
    heap_tuning.take_out(changed)
    assert changed == given


def test_a_count_of_the_user_stays() -> None:
    given = {NAME: "glibc.malloc.tcache_count=7:glibc.malloc.arena_max=2"}
    assert heap_tuning.put_in(given) == given


def test_it_is_put_in_once() -> None:
    once = heap_tuning.put_in({})
    assert heap_tuning.put_in(once) == once
