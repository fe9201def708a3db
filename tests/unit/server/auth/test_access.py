"""Who may do what."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from onnx_dl.server.auth import followed
from onnx_dl.server.auth.access import AccessError, RequestAccess, open_access
from onnx_dl.server.interfaces import Access, Caller
from onnx_dl.server.options import ServeOptions
from onnx_dl.server.v2.failures import RequestFailure
from onnx_dl.server.v2.operations import Operation, Scope

SCOPES = [scope for scope in Scope if scope is not Scope.HEALTH]
TLS = {"tls_cert": "c", "tls_key": "k", "tls_ca": "a"}
NOBODY = Caller(None, True)


def with_token(token: str) -> Caller:
    return Caller(f"Bearer {token}", False, None, "10.0.0.1")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A token for each scope, with its name for a text."""
    path = tmp_path / "tokens"
    path.write_text("".join(f"{s}:{hashlib.sha256(s.encode()).hexdigest()}:{s}\n" for s in SCOPES))
    return path


def opened(told: list[str] | None = None, **options: Any) -> RequestAccess:
    return open_access(ServeOptions(**options), ([] if told is None else told).append)


def answer(access: Access, operation: Operation, caller: Caller) -> int:
    try:
        access.check(operation, caller)
    except RequestFailure as failure:
        return failure.http
    return 200


def browser(access: Access, host: str | None, origin: str | None = None) -> int:
    try:
        access.check_browser(host, origin)
    except RequestFailure as failure:
        return failure.http
    return 200


@pytest.mark.parametrize("operation", Operation)
def test_without_tokens_all_may_do_all(operation: Operation) -> None:
    for options in ({}, {"http": "0.0.0.0:1", "insecure": True}):
        assert answer(opened(**options), operation, NOBODY) == 200


@pytest.mark.parametrize("operation", Operation)
def test_each_operation_needs_a_token_with_its_scope(file: Path, operation: Operation) -> None:
    """Also over loopback."""
    access = opened(token_file=str(file))
    is_open = operation.scope is Scope.HEALTH
    for caller in (NOBODY, with_token("wrong"), Caller("Basic infer", True), Caller("Bearer", True)):
        assert answer(access, operation, caller) == (200 if is_open else 401)
    for scope in SCOPES:
        allowed = is_open or scope is operation.scope
        assert answer(access, operation, with_token(scope)) == (200 if allowed else 403)


def test_a_refusal_does_not_tell_which_part_was_wrong(file: Path) -> None:
    access = opened(token_file=str(file))
    texts = set()
    for caller in (NOBODY, with_token("wrong"), with_token("infe"), with_token("inferr"), Caller("x", False)):
        with pytest.raises(RequestFailure) as caught:
            access.check(Operation.INFER, caller)
        texts.add((str(caught.value), caught.value.grpc))
    assert len(texts) == 1


def test_refusals_are_told_with_the_peer_and_without_the_token(file: Path) -> None:
    told: list[str] = []
    access = opened(told, token_file=str(file))
    for caller in (with_token("hunter2"), with_token("metrics"), Caller(None, True, None, "127.0.0.1")):
        answer(access, Operation.INFER, caller)
    assert told == [
        "refused requests: an unknown token from 10.0.0.1.",
        "refused requests: no token from 127.0.0.1.",
    ]


def test_the_file_is_followed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followed, "LOOK_EVERY", 0.0)
    told: list[str] = []
    access = opened(told, token_file=str(file))
    assert answer(access, Operation.INFER, with_token("infer")) == 200
    valid = file.read_text()
    file.write_text("nonsense")
    assert answer(access, Operation.INFER, with_token("infer")) == 200
    assert len(told) == 1 and f"{file}:1" in told[0]
    file.write_text("# nobody")
    assert answer(access, Operation.INFER, with_token("infer")) == 401
    file.write_text(valid)
    assert answer(access, Operation.INFER, with_token("infer")) == 200


@pytest.mark.parametrize("operation", Operation)
def test_a_certificate_gives_all_scopes(operation: Operation) -> None:
    access = opened(http="0.0.0.0:1", **TLS)
    assert answer(access, operation, Caller(None, False, "CN=ann")) == 200
    assert answer(access, operation, NOBODY) == (200 if operation.scope is Scope.HEALTH else 401)


def test_with_tokens_a_certificate_is_not_enough(file: Path) -> None:
    access = opened(token_file=str(file), **TLS)
    assert answer(access, Operation.INFER, Caller(None, False, "CN=ann")) == 401
    assert answer(access, Operation.INFER, Caller("Bearer infer", False, "CN=ann")) == 200
    assert answer(access, Operation.INFER, Caller("Bearer infer", False, None)) == 401


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:8000", "127.0.0.1", "[::1]:8000", "192.168.1.9:8000", "localhost:1",
     "LOCALHOST.", "a.localhost:80", os.uname().nodename, None],
)  # fmt: skip
def test_hosts_that_cannot_be_pointed_elsewhere(host: str | None) -> None:
    assert browser(opened(), host) == 200


@pytest.mark.parametrize(
    "host",
    ["evil.org", "evil.org:8000", "localhost.evil.org", "", "127.0.0.1.evil.org", "a b", "[::1"],
)
def test_other_hosts_are_refused(host: str) -> None:
    assert browser(opened(), host) == 421


def test_pages_of_other_sites_are_refused() -> None:
    access = opened()
    assert browser(access, "localhost:8000", "http://localhost:8000") == 200
    for origin in ("http://evil.org", "http://localhost:9000", "null", "", "http://127.0.0.1:8000"):
        assert browser(access, "localhost:8000", origin) == 403
    assert browser(access, None, "http://localhost:8000") == 403


def test_what_passed_is_remembered_with_both_headers() -> None:
    access = opened()
    for number in range(1000):
        assert browser(access, f"10.0.0.{number % 256}:{number}", None) == 200
        assert browser(access, f"10.0.0.{number % 256}:{number}", "http://evil.org") == 403
    assert browser(access, "evil.org", None) == browser(access, "evil.org", "http://evil.org") == 421
    assert len(access._passed) == 64


def test_the_name_that_is_listened_on_is_a_name_of_the_server() -> None:
    assert browser(opened(http="localhost:8000"), "localhost:8000") == 200


@pytest.mark.parametrize("options", [{"insecure": True, "http": "0.0.0.0:1"}, TLS])
def test_where_names_are_not_known_the_origin_alone_counts(options: dict[str, Any]) -> None:
    access = opened(**options)
    assert browser(access, "models.example.org") == 200
    assert browser(access, "models.example.org", "https://models.example.org") == 200
    assert browser(access, "models.example.org", "https://evil.org") == 403


def test_with_tokens_browsers_need_no_check(file: Path) -> None:
    assert browser(opened(token_file=str(file)), "models.example.org", "https://other.example.org") == 200


def test_a_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="--insecure"):
        opened(http="0.0.0.0:1")
    with pytest.raises(AccessError, match="No such file"):
        opened(token_file=str(tmp_path / "missing"))
