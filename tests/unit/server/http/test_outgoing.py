from __future__ import annotations

import asyncio
from typing import cast

import pytest

from onnx_dl.server.http.limits import HttpLimits
from onnx_dl.server.http.outgoing import Outgoing

LIMITS = HttpLimits(send_idle=30, body_grace=10, body_total=600)


class Transport:
    """Notes what is sent; ``unsent`` is set by the test."""

    def __init__(self) -> None:
        self.unsent = 0
        self.sent: list[object] = []

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def write(self, part: object) -> None:
        self.sent.append(part)

    def writelines(self, parts: list[object]) -> None:
        self.sent.extend(parts)


@pytest.fixture
def transport() -> Transport:
    return Transport()


@pytest.fixture
def outgoing(transport: Transport) -> Outgoing:
    return Outgoing(cast(asyncio.Transport, transport), LIMITS)


def test_parts_are_sent_as_they_are(transport: Transport, outgoing: Outgoing) -> None:
    large = memoryview(bytearray(100_000))
    outgoing.send([b"head", large], 0)
    outgoing.send([b"one"], 0)
    assert transport.sent == [b"head", large, b"one"] and transport.sent[1] is large


def test_who_takes_nothing_is_stuck_after_a_while(transport: Transport, outgoing: Outgoing) -> None:
    outgoing.send([bytes(10_000), bytes(90_000)], 100)
    transport.unsent = 50_000
    assert not outgoing.is_stuck(101) and not outgoing.is_stuck(130)
    transport.unsent = 40_000
    assert not outgoing.is_stuck(132)
    transport.unsent = 0
    assert not outgoing.is_stuck(1000)


def test_time_counts_from_the_last_progress(transport: Transport, outgoing: Outgoing) -> None:
    outgoing.send([bytes(100_000)], 0)
    for now, unsent in ((0, 60_000), (12, 30_000), (20, 10_000)):
        transport.unsent = unsent
        assert not outgoing.is_stuck(now)
    assert not outgoing.is_stuck(49) and outgoing.is_stuck(51)


def test_who_takes_a_little_now_and_then_is_stuck_too(transport: Transport, outgoing: Outgoing) -> None:
    total = 600 << 20
    outgoing.send([bytes(total)], 0)
    transport.unsent = total - (9 << 20)
    assert not outgoing.is_stuck(19)
    transport.unsent -= 1
    assert outgoing.is_stuck(21)


def test_nothing_that_was_sent_is_never_stuck(outgoing: Outgoing) -> None:
    assert not outgoing.is_stuck(1e9)
