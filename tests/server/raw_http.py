"""HTTP by hand, for clients that no library would be."""

from __future__ import annotations

import json
import socket
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """An answer as it came.  ``headers`` by name in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        """The sentence of a refusal."""
        text: str = json.loads(self.body)["error"]
        return text


def request(
    target: str = "/v2/health/live", method: str = "GET", body: bytes | None = None, **headers: object
) -> bytes:
    """A request.  Names of headers have ``_`` for ``-``."""
    lines = [f"{method} {target} HTTP/1.1"]
    sent = {"Host": "localhost", **headers}
    if body is not None:
        sent.setdefault("Content_Length", len(body))
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in sent.items()]
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


def infer(
    items: list[float] | None = None,
    model: str = "echo",
    parameters: dict[str, Any] | None = None,
    **headers: object,
) -> bytes:
    """A request to infer, in JSON."""
    items = [1.0, 2.0] if items is None else items
    tensor = {"name": "x", "shape": [len(items)], "datatype": "FP32", "data": items}
    body = json.dumps({"inputs": [tensor], "parameters": parameters or {}}).encode()
    return request(f"/v2/models/{model}/infer", "POST", body, **headers)


def binary_infer(nbytes: int, **headers: object) -> tuple[bytes, bytes]:
    """Head and body of a request with one input of UINT8, whose bytes are zeros."""
    tensor = {
        "name": "x", "shape": [nbytes], "datatype": "UINT8", "parameters": {"binary_data_size": nbytes},
    }  # fmt: skip
    text = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    body = text + bytes(nbytes)
    whole = request(
        "/v2/models/echo/infer", "POST", body, Inference_Header_Content_Length=len(text), **headers
    )
    return whole[: -len(body)], body


class Reader:
    """Reads answers from a socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._left = b""

    def reply(self, *, has_body: bool = True) -> Reply:
        """The next answer.  Raises ConnectionError if the server closes before it is there."""
        while b"\r\n\r\n" not in self._left:
            self._more()
        head, _, self._left = self._left.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        length = int(headers.get("content-length", 0)) if has_body else 0
        while len(self._left) < length:
            self._more()
        body, self._left = self._left[:length], self._left[length:]
        return Reply(int(first.split()[1]), headers, body)

    def is_at_end(self) -> bool:
        """True if the server has closed, and nothing more came."""
        try:
            return not self._left and not self._connection.recv(1)
        except ConnectionResetError:
            return True

    def _more(self) -> None:
        got = self._connection.recv(1 << 20)
        if not got:
            raise ConnectionError(f"the server closed after {self._left!r}")
        self._left += got


def ask(connection: socket.socket, data: bytes, *, has_body: bool = True) -> Reply:
    """Sends bytes and reads one answer."""
    connection.sendall(data)
    return Reader(connection).reply(has_body=has_body)
