"""When the template of a supervisor ends."""

from __future__ import annotations

from onnx_dl.core.parsing import KEEP
from onnx_dl.supervisor.template_ttl import TemplateTtl

TTL = 60.0


def test_it_ends_when_nothing_was_used_for_its_ttl() -> None:
    ttl = TemplateTtl(TTL)
    ttl.update(5.0, used=True, spare=True)
    assert ttl.next_deadline() is None and not ttl.is_over(1e9)
    ttl.update(10.0, used=False, spare=True)
    ttl.update(20.0, used=False, spare=True)  # the time runs from the last use, not from the last look
    assert ttl.next_deadline() == 10.0 + TTL
    assert not ttl.is_over(9.9 + TTL) and ttl.is_over(10.0 + TTL)


def test_a_use_starts_the_time_again() -> None:
    ttl = TemplateTtl(TTL)
    ttl.update(0.0, used=False, spare=True)
    ttl.update(TTL, used=True, spare=True)
    assert not ttl.is_over(TTL)
    ttl.update(TTL + 1, used=False, spare=True)
    assert ttl.next_deadline() == 2 * TTL + 1


def test_one_that_starts_or_was_asked_for_a_worker_stays_and_none_needs_no_deadline() -> None:
    ttl = TemplateTtl(0.0)
    ttl.update(0.0, used=False, spare=False)
    assert ttl.next_deadline() is None and not ttl.is_over(1.0)


def test_zero_ends_it_at_once_and_keep_never() -> None:
    for seconds, ends in ((0.0, True), (KEEP, False)):
        ttl = TemplateTtl(seconds)
        ttl.update(1.0, used=False, spare=True)
        assert ttl.is_over(1.0) is ends
        assert (ttl.next_deadline() is None) is not ends
