"""The part of Triton's ModelConfig that is understood, as plain data.

Three kinds of fields: those that are understood; those that change no result, which are told of once; those
that would change results, which are refused with file and line.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from onnx_dl.core import keywords, parsing
from onnx_dl.errors import ConfigError
from onnx_dl.server.repository import session_options, versions
from onnx_dl.server.repository.schema import Path
from onnx_dl.server.repository.session_options import OURS
from onnx_dl.server.repository.source import Source

DEFAULT_TTL: Final = 300.0
"""Seconds without use after which a served model is unloaded."""
PLATFORM: Final = "onnxruntime_onnx"
BACKEND: Final = "onnxruntime"
_PARAMETERS: Final = (
    "ttl", "pin", "priority", "latency", "max_memory", "max_memory_hard", "max_runs", "group", "eager",
    "sandbox",
)  # fmt: skip
"""Names of our parameters, behind ``onnx_dl.``."""
_REFUSED: Final = {
    "sequence_batching": "sequence batching is not there: requests of a sequence would be mixed",
    "ensemble_scheduling": "ensembles are not there",
    "batch_input": "batch inputs are not there: the model would not get them",
    "batch_output": "batch outputs are not there",
    "model_operations": "libraries of operators are not there",
    "model_repository_agents": "repository agents are not there: they may change the model",
    "cc_model_filenames": "other files by compute capability are not there",
}
_TOLD: Final = {
    "metric_tags": "metric tags have no effect",
    "model_metrics": "metrics of the model have no effect",
    "response_cache": "there is no response cache; each request runs",
}
_OF_INPUT: Final = {
    "reshape": "reshape is not there: give dims as the model has them",
    "is_shape_tensor": "shape tensors are not there",
    "allow_ragged_batch": "ragged batches are not there",
    "is_non_linear_format_io": "non-linear formats are not there",
}


class Declared(msgspec.Struct, frozen=True):
    """One input or output of a configuration.  ``dims`` are without the batch if there is one; None: not
    given.  ``datatype`` empty: not given."""

    name: str
    datatype: str
    dims: tuple[int, ...] | None
    is_optional: bool
    path: Path


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """Content of a configuration.

    Attributes:
        max_batch_size: 0: the model's own first size is no batch.
        filename: ``default_model_filename``; empty: not given.
        policy: which versions are served, in Triton's JSON form.
        inputs, outputs: as declared; the model may have more.
        arguments: as in :attr:`~onnx_dl.server.interfaces.Served.arguments`.
        warmups: ``model_warmup`` in Triton's JSON form.
        max_queue_size: requests that may wait or run; 0: the default.
    """

    max_batch_size: int = 0
    filename: str = ""
    policy: dict[str, Any] = msgspec.field(default_factory=lambda: dict(versions.DEFAULT))
    inputs: tuple[Declared, ...] = ()
    outputs: tuple[Declared, ...] = ()
    arguments: dict[str, Any] = msgspec.field(default_factory=lambda: {"ttl": DEFAULT_TTL})
    warmups: tuple[dict[str, Any], ...] = ()
    is_eager: bool = False
    max_queue_size: int = 0


def understood(source: Source, model: str) -> Configuration:
    """Reads a configuration of this model; ``source.notes`` gets what is told once.

    Raises:
        Refused: it cannot be used, with file and line.
    """
    _check_kind(source, model)
    for name, why in _REFUSED.items():
        given = source.plain.get(name)
        is_choice = name in ("sequence_batching", "ensemble_scheduling")  # also an empty one is a choice
        if given or (is_choice and given is not None):
            source.refuse((name,), f"{name}: {why}")
    if source.get("model_transaction_policy", "decoupled"):
        source.refuse(("model_transaction_policy", "decoupled"), "decoupled models are not there")
    for name, why in _TOLD.items():
        if source.plain.get(name) not in (None, [], {}, {"enable": False}):
            source.note((name,), f"{name}: {why}")
    batch = source.get("max_batch_size", default=0)
    if batch < 0:
        source.refuse(("max_batch_size",), f"'max_batch_size' must be non-negative value, not {batch}")
    ours, is_eager = _ours(source)
    _tell_of_optimization(source)
    return Configuration(
        max_batch_size=batch,
        filename=_filename(source),
        policy=_policy(source),
        inputs=tuple(_declared(source, "input")),
        outputs=tuple(_declared(source, "output")),
        arguments={"ttl": DEFAULT_TTL, **session_options.arguments(source), **ours},
        warmups=tuple(_warmups(source)),
        is_eager=is_eager,
        max_queue_size=_queue(source),
    )


def _check_kind(source: Source, model: str) -> None:
    name = source.get("name", default="")
    if name and name != model:
        text = f"unexpected directory name '{model}' for model '{name[:80]}', they must be equal"
        source.refuse(("name",), text)
    platform = source.get("platform", default="")
    if platform not in ("", PLATFORM):
        source.refuse(("platform",), f"the platform is {PLATFORM} only, not '{platform[:80]}'")
    backend = source.get("backend", default="")
    if backend not in ("", BACKEND):
        source.refuse(("backend",), f"the backend is {BACKEND} only, not '{backend[:80]}'")
    runtime = source.get("runtime", default="")
    if runtime and BACKEND not in runtime:
        source.refuse(("runtime",), f"the runtime is {BACKEND} only, not '{runtime[:80]}'")


def _filename(source: Source) -> str:
    name: str = source.get("default_model_filename", default="")
    if name and ("/" in name or name in (".", "..") or not name.isprintable()):
        at = ("default_model_filename",)
        source.refuse(at, f"default_model_filename is the name of a file, not {name[:80]!r}")
    return name


def _policy(source: Source) -> dict[str, Any]:
    policy: dict[str, Any] = source.get("version_policy", default={}) or versions.DEFAULT
    if "latest" in policy:
        count = policy["latest"].get("num_versions", 1)
        if not count:
            source.refuse(("version_policy", "latest"), "num_versions is 1 or more")
        return {"latest": {"num_versions": count}}
    if "specific" in policy:
        numbers = policy["specific"].get("versions", [])
        if not numbers or any(number < 1 for number in numbers):
            source.refuse(("version_policy", "specific"), "specific takes versions from 1 on")
    return policy


def _declared(source: Source, role: str) -> list[Declared]:
    found: list[Declared] = []
    for index, each in enumerate(source.get(role, default=[])):
        at: Path = (role, index)
        name = each.get("name", "")
        if not name:
            source.refuse(at, f"{role} {index} has no name")
        if any(name == other.name for other in found):
            source.refuse(at, f"the {role} '{name[:80]}' is given twice")
        for field, why in _OF_INPUT.items():
            if each.get(field, False) is not False:  # an empty reshape is one, too: to a scalar
                source.refuse((*at, field), f"{role} '{name[:80]}': {why}")
        if each.get("format", "FORMAT_NONE") != "FORMAT_NONE":
            text = f"input '{name[:80]}': a format changes nothing here; give dims as the model has them"
            source.refuse((*at, "format"), text)
        if each.get("label_filename"):
            text = f"output '{name[:80]}': labels have no effect, because classification is not there"
            source.note((*at, "label_filename"), text)
        dims = each.get("dims")
        if dims is not None and any(size < -1 or size == 0 for size in dims):
            source.refuse((*at, "dims"), f"{role} '{name[:80]}': dims are sizes from 1 on, or -1")
        kind = each.get("data_type", "TYPE_INVALID")
        datatype = "BYTES" if kind == "TYPE_STRING" else kind.removeprefix("TYPE_").replace("INVALID", "")
        sizes = None if dims is None else tuple(dims)
        found.append(Declared(name, datatype, sizes, bool(each.get("optional")), at))
    return found


def _ours(source: Source) -> tuple[dict[str, Any], bool]:
    """Arguments from the parameters ``onnx_dl.x``, and whether the model is loaded at the start."""
    given: dict[str, str] = {}
    for name, value in source.get("parameters", default={}).items():
        if not name.startswith(OURS):
            continue
        short = name.removeprefix(OURS)
        if short not in _PARAMETERS:
            hint = keywords.hint([short], _PARAMETERS)
            known = hint or f" Known are: {', '.join(OURS + each for each in _PARAMETERS)}."
            source.refuse(("parameters", name), f"{name[:80]} is not a parameter.{known}")
        given[short] = value.get("string_value", "").strip()
    try:
        found = _parsed(given)
    except ConfigError as error:
        named = next((name for name in given if str(error).startswith(f"{name}=")), next(iter(given), ""))
        source.refuse(("parameters", OURS + named), str(error))
    return found, bool(found.pop("eager", False))


def _parsed(given: dict[str, str]) -> dict[str, Any]:
    """The texts as values, by the parsers that also check arguments of a proxy.  Raises ConfigError."""
    found: dict[str, Any] = {}
    if "ttl" in given:
        found["ttl"] = parsing.parse_ttl(given["ttl"])
    if "latency" in given:
        found["latency"] = parsing.parse_latency(given["latency"])
    for name in ("pin", "eager", "sandbox"):
        if name in given:
            try:
                found[name] = parsing.parse_switch(given[name])
            except ConfigError:
                raise ConfigError(f"{name}={given[name]!r} is neither true nor false.") from None
    if "priority" in given:
        found["priority"] = parsing.parse_priority(_whole(given["priority"]))
    if "group" in given:
        found["group"] = parsing.parse_group(given["group"])
    sizes = {name: given.get(name) for name in ("max_memory", "max_memory_hard")}
    for name, text in sizes.items():
        if text is not None:
            try:
                parsing.parse_size(text)
            except ConfigError as error:
                raise ConfigError(f"{name}={error}") from None
    runs = _whole(given["max_runs"]) if "max_runs" in given else None
    limits = parsing.parse_allowances(sizes["max_memory"], sizes["max_memory_hard"], runs)
    return found | {name: value for name, value in limits._asdict().items() if value is not None}


def _whole(text: str) -> object:
    """The number of a text; a text that is none stays as it is, and is refused by its parser."""
    return int(text) if len(text) <= 20 and text.lstrip("-").isdecimal() and text.isascii() else text


def _queue(source: Source) -> int:
    """Most requests that wait or run.  The rest of dynamic batching is told of."""
    batching = source.get("dynamic_batching")
    if batching is None:
        return 0
    policy = batching.get("default_queue_policy", {})
    told = {name for name, value in batching.items() if value} - {"default_queue_policy"}
    if told or not policy:
        source.note(("dynamic_batching",), "dynamic_batching is not there yet; each request runs by itself")
    for name in policy.keys() - {"max_queue_size"}:
        if policy[name] not in (0, False, "REJECT"):
            at = ("dynamic_batching", "default_queue_policy", name)
            source.note(at, f"{name} is not there yet; requests have deadlines of their own")
    return int(policy.get("max_queue_size", 0))


def _warmups(source: Source) -> list[dict[str, Any]]:
    for index, each in enumerate(source.get("model_warmup", default=[])):
        at: Path = ("model_warmup", index)
        if not each.get("inputs"):
            source.refuse(at, "a warm-up has inputs")
        for name, given in each["inputs"].items():
            kinds = [kind for kind in ("zero_data", "random_data", "input_data_file") if given.get(kind)]
            if len(kinds) != 1:
                text = f"warm-up input '{name[:80]}' has one of zero_data, random_data and input_data_file"
                source.refuse((*at, "inputs", name), text)
            if given.get("data_type", "TYPE_INVALID") == "TYPE_INVALID":
                source.refuse((*at, "inputs", name), f"warm-up input '{name[:80]}' has no data_type")
            if any(size < 0 for size in given.get("dims", ())):
                source.refuse((*at, "inputs", name), f"warm-up input '{name[:80]}': dims are sizes from 0 on")
            file = given.get("input_data_file", "")
            if file and ("/" in file or file in (".", "..") or "\0" in file):
                text = f"input_data_file is the name of a file in the folder warmup, not {file[:80]!r}"
                source.refuse((*at, "inputs", name), text)
    return list(source.get("model_warmup", default=[]))


def _tell_of_optimization(source: Source) -> None:
    given = source.get("optimization", default={})
    for name in ("priority", "cuda", "gather_kernel_buffer_threshold", "eager_batching"):
        if given.get(name) not in (None, {}, 0, False, "PRIORITY_DEFAULT"):
            source.note(("optimization", name), f"optimization.{name} has no effect here")
