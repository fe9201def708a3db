"""The bridge to an ASGI application: one request whose body is there, one answer."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any
from urllib.parse import unquote

from starlette.applications import Starlette

from onnx_dl.server.http.answers import HttpAnswer
from onnx_dl.server.http.requests import HttpRequest

_OWN = {b"content-type", b"content-length", b"connection", b"transfer-encoding"}
"""Headers that the connection writes itself."""


async def call(app: Starlette, request: HttpRequest) -> HttpAnswer:
    """Return the application's answer.  Raises what the application raises without having answered."""
    conversation = _Conversation(bytes(request.body))
    try:
        await app(_scope(request), conversation.receive, conversation.send)
    except Exception:
        # Starlette raises again what it has answered, for servers to log.
        if conversation.answer is None:
            raise
    if conversation.answer is None:
        raise RuntimeError("The application did not answer.")
    return conversation.answer


def _scope(request: HttpRequest) -> dict[str, Any]:
    path, _, query = request.head.target.partition(b"?")
    path = _path(path)
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": request.head.version,
        "method": request.head.method,
        "scheme": "http",
        "path": unquote(path.decode("latin-1")),
        "raw_path": path,
        "root_path": "",
        "query_string": query,
        "headers": list(request.head.headers.items()),
    }


def _path(target: bytes) -> bytes:
    """The path of a target, which may be in the absolute form."""
    return target if target.startswith(b"/") else b"/" + target.partition(b"://")[2].partition(b"/")[2]


class _Conversation:
    """One request and its answer, as the messages of ASGI."""

    def __init__(self, body: bytes) -> None:
        self._body: bytes | None = body
        self._status = 0
        self._kind = b"application/json"
        self._headers: list[tuple[bytes, bytes]] = []
        self._parts: list[bytes] = []
        self.answer: HttpAnswer | None = None

    async def receive(self) -> dict[str, Any]:
        body, self._body = self._body, None
        if body is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            for name, value in message.get("headers", ()):
                if name == b"content-type":
                    self._kind = value
                elif name not in _OWN:
                    self._headers.append((name, value))
            return
        self._parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            self.answer = HttpAnswer(self._status, self._parts, self._kind, self._headers)
