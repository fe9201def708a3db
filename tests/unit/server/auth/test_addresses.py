"""Addresses as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_dl.server.auth import addresses
from onnx_dl.server.auth.addresses import Address, is_loopback, is_same, parsed


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8000", Address("127.0.0.1", 8000)),
        ("LocalHost.:0", Address("localhost", 0)),
        (":8000", Address("", 8000)),
        ("name", Address("name", None)),
        ("[::1]:8000", Address("::1", 8000)),
        ("[::1]", Address("::1", None)),
        ("name:65535", Address("name", 65535)),
    ],
)
def test_an_address_is_parsed(text: str, address: Address) -> None:
    assert parsed(text) == address


@pytest.mark.parametrize(
    "text",
    ["::1", "name:", "name:x", "name:65536", "name:99999999999", "name:-1", "name: 1",
     "name:\uff11", "[::1", "[::1]8000", "[name]:1", "a:1:2"],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    assert parsed(text) is None


@given(st.text())
def test_any_text_is_an_address_or_none(text: str) -> None:
    found = parsed(text)
    assert found is None or found.port is None or 0 <= found.port <= 65535


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "::ffff:127.0.0.1"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "10.0.0.1", "a.org", "localhost.a.org", "127.1"])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("host", "origin", "same"),
    [
        ("localhost:8000", "http://localhost:8000", True),
        ("localhost:8000", "https://LOCALHOST:8000", True),
        ("example.org", "https://example.org", True),
        ("example.org:80", "http://example.org", True),
        ("[::1]:8000", "http://[::1]:8000", True),
        ("localhost:8000", "http://localhost:9000", False),
        ("localhost:8000", "http://localhost", False),
        ("localhost:8000", "http://evil.org:8000", False),
        ("localhost:8000", "null", False),
        ("localhost:8000", "", False),
        ("localhost:8000", "file://", False),
        ("localhost:8000", "localhost:8000", False),
        ("localhost:8000", "http://user@localhost:8000", False),
        ("localhost:8000", "http://[::1", False),
    ],
)
def test_the_origin_of_the_host(host: str, origin: str, same: bool) -> None:
    address = addresses.parsed(host)
    assert address is not None and is_same(address, origin) is same
