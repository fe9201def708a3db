"""Requests to load and unload: their parameters, and refusals in the words that Triton's clients compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from onnx_dl.core import keywords
from onnx_dl.server.interfaces import Served
from onnx_dl.server.options import ModelControl
from onnx_dl.server.repository.layout import MOST_CONFIG
from onnx_dl.server.repository.loads import Outcome
from onnx_dl.server.v2.failures import RequestFailure, invalid, not_found

_CONFIG: Final = "config"
_FILE: Final = "file:"
_UNLOAD: Final = ("withdraw", "unload_dependents")
_NOT_POLLED: Final = "failed to poll from model repository"


def check_control(control: ModelControl) -> None:
    """Raises RequestFailure (400) unless clients may load and unload."""
    if control != "explicit":
        # Triton's words and status, which its clients' tests compare, in both modes.
        text = "explicit model load / unload is not allowed if polling is enabled"
        hint = f"the model control is '{control}'; start the server with --model-control explicit"
        raise RequestFailure(400, "UNAVAILABLE", f"{text} ({hint})")


def config_of(name: str, parameters: Mapping[str, Any]) -> str | None:
    """The configuration that replaces the file's, as JSON; None: there is none.

    Raises:
        RequestFailure: 400: a parameter is not known or not valid.
    """
    for given in parameters:
        if given.startswith(_FILE):
            # INTERNAL: as Triton has it, whose published example compares.
            text = f"failed to load '{name}', {_NOT_POLLED}: files in a request are not accepted"
            raise RequestFailure(400, "INTERNAL", text)
        if given != _CONFIG:
            hint = keywords.hint([given], [_CONFIG])
            raise invalid(f"failed to load '{name}', unrecognized load parameter '{given[:80]}'.{hint}")
    config = parameters.get(_CONFIG)
    if config is not None and not isinstance(config, str):
        raise invalid(f"failed to load '{name}', the parameter config is JSON as text")
    if config is not None and len(config) > MOST_CONFIG:
        raise invalid(f"failed to load '{name}', the parameter config has more than {MOST_CONFIG} characters")
    return config


def is_withdrawn(name: str, parameters: Mapping[str, Any]) -> bool:
    """True if an unload withdraws the model.  Raises RequestFailure (400)."""
    for given, value in parameters.items():
        if given not in _UNLOAD:
            hint = keywords.hint([given], _UNLOAD)
            raise invalid(f"failed to unload '{name}', unrecognized unload parameter '{given[:80]}'.{hint}")
        if not isinstance(value, bool):
            raise invalid(f"failed to unload '{name}', the parameter {given} is true or false")
    return bool(parameters.get("withdraw", True))


def unknown(name: str) -> RequestFailure:
    """There is no such model in any repository."""
    return not_found(f"failed to load '{name}', {_NOT_POLLED}")


def not_loaded(name: str, problem: str, *, is_clients: bool) -> RequestFailure:
    """The model's configuration or folder cannot be used.  ``is_clients``: the configuration came with the
    request."""
    text = f"failed to load '{name}', {problem}"
    return invalid(text) if is_clients else RequestFailure(503, "UNAVAILABLE", text, reason="BACKEND")


def load_failure(
    name: str, failed: Sequence[Outcome], broken: Mapping[str, str], *, is_clients: bool
) -> RequestFailure:
    """Some versions are not served.  ``is_clients``: a configuration that came with the request is at
    fault."""
    reasons = [*broken.values(), *(outcome.text for outcome in failed)]
    text = f"failed to load '{name}', {'; '.join(reasons)}"
    if is_clients:
        return invalid(text)
    waits = [getattr(outcome.error, "retry_after", None) for outcome in failed if outcome.is_passing]
    retry_after = max(wait or 1.0 for wait in waits) if waits else None
    return RequestFailure(503, "UNAVAILABLE", text, retry_after=retry_after, reason="BACKEND")


def reason_of_load(entry: Served, text: str) -> str:
    """Reason of a version that is not served, for the index."""
    return f"failed to load '{entry.name}' version {entry.version}: {text}"
