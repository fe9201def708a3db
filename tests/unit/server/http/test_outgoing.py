from __future__ import annotations

import asyncio
from typing import cast

import pytest

from onnx_dl.server.http.limits import HttpLimits
from onnx_dl.server.http.outgoing import Outgoing
from onnx_dl.server.interfaces import Inference

LIMITS = HttpLimits(send_idle=30, body_grace=10, body_total=600)


class Transport:
    """Notes what is sent; ``unsent`` is set by the test."""

    def __init__(self) -> None:
        self.unsent = 0
        self.sent: list[object] = []
        self.is_tls = False
        self.is_closed = False
        self.limits: tuple[int, int] | None = None

    def get_extra_info(self, name: str) -> object:
        return self if name == "sslcontext" and self.is_tls else None

    def set_write_buffer_limits(self, high: int, low: int) -> None:
        self.limits = high, low

    def close(self) -> None:
        self.is_closed = True

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def write(self, part: object) -> None:
        self.sent.append(part)

    def writelines(self, parts: list[object]) -> None:
        self.sent.extend(parts)


@pytest.fixture
def transport() -> Transport:
    return Transport()


class Counted:
    """Counts bytes that are owed."""

    owed = 0

    def owe(self, nbytes: int) -> None:
        self.owed += nbytes

    def paid(self, nbytes: int) -> None:
        self.owed -= nbytes


@pytest.fixture
def counted() -> Counted:
    return Counted()


@pytest.fixture
def outgoing(transport: Transport, counted: Counted) -> Outgoing:
    return outgoing_of(transport, counted)


def outgoing_of(transport: Transport, counted: Counted) -> Outgoing:
    outgoing = Outgoing(cast(asyncio.Transport, transport), LIMITS, cast(Inference, counted))
    outgoing.begin()
    return outgoing


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


def test_an_answer_is_counted_until_its_last_byte_is_sent(
    transport: Transport, outgoing: Outgoing, counted: Counted
) -> None:
    assert transport.limits == (0, 0), "it pauses as soon as a byte waits"
    outgoing.send([bytes(10), bytes(1 << 20)], 0)
    assert counted.owed == 0, "all of it was taken at once"
    transport.unsent = 1
    outgoing.send([bytes(1000)], 0)
    assert counted.owed == 0, "it is small"
    outgoing.send([bytes(10), bytes(1 << 20)], 0)
    assert counted.owed == (1 << 20) + 10
    transport.unsent = 0
    outgoing.resume()
    outgoing.lose()
    assert counted.owed == 0


def test_an_answer_is_not_counted_when_its_client_is_gone(
    transport: Transport, outgoing: Outgoing, counted: Counted
) -> None:
    transport.unsent = 1
    outgoing.send([bytes(1 << 20)], 0)
    outgoing.lose()
    outgoing.lose()
    assert counted.owed == 0


def test_tls_gets_pieces_that_are_taken(transport: Transport, counted: Counted) -> None:
    transport.is_tls = True
    outgoing = outgoing_of(transport, counted)
    assert transport.limits == (1, 0)
    large = bytes(range(256)) * 4096
    outgoing.is_paused = True
    outgoing.send([b"head", large], 0)
    outgoing.close(is_all_read=True)
    assert not transport.sent and outgoing.unsent == counted.owed == len(large) + 4
    outgoing.resume()
    assert b"".join(transport.sent) == b"head" + large  # type: ignore[arg-type]
    assert max(map(len, transport.sent)) <= 256 << 10  # type: ignore[arg-type]
    assert counted.owed == 0 and transport.is_closed
