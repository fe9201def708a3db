"""Settings of a patch: checks them, and reads them from a command line.

Imports nothing heavy: :mod:`onnx_dl.integrations.onnxruntime_patch`, which applies them, imports numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from onnx_dl.core import digests, keywords, parsing
from onnx_dl.core.environment import parse as parse_environment
from onnx_dl.errors import ConfigError

_PARSE: Final[dict[str, Callable[[object], object]]] = {
    "ttl": parsing.parse_ttl,
    "latency": parsing.parse_latency,
    "environment": parse_environment,
    "sha256": digests.parse,
    "sandbox": parsing.parse_switch,
    "eager": parsing.parse_switch,
    "in_process": parsing.parse_switch,
    "isolation": parsing.parse_switch,
}


def checked(settings: Mapping[str, object], of: str) -> dict[str, object]:
    """Parses the settings of one model, or of all; ``of`` names them in errors.  Raises ConfigError for one
    that does not exist, or a value that is not allowed."""
    if strange := set(settings) - set(_PARSE):
        raise ConfigError(
            f"{of} has no setting {sorted(strange)}; there are {sorted(_PARSE)}."
            + keywords.hint(sorted(strange), _PARSE)
        )
    found = {name: _PARSE[name](value) for name, value in settings.items()}
    if (in_process := found.pop("in_process", None)) is not None:  # its older name
        found["isolation"] = False if in_process else None
    return found


def parse_models(texts: Iterable[str]) -> dict[str, dict[str, str]]:
    """Reads texts ``GLOB:NAME=VALUE`` or ``GLOB:NAME=VALUE,NAME=VALUE`` as ``models`` of :func:`patch`.
    Raises ConfigError for others."""
    found: dict[str, dict[str, str]] = {}
    for text in texts:
        glob, colon, settings = text.rpartition(":")
        pairs = [part.partition("=") for part in settings.split(",")]
        if not (glob and colon and all(equals for _, equals, _ in pairs)):
            raise ConfigError(f"{text!r} is no setting; write, for example, 'vad*.onnx:ttl=-1'.")
        found.setdefault(glob, {}).update({name: value for name, _, value in pairs})
    return found
