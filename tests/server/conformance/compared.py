"""What of an answer has to be equal."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any, Final

from tests.server.conformance.differences import FIELDS

WORDS: Final = ("Request for unknown model", "failed to load", "is not found", "has no available versions")
"""Words of errors that clients compare."""

_STRUCTURES: Final = (
    "model config", "statistics of a model", "trace settings", "trace settings of a model", "log settings",
)  # fmt: skip
"""Steps whose answers have the same keys and types, and other values."""


def structure(value: Any, without: Collection[str] = ()) -> Any:
    """Keys and types; of a list, those of its first item.  Zeros of messages are left out, as they may be."""
    if isinstance(value, dict):
        found = {key: structure(item, without) for key, item in value.items() if key not in without}
        return {key: item for key, item in found.items() if item != {}}
    if isinstance(value, list):
        return [structure(item, without) for item in value[:1]]
    return type(value).__name__


def _sorted(answer: Any) -> Any:
    """With outputs by name: tritonserver answers in no order that a client can rely on."""
    if isinstance(answer, list):
        return [_sorted(one) for one in answer]
    if isinstance(answer, dict):
        found = {key: _sorted(value) for key, value in answer.items()}
        if "model_name" in found and "outputs" in found:
            found["outputs"].sort(key=operator.itemgetter("name"))
        if found.get("reason"):  # of a row of the index
            found["reason"] = "why"
        return found
    return answer


def _failed(status: int | str, message: str) -> dict[str, Any]:
    return {"status": status, "words": [word for word in WORDS if word in message]}


def agree(ours: Any, theirs: Any) -> bool:
    """Equal; a message of ours may have more words."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and "words" in ours and "words" in theirs:
        return ours["status"] == theirs["status"] and set(ours["words"]) >= set(theirs["words"])
    return bool(ours == theirs)


def essence(step: str, outcome: dict[str, Any]) -> Any:
    """What has to be equal of one outcome."""
    if "message" in outcome:
        return _failed(outcome["status"], outcome["message"])
    answer = _sorted(outcome["answer"])
    if step in _STRUCTURES:
        return structure(answer, FIELDS.get(step, ()))
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
        return _failed(outcome["status"], body["error"])
    if isinstance(body, dict) and "extensions" in body:
        body = sorted(body)
    return {"status": outcome["status"], "body": _sorted(body)}
