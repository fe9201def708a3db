from __future__ import annotations

import itertools

import pytest

from onnx_dl.server.http.limits import STEPS, HttpLimits, is_too_slow, most_connections, next_step
from onnx_dl.server.http.peers import is_loopback, subject


@pytest.mark.parametrize(
    ("length", "filled", "expected"),
    [
        (100_000, 65536, 100_000),
        (1 << 20, 65536, 1 << 20),
        (9 << 20, 65536, 1 << 20),
        (9 << 20, 8 << 20, 9 << 20),
        (1 << 30, 8 << 20, 64 << 20),
        (1 << 30, 64 << 20, 256 << 20),
        (1 << 30, 256 << 20, 1 << 30),
    ],
)
def test_memory_of_a_body_grows_in_steps(length: int, filled: int, expected: int) -> None:
    assert next_step(length, filled) == expected


def test_a_client_never_holds_more_than_a_multiple_of_what_it_sent() -> None:
    assert all(later <= 16 * earlier for earlier, later in itertools.pairwise(STEPS))
    assert all(next_step(1 << 30, step) <= 4 * step for step in STEPS if step >= 64 << 20)


@pytest.mark.parametrize(
    ("received", "length", "elapsed", "slow"),
    [
        (0, 1000, 9.9, False),
        (0, 1000, 10.1, True),
        (10, 1000, 20, True),
        (1 << 20, 1 << 30, 10.5, False),
        (1 << 20, 1 << 30, 12, True),
        # A link of 1 Mbit/s.
        (4 << 20, 5 << 20, 33, False),
        # A body that holds 64 MiB for what it does not send.
        (9 << 20, 64 << 20, 30, True),
        (11 << 20, 64 << 20, 30, False),
        (100 << 20, 500 << 20, 111, True),
        (102 << 20, 500 << 20, 111, False),
        # A link of 16 Mbit/s.
        (100 << 20, 1 << 30, 52, False),
    ],
)
def test_a_body_that_takes_too_long(received: int, length: int, elapsed: float, slow: bool) -> None:
    assert is_too_slow(received, length, elapsed, HttpLimits()) is slow


def test_connections_leave_descriptors_for_the_rest() -> None:
    assert most_connections(HttpLimits(), 1024) == 512
    assert most_connections(HttpLimits(), 1 << 60) == 4096
    assert most_connections(HttpLimits(connections=7), 1024) == 7


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("::ffff:127.0.0.1", True), ("", False),
        ("10.0.0.1", False), ("::ffff:10.0.0.1", False), ("fe80::1%eth0", False), ("x", False),
    ],
)  # fmt: skip
def test_loopback(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected


def test_the_subject_of_a_certificate() -> None:
    shown = {"subject": ((("organizationName", "us"),), (("commonName", "client"),))}
    assert subject(shown) == "organizationName=us, commonName=client"
