"""An answer, its head as bytes, and the answers to requests that are refused.  Pure."""

from __future__ import annotations

import dataclasses
import http
import math
from collections.abc import Sequence
from typing import Final

import msgspec

from onnx_dl.server.http.head import Head
from onnx_dl.server.v2.failures import RequestFailure

JSON: Final = b"application/json"
BINARY: Final = b"application/octet-stream"
JOINED: Final = 16 << 10
"""Bytes up to which head and body are joined: one small write is quicker than a list of them."""
_LONGEST: Final = 2000
"""Characters of an error, as in gRPC."""
_REASONS: Final = {status.value: status.phrase.encode() for status in http.HTTPStatus}
_OK: Final = b"HTTP/1.1 200 OK\r\nContent-Type: "

Part = bytes | memoryview


@dataclasses.dataclass(slots=True)
class HttpAnswer:
    """``parts`` are sent as they lie in memory.  ``headers``: more than type and length."""

    status: int
    parts: Sequence[Part] = ()
    kind: bytes = JSON
    headers: list[tuple[bytes, bytes]] = dataclasses.field(default_factory=list)
    ends_connection: bool = False

    @property
    def nbytes(self) -> int:
        return sum(len(part) for part in self.parts)


def json_answer(value: object, status: int = 200) -> HttpAnswer:
    return HttpAnswer(status, (msgspec.json.encode(value),))


def failed(failure: RequestFailure) -> HttpAnswer:
    """The answer to a request that failed.  Texts repeat what the client sent, which may be long."""
    text = str(failure)
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    answer = json_answer({"error": text}, failure.http)
    if failure.retry_after is not None:
        seconds = max(1, math.ceil(failure.retry_after))
        answer.headers.append((b"Retry-After", str(seconds).encode()))
    if failure.http == 401:
        answer.headers.append((b"WWW-Authenticate", b"Bearer"))
    return answer


def not_allowed(methods: Sequence[str]) -> HttpAnswer:
    answer = json_answer({"error": "Method Not Allowed"}, 405)
    answer.headers.append((b"Allow", ", ".join(methods).encode()))
    return answer


def rendered(answer: HttpAnswer, head: Head | None, *, keeps_alive: bool) -> list[Part]:
    """Return what goes to the socket, in order.  ``head``: of the request; None: it was none."""
    nbytes = answer.nbytes
    if answer.status == 200:
        lines = [_OK, answer.kind]
    else:
        reason = _REASONS.get(answer.status, b"Error")
        lines = [b"HTTP/1.1 %d %s\r\nContent-Type: %s" % (answer.status, reason, answer.kind)]
    lines.extend(b"\r\n%s: %s" % header for header in answer.headers)
    if not keeps_alive:
        lines.append(b"\r\nConnection: close")
    elif head is not None and head.version == "1.0":
        lines.append(b"\r\nConnection: keep-alive")
    lines.append(b"\r\nContent-Length: %d\r\n\r\n" % nbytes)
    if head is not None and head.method == "HEAD":
        return [b"".join(lines)]
    if nbytes <= JOINED:
        return [b"".join([*lines, *answer.parts])]
    return [b"".join(lines), *(part for part in answer.parts if len(part))]
