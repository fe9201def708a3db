"""Requests over plain HTTP, as curl sends them."""

from __future__ import annotations

import http.client
import json
from typing import Any, Final

from tests.support.waiting import DEADLINE, allowed

_ROW: Final = list(range(16))


def _tensor(name: str, **changes: Any) -> dict[str, Any]:
    return {"name": name, "shape": [1, 16], "datatype": "INT32", "data": _ROW, **changes}


def _body(first: dict[str, Any] | None = None, **more: Any) -> bytes:
    first = _tensor("INPUT0") if first is None else first
    return json.dumps({"inputs": [first, _tensor("INPUT1")], **more}).encode()


_INFER: Final = "/v2/models/simple/infer"
REQUESTS: Final[dict[str, tuple[str, str, bytes | None]]] = {
    "GET v2": ("GET", "/v2", None),
    "GET v2/": ("GET", "/v2/", None),
    "live": ("GET", "/v2/health/live", None),
    "ready": ("GET", "/v2/health/ready", None),
    "model ready": ("GET", "/v2/models/simple/ready", None),
    "model ready, version": ("GET", "/v2/models/versions/versions/3/ready", None),
    "model ready, unknown": ("GET", "/v2/models/unknown/ready", None),
    "unknown path": ("GET", "/v2/unknown", None),
    "unknown root": ("GET", "/v3", None),
    "POST to metadata": ("POST", "/v2/models/simple", b"{}"),
    "GET of infer": ("GET", _INFER, None),
    "infer": ("POST", _INFER, _body()),
    "infer, nested": ("POST", _INFER, _body(_tensor("INPUT0", data=[_ROW]))),
    "infer, id": ("POST", _INFER, _body(id="mine")),
    "infer, version": ("POST", "/v2/models/versions/versions/1/infer", _body()),
    "infer, outputs": ("POST", _INFER, _body(outputs=[{"name": "OUTPUT1"}])),
    "infer, nothing": ("POST", _INFER, b""),
    "infer, empty object": ("POST", _INFER, b"{}"),
    "infer, no JSON": ("POST", _INFER, b"this is no JSON"),
    "infer, half JSON": ("POST", _INFER, _body()[:-10]),
    "infer, a list": ("POST", _INFER, b"[1, 2]"),
    "infer, inputs of a wrong kind": ("POST", _INFER, b'{"inputs": {"a": 1}}'),
    "infer, no name": ("POST", _INFER, _body({"shape": [1, 16], "datatype": "INT32", "data": _ROW})),
    "infer, no data": ("POST", _INFER, _body({"name": "INPUT0", "shape": [1, 16], "datatype": "INT32"})),
    "infer, no shape": ("POST", _INFER, _body({"name": "INPUT0", "datatype": "INT32", "data": _ROW})),
    "infer, unknown datatype": ("POST", _INFER, _body(_tensor("INPUT0", datatype="INT33"))),
    "infer, too few numbers": ("POST", _INFER, _body(_tensor("INPUT0", data=_ROW[:-1]))),
    "infer, too many numbers": ("POST", _INFER, _body(_tensor("INPUT0", data=[*_ROW, 1]))),
    "infer, text for numbers": ("POST", _INFER, _body(_tensor("INPUT0", data=["a"] * 16))),
    "infer, negative shape": ("POST", _INFER, _body(_tensor("INPUT0", shape=[-1, 16]))),
    "infer, shape of text": ("POST", _INFER, _body(_tensor("INPUT0", shape=["1", "16"]))),
    "infer, number too large": ("POST", _INFER, _body(_tensor("INPUT0", data=[2**40, *_ROW[1:]]))),
    "infer, unknown model": ("POST", "/v2/models/unknown/infer", _body()),
    "stats": ("GET", "/v2/models/unknown/stats", None),
    "index": ("POST", "/v2/repository/index", None),
    "index, ready only": ("POST", "/v2/repository/index", b'{"ready": true}'),
    "load, unknown": ("POST", "/v2/repository/models/unknown/load", b"{}"),
    "load, no body": ("POST", "/v2/repository/models/simple/load", None),
    "load, no JSON": ("POST", "/v2/repository/models/simple/load", b"no"),
    "shm, no key": ("POST", "/v2/systemsharedmemory/region/data/register", b"{}"),
    "shm, unknown region": ("GET", "/v2/systemsharedmemory/region/unknown/status", None),
}
"""Method, path, body."""


def post(
    address: str, path: str, body: bytes, headers: dict[str, str]
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Status, head and body of the answer."""
    connection = http.client.HTTPConnection(address, timeout=allowed(DEADLINE))
    try:
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def outcomes(address: str) -> dict[str, Any]:
    """By name: the status, and the body if it is JSON."""
    found = {}
    connection = http.client.HTTPConnection(address, timeout=allowed(DEADLINE))
    for name, (method, path, body) in REQUESTS.items():
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        try:
            told = json.loads(text)
        except ValueError:
            told = None
        found[name] = {"status": response.status, "body": told}
    connection.close()
    return found
