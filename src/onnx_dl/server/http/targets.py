"""All paths that are served, and which operation each is.  Pure.

The one table: a connection refuses by it before it reads a body, and the application's routes are made of it.
"""

from __future__ import annotations

import functools
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

from onnx_dl.server.v2.operations import Operation


class Route(NamedTuple):
    """``template``: a path; a part in braces is a name.  ``operations`` by method."""

    template: str
    name: str
    operations: dict[str, Operation]


class Target(NamedTuple):
    """A path that is served.  ``names``: values of the parts in braces."""

    route: Route
    names: dict[str, str]


def _get(template: str, name: str, operation: Operation) -> Route:
    return Route(template, name, {"GET": operation, "HEAD": operation})


def _post(template: str, name: str, operation: Operation) -> Route:
    return Route(template, name, {"POST": operation})


def _of_model(path: str, name: str, operation: Operation) -> list[Route]:
    """A question about a model, and the same about one version of it."""
    return [
        _get(f"/v2/models/{{model}}{path}", name, operation),
        _get(f"/v2/models/{{model}}/versions/{{version}}{path}", name, operation),
    ]


def _shared_memory(kind: str) -> list[Route]:
    base = f"/v2/{kind}sharedmemory"
    region = f"{base}/region/{{region}}"
    return [
        _get(f"{base}/status", f"{kind}_status", Operation.SHM_STATUS),
        _get(f"{region}/status", f"{kind}_status", Operation.SHM_STATUS),
        _post(f"{region}/register", f"{kind}_register", Operation.SHM_REGISTER),
        _post(f"{base}/unregister", f"{kind}_unregister", Operation.SHM_UNREGISTER),
        _post(f"{region}/unregister", f"{kind}_unregister", Operation.SHM_UNREGISTER),
    ]


def _settings(template: str, name: str) -> Route:
    return Route(template, name, dict.fromkeys(("GET", "HEAD", "POST"), Operation.SETTINGS))


INFER: Final = "infer"
METRICS: Final = "metrics"
ROUTES: Final = (
    _post("/v2/models/{model}/infer", INFER, Operation.INFER),
    _post("/v2/models/{model}/versions/{version}/infer", INFER, Operation.INFER),
    _get("/v2/health/live", "live", Operation.SERVER_LIVE),
    _get("/v2/health/ready", "ready", Operation.SERVER_READY),
    _get("/v2", "server", Operation.SERVER_METADATA),
    # Before the metadata of a model with this name.
    _get("/v2/models/stats", "statistics", Operation.STATISTICS),
    *_of_model("/ready", "model_ready", Operation.MODEL_READY),
    *_of_model("/config", "config", Operation.MODEL_CONFIG),
    *_of_model("/stats", "statistics", Operation.STATISTICS),
    *_of_model("", "metadata", Operation.MODEL_METADATA),
    _post("/v2/repository/index", "index", Operation.REPOSITORY_INDEX),
    _post("/v2/repository/models/{model}/load", "load", Operation.REPOSITORY_LOAD),
    _post("/v2/repository/models/{model}/unload", "unload", Operation.REPOSITORY_UNLOAD),
    *_shared_memory("system"),
    *_shared_memory("cuda"),
    _settings("/v2/trace/setting", "trace"),
    _settings("/v2/models/{model}/trace/setting", "trace"),
    _settings("/v2/logging", "logging"),
    _get("/v2/onnx_dl/models/{model}", "state", Operation.MODEL_STATE),
    _get("/v2/onnx_dl/models/{model}/versions/{version}", "state", Operation.MODEL_STATE),
    _get("/metrics", METRICS, Operation.METRICS),
)

_SPLIT: Final = tuple((route, route.template.split("/")[1:]) for route in ROUTES)
_CACHED_BYTES: Final = 512


def find_target(raw: bytes) -> Target | None:
    """The target of a request line; None: nothing is served there.  A name has no slash, however encoded."""
    return _cached(raw) if len(raw) <= _CACHED_BYTES else _find(raw)


def _find(raw: bytes) -> Target | None:
    path = raw.partition(b"?")[0]
    if not path.startswith(b"/"):
        # The absolute form, which clients of proxies send.
        scheme, found, rest = path.partition(b"://")
        if not found or scheme.lower() not in (b"http", b"https"):
            return None
        path = b"/" + rest.partition(b"/")[2]
    try:
        parts = [unquote_to_bytes(part).decode() for part in path.split(b"/")[1:]]
    except UnicodeDecodeError:
        return None
    if any("/" in part or "\0" in part for part in parts):
        return None
    for route, template in _SPLIT:
        if len(template) == len(parts) and (names := _match(template, parts)) is not None:
            return Target(route, names)
    return None


_cached = functools.lru_cache(1024)(_find)


def _match(template: list[str], parts: list[str]) -> dict[str, str] | None:
    names = {}
    for pattern, part in zip(template, parts, strict=True):
        if pattern.startswith("{"):
            if not part:
                return None
            names[pattern[1:-1]] = part
        elif pattern != part:
            return None
    return names
