"""Options with which a server must not start."""

from __future__ import annotations

import re
from typing import Any

import pytest

from onnx_dl.server.auth import start
from onnx_dl.server.options import ServeOptions

TLS = {"tls_cert": "c", "tls_key": "k"}


def refusal(**options: Any) -> str | None:
    return start.refusal(ServeOptions(**options))


@pytest.mark.parametrize("listener", ["http", "grpc", "metrics"])
@pytest.mark.parametrize("address", ["0.0.0.0:1", ":1", "[::]:1", "10.1.2.3:1", "example.org:1"])
def test_another_address_than_loopback_needs_one_of_three_ways(listener: str, address: str) -> None:
    sentence = refusal(**{listener: address})
    assert sentence is not None and sentence.startswith(f"--{listener} {address}")
    assert re.findall(r"--\S+", sentence)[1:] == ["--token-file", "--tls-ca", "--insecure"]
    for way in ({"token_file": "f"}, {"tls_ca": "a", **TLS}, {"insecure": True}):
        assert refusal(**{listener: address}, **way) is None


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "[::1]:1", ""])
def test_loopback_needs_nothing(address: str) -> None:
    assert refusal(http=address, grpc=address, metrics=address) is None


def test_encryption_alone_lets_nobody_in() -> None:
    assert refusal(http="0.0.0.0:1", **TLS) is not None


@pytest.mark.parametrize("address", ["8000x", "8000", "localhost", "::1:8000", "host:99999"])
def test_what_is_no_address(address: str) -> None:
    assert "no address" in (refusal(http=address) or "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tls_cert": "c"}, "--tls-key"),
        ({"tls_key": "k"}, "--tls-cert"),
        ({"tls_ca": "a"}, "--tls-ca needs"),
        ({"token_file": "f", "insecure": True}, "exclude"),
    ],
)
def test_options_that_need_or_exclude_others(options: dict[str, Any], words: str) -> None:
    assert words in (refusal(**options) or "")


@pytest.mark.parametrize("mode", ["copy", "map"])
@pytest.mark.parametrize("listener", ["http", "grpc"])
@pytest.mark.parametrize("way", [{"token_file": "f"}, {"insecure": True}, {"tls_ca": "a", **TLS}])
def test_shared_memory_is_for_loopback_only(mode: str, listener: str, way: dict[str, Any]) -> None:
    sentence = refusal(client_shm=mode, **{listener: "0.0.0.0:1"}, **way)
    assert sentence is not None and sentence.startswith(f"--client-shm {mode} needs --{listener}")


def test_shared_memory_may_be_used_while_metrics_go_elsewhere() -> None:
    assert refusal(client_shm="map") is None
    assert refusal(client_shm="map", metrics="0.0.0.0:1", token_file="f") is None


def test_warnings() -> None:
    def found(**options: Any) -> str:
        return " ".join(start.warnings(ServeOptions(**options)))

    assert found() == found(insecure=True) == found(token_file="f") == ""
    assert "everyone" in found(insecure=True, http="0.0.0.0:1")
    assert "unencrypted" in found(token_file="f", grpc="0.0.0.0:1")
    assert found(token_file="f", grpc="0.0.0.0:1", **TLS) == ""
