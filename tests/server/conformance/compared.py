"""What of an answer has to be equal, and where ours differs on purpose."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

WORDS: Final = ("Request for unknown model", "failed to load", "is not found", "has no available versions")
"""Words of errors that clients compare."""

_STRUCTURES: Final = (
    "model config", "statistics of a model", "trace settings", "trace settings of a model", "log settings",
)  # fmt: skip
"""Steps whose answers have the same keys and types, and other values."""


def structure(value: Any) -> Any:
    """Keys and types; of a list, those of its first item."""
    if isinstance(value, dict):
        return {key: structure(item) for key, item in value.items()}
    if isinstance(value, list):
        return [structure(item) for item in value[:1]]
    return type(value).__name__


def essence(step: str, outcome: dict[str, Any]) -> Any:
    """What has to be equal of one outcome."""
    if "message" in outcome:
        return {"status": outcome["status"], "words": [word for word in WORDS if word in outcome["message"]]}
    answer = outcome["answer"]
    if step in _STRUCTURES:
        return structure(answer)
    if step.startswith("model metadata"):
        many = answer if isinstance(answer, list) else [answer]
        return [{**one, "platform": ""} for one in many]
    if step == "server metadata":
        return sorted(answer)
    return answer


def plain_essence(outcome: dict[str, Any]) -> Any:
    """The same of a request over plain HTTP."""
    body = outcome["body"]
    if isinstance(body, dict) and "error" in body:
        return {"status": outcome["status"], "words": [word for word in WORDS if word in body["error"]]}
    if isinstance(body, dict) and "extensions" in body:
        body = sorted(body)
    return {"status": outcome["status"], "body": body}


class Difference(NamedTuple):
    """Where ours differs: what ours is by client (``http`` and ``grpc`` stand for both of their kinds)."""

    http: Any
    grpc: Any
    reason: str


def _error(status: int | str, *words: str) -> dict[str, Any]:
    return {
        "status": str(status) if isinstance(status, int) else f"StatusCode.{status}",
        "words": list(words),
    }


DIFFERENCES: Final[dict[str, Difference]] = {}
PLAIN_DIFFERENCES: Final[dict[str, tuple[Any, str]]] = {}
