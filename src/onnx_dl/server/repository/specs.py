"""Description of a served version's worker, as plain data for other processes, and as a ModelSpec.

Knows neither onnxruntime nor the configuration's words.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any, Final

import msgspec

from onnx_dl.core import environment
from onnx_dl.core.parsing import Allowances
from onnx_dl.core.spec import ModelSpec, specify
from onnx_dl.core.terms import Terms, WorkerOptions
from onnx_dl.server.interfaces import Served

_TERMS: Final = ("ttl", "latency", "pin", "priority")
_OF_ONNXRUNTIME: Final = ("options", "providers", "provider_options")
_KEPT: Final = ("environment", "group", "providers", "provider_options", "sandbox", "sha256")
_SIZES: Final = ("max_memory", "max_memory_hard", "max_runs")
_SUFFIX: Final = "+"
"""Begins the part of a generation that tells the contents of external data apart."""


def how(arguments: dict[str, Any]) -> dict[str, Any]:
    """The fields of a ModelSpec beside its key and path, from :attr:`Served.arguments`.  The values were
    checked where they entered."""
    worker = WorkerOptions(
        Allowances(*(arguments.get(name) for name in Allowances._fields)),
        arguments.get("group"),
        environment.parse(arguments.get("environment")),
        arguments.get("sha256") or {},
        bool(arguments.get("sandbox")),
    )
    return {
        **{name: arguments.get(name) for name in _OF_ONNXRUNTIME},
        "memory": None,
        "extra": arguments.get("extra") or {},
        "surroundings": {},
        **worker.fields(),
    }


def terms(arguments: dict[str, Any]) -> Terms:
    """The terms on which a process holds the model."""
    return Terms(**{name: arguments[name] for name in _TERMS if name in arguments})


def arguments_of(spec: ModelSpec, terms: Terms) -> dict[str, Any]:
    """:attr:`Served.arguments` of a model that is described already, as in a host's file."""
    found: dict[str, Any] = {
        **msgspec.structs.asdict(terms),
        **{name: getattr(spec, name) for name in (*_OF_ONNXRUNTIME, *Allowances._fields, "group", "extra")},
        "environment": dict(spec.environment.variables),
        "sha256": spec.sha256,
        "sandbox": spec.sandbox,
        "cwd": spec.cwd,
    }
    return {name: value for name, value in found.items() if value not in (None, {}, [])}


def within(limits: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a configuration that came with a load, within what the file's own configuration sets: a
    client drops and loosens none of that.

    Args:
        limits: arguments of the file's configuration.
        given: arguments of the client's.
    """
    kept = {name: limits[name] for name in _KEPT if limits.get(name)}
    sizes = {name: min(limits[name], given.get(name, limits[name])) for name in _SIZES if name in limits}
    found = given | kept | sizes
    if "max_memory_hard" in found and "max_memory" in found:
        found["max_memory"] = min(found["max_memory"], found["max_memory_hard"])
    return found


def generation(path: str, arguments: dict[str, Any], external: tuple[object, ...] = ()) -> str:
    """Identity of this content of the file with these arguments.

    It begins with the key that every program gives to this model, so that all share one worker.

    Args:
        path: the file.
        arguments: as in :attr:`Served.arguments`.
        external: identities of the files with its external data.

    Raises:
        OSError: the file cannot be looked at.
        ConfigError: its path is not UTF-8.
    """
    key = specify(path, None, _folder(path, arguments), how(arguments)).key
    if not external:
        return key
    digest = hashlib.sha256(msgspec.json.encode(external)).hexdigest()
    return f"{key}{_SUFFIX}{digest[:12]}"


def key_of(generation: str) -> str:
    """The key of the model's worker."""
    return generation.partition(_SUFFIX)[0]


def is_whole_key(generation: str) -> bool:
    """True if the key alone tells the content: there is no external data."""
    return _SUFFIX not in generation


def spec_of(entry: Served) -> ModelSpec:
    """The spec by which a process uses this version.  No file is looked at: it may have been replaced since,
    and then the worker of the file that was seen first is the right one."""
    return ModelSpec(
        key=key_of(entry.generation),
        name=entry.path,
        cwd=_folder(entry.path, entry.arguments),
        path=entry.path,
        **how(entry.arguments),
    )


def _folder(path: str, arguments: dict[str, Any]) -> str:
    """The folder in which relative paths in options begin."""
    return arguments.get("cwd") or os.path.dirname(path) or "/"
