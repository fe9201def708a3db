"""Where our answers differ from tritonserver's on purpose, what ours are, and why."""

from __future__ import annotations

from typing import Any, Final, NamedTuple


class Difference(NamedTuple):
    """What ours is by client (``http`` and ``grpc`` stand for both of their kinds); SAME: tritonserver's."""

    http: Any
    grpc: Any
    reason: str


SAME: Final = object()


def _failure(status: int | str, *words: str) -> dict[str, Any]:
    """An HTTP status, or the name of a code of gRPC."""
    shown = str(status) if isinstance(status, int) else f"StatusCode.{status}"
    return {"status": shown, "words": list(words)}


def _refused(reason: str, *words: str) -> Difference:
    """400 and INVALID_ARGUMENT."""
    return Difference(_failure(400, *words), _failure("INVALID_ARGUMENT", *words), reason)


_UNKNOWN: Final = ("Request for unknown model", "is not found")
_MISTAKE: Final = "a client's mistake is 4xx; 5xx is the server's alone"
_BROKEN: Final = {"name": "broken", "version": "1", "state": "UNAVAILABLE", "reason": "why"}
_READY: Final = [
    {"name": name, "version": version, "state": "READY"}
    for name, version in (
        ("simple", "1"), ("text", "1"), ("types", "1"), ("versions", "1"), ("versions", "3"),
    )
]  # fmt: skip

CALLS: Final[dict[str, Difference]] = {
    "model metadata of a version that is no number": Difference(
        _failure(400), SAME, "the same status for both protocols"
    ),
    "statistics of an unknown model": Difference(
        _failure(404, *_UNKNOWN), _failure("NOT_FOUND", *_UNKNOWN), "an unknown model is 404 in every call"
    ),
    "trace settings changed": _refused("requests are not traced: settings are answered, not claimed"),
    "log settings changed": _refused("the log is the program's: settings are answered, not claimed"),
    "index": Difference(
        [_BROKEN, *_READY], [_BROKEN, *_READY], "a file that cannot be served is told before it is loaded"
    ),
    "unload and load": Difference(
        [None, True, False, None, True, [{"name": "text", "version": "1", "state": "READY"}]],
        [None, True, False, None, True, [{"name": "text", "version": "1", "state": "READY"}]],
        "one model must not make the server unready, unless --strict-readiness asks for that",
    ),
    "load an unknown model": Difference(
        _failure(404, "failed to load"), _failure("NOT_FOUND", "failed to load"), _MISTAKE
    ),
    "load a broken model": Difference(
        _failure(503, "failed to load"),
        _failure("UNAVAILABLE", "failed to load"),
        "the request is right, the file is not; and clients look for these words",
    ),
    "shm register an offset within a page": Difference(
        None, None, "a region may begin anywhere: it is not mapped at its offset"
    ),
    "shm register a key that is not there": _refused(_MISTAKE),
    "shm infer an output that is larger than its place": _refused(_MISTAKE),
    "cuda shm register": Difference(SAME, _failure("UNIMPLEMENTED"), "CUDA shared memory is not there yet"),
}
"""By step."""

_BAD_JSON: Final = {"status": 400, "words": []}
PLAIN: Final[dict[str, tuple[Any, str]]] = {
    **{
        f"infer, {what}": (_BAD_JSON, _MISTAKE)
        for what in (
            "empty object", "no JSON", "half JSON", "a list", "inputs of a wrong kind", "no name", "no shape",
            "too few numbers", "too many numbers", "text for numbers", "negative shape", "shape of text",
        )
    },
    "infer, number too large": (_BAD_JSON, "tritonserver cuts the number off without a word"),
    "stats": ({"status": 404, "words": list(_UNKNOWN)}, "an unknown model is 404 in every call"),
    "index": (
        {"status": 200, "body": [_BROKEN, *_READY]},
        "a file that cannot be served is told before it is loaded",
    ),
    "load, unknown": ({"status": 404, "words": ["failed to load"]}, _MISTAKE),
    "load, no JSON": (_BAD_JSON, _MISTAKE),
}  # fmt: skip
"""By request."""

FIELDS: Final = {
    "model config": ("model_transaction_policy", "platform", "kind"),
    "statistics of a model": ("batch_stats", "fail"),
}
"""Fields that are not compared.  What was recorded is the configuration of a model of the Python backend, and
has not the first two; its kind is KIND_CPU, and ours KIND_AUTO, because providers say where a model runs.
Batches are not counted by their size.  A message leaves out failures if there were none."""
