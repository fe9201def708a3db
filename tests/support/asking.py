"""Single requests to a server of the protocol, by hand: status and body of HTTP, the code of gRPC."""

from __future__ import annotations

import contextlib
import http.client
import ssl
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.waiting import DEADLINE, allowed

grpc = pytest.importorskip("grpc", reason="needs the packages of the extra serve")
INFERENCE = "inference.GRPCInferenceService"


def asked(
    address: str,
    method: str,
    path: str,
    headers: dict[str, str] | None = None,
    tls: ssl.SSLContext | None = None,
) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers of one request of HTTP.  ``Host`` is as given, if it is given."""
    timeout = allowed(DEADLINE)
    if tls is None:
        connection = http.client.HTTPConnection(address, timeout=timeout)
    else:
        connection = http.client.HTTPSConnection(address, timeout=timeout, context=tls)
    with contextlib.closing(connection):
        connection.putrequest(method, path, skip_host="Host" in (headers or {}))
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        if method == "POST":
            connection.putheader("Content-Length", "2")
        connection.endheaders(b"{}" if method == "POST" else None)
        answer = connection.getresponse()
        return answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}


def status(address: str, method: str, path: str, token: str | None) -> int:
    return asked(address, method, path, bearer(token))[0]


def bearer(token: str | None) -> dict[str, str]:
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def called(channel: Any, method: str, token: str | None) -> Any:
    """The code with which an empty message is answered by a method of gRPC."""
    metadata = [] if token is None else [("authorization", f"Bearer {token}")]
    path, timeout = f"/{INFERENCE}/{method}", allowed(DEADLINE)
    try:
        if method == "ModelStreamInfer":
            list(channel.stream_stream(path)(iter([b""]), timeout=timeout, metadata=metadata))
        else:
            channel.unary_unary(path)(b"", timeout=timeout, metadata=metadata)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


@contextlib.contextmanager
def closing(client: Any) -> Iterator[Any]:
    """Closes a client of tritonclient, and the loop that gevent keeps for the thread of an HTTP client."""
    try:
        with contextlib.closing(client):
            yield client
    finally:
        if (gevent := sys.modules.get("gevent")) is not None:
            gevent.get_hub().destroy(destroy_loop=True)
