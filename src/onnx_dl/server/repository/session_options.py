"""Triton's words for onnxruntime's session as plain data: threads, optimization, execution providers.

Names of parameters as in triton-inference-server/onnxruntime_backend.  onnxruntime is not imported.
"""

from __future__ import annotations

from typing import Any, Final

from onnx_dl.core import keywords
from onnx_dl.server.repository.source import Source

_CPU: Final = "CPUExecutionProvider"
_CUDA: Final = "CUDAExecutionProvider"
_LEVELS: Final = {
    -1: "ORT_ENABLE_BASIC",
    0: "ORT_ENABLE_ALL",
    1: "ORT_ENABLE_EXTENDED",
    2: "ORT_DISABLE_ALL",
}
_THREADS: Final = {
    "intra_op_thread_count": "intra_op_num_threads",
    "inter_op_thread_count": "inter_op_num_threads",
}
_FLAGS: Final = {"enable_mem_arena": "enable_cpu_mem_arena", "enable_mem_pattern": "enable_mem_pattern"}
_OF_CUDA: Final = {
    "cudnn_conv_algo_search": {"0": "EXHAUSTIVE", "1": "HEURISTIC", "2": "DEFAULT"},
    "gpu_mem_limit": {},
    "arena_extend_strategy": {"0": "kNextPowerOfTwo", "1": "kSameAsRequested"},
    "do_copy_in_default_stream": {},
}
"""Parameters of the model that are options of the CUDA provider, and what their numbers mean."""
_MODES: Final = {"0": "ORT_SEQUENTIAL", "1": "ORT_PARALLEL"}
_MOST_THREADS: Final = 4096
_CONFIG: Final = "session."
"""Begins the names of onnxruntime's config entries."""
OURS: Final = "onnx_dl."


def arguments(source: Source) -> dict[str, Any]:
    """``options``, ``providers`` of :attr:`Served.arguments`; those that are not given are not there.

    Raises:
        Refused: a value is not valid.
    """
    options: dict[str, Any] = {}
    config: dict[str, str] = {}
    cuda: dict[str, str] = {}
    level = source.get("optimization", "graph", "level", default=0)
    if level not in _LEVELS:
        where = ("optimization", "graph", "level")
        source.refuse(where, f"the graph level is -1 (basic), 0 (all), 1 (extended) or 2 (none), not {level}")
    if level:
        options["graph_optimization_level"] = _LEVELS[level]
    for name, value in source.get("parameters", default={}).items():
        text = value.get("string_value", "")
        at = ("parameters", name)
        if name in _THREADS:
            options[_THREADS[name]] = _number(source, name, text)
        elif name == "execution_mode":
            if text not in _MODES:
                source.refuse(at, f"execution_mode is 0 (sequential) or 1 (parallel), not {text[:40]!r}")
            options["execution_mode"] = _MODES[text]
        elif name in _FLAGS:
            options[_FLAGS[name]] = _flag(source, name, text)
        elif name in _OF_CUDA:
            cuda[name] = _OF_CUDA[name].get(text, text)
        elif name.startswith(_CONFIG):
            config[name] = text
        elif not name.startswith(OURS):
            hint = keywords.hint([name], (*_THREADS, *_FLAGS, *_OF_CUDA, "execution_mode"))
            source.note(at, f"the parameter {name[:80]} is not known and has no effect.{hint}")
    if config:
        options["config"] = config
    found: dict[str, Any] = {"options": options} if options else {}
    if (providers := _providers(source, cuda)) is not None:
        found["providers"] = providers
    return found


def _providers(source: Source, cuda: dict[str, str]) -> list[Any] | None:
    """Execution providers of the instance groups and accelerators; None: onnxruntime's default."""
    groups: list[dict[str, Any]] = source.get("instance_group", default=[])
    _tell_of_groups(source, groups)
    kind = groups[0].get("kind", "KIND_AUTO") if groups else "KIND_AUTO"
    gpus = groups[0].get("gpus", []) if groups else []
    if kind == "KIND_AUTO" and gpus:
        kind = "KIND_GPU"  # as Triton decides
    cuda = {**_accelerated(source), **cuda}
    if kind == "KIND_CPU":
        if gpus:
            source.refuse(("instance_group", 0, "gpus"), "an instance group of KIND_CPU has no gpus")
        return [_CPU]
    if kind == "KIND_GPU" or cuda:
        device = {"device_id": str(gpus[0])} if gpus else {}
        options = {**cuda, **device}
        return [[_CUDA, options] if options else _CUDA, _CPU]
    return None


def _tell_of_groups(source: Source, groups: list[dict[str, Any]]) -> None:
    for index, group in enumerate(groups):
        at = ("instance_group", index)
        count = group.get("count", 0)
        if count < 0:
            source.refuse((*at, "count"), f"count is a number of instances, not {count}")
        if count > 1:
            source.note((*at, "count"), f"count {count} is not there yet; one worker serves the model")
        if len(group.get("gpus", ())) > 1:
            source.note((*at, "gpus"), "several gpus are not there yet; the first one is used")
        if any(gpu < 0 for gpu in group.get("gpus", ())):
            source.refuse((*at, "gpus"), "gpus are numbers of devices from 0 on")
        for name in ("rate_limiter", "secondary_devices", "profile", "passive", "host_policy"):
            if group.get(name):
                source.note((*at, name), f"{name} has no effect here")
        if group.get("kind") == "KIND_MODEL":
            source.note((*at, "kind"), "KIND_MODEL has no effect here: onnxruntime's default is used")
    if len(groups) > 1:
        source.note(("instance_group", 1), "several instance groups are not there yet; the first one is used")


def _accelerated(source: Source) -> dict[str, str]:
    """Options of the CUDA provider from the accelerators; others are told of."""
    found: dict[str, str] = {}
    where = ("optimization", "execution_accelerators")
    for kind, known in (("gpu_execution_accelerator", "cuda"), ("cpu_execution_accelerator", "")):
        for index, each in enumerate(source.get(*where, kind, default=[])):
            name = each.get("name", "")
            if name and name == known:
                found |= each.get("parameters", {})
            elif name in ("tensorrt", "openvino"):
                source.note((*where, kind, index), f"the accelerator {name} is not there; it has no effect")
            else:
                source.refuse(
                    (*where, kind, index), f"unknown Execution Accelerator '{name[:80]}' is requested"
                )
    return found


def _number(source: Source, name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text[:9]) <= _MOST_THREADS):
        source.refuse(("parameters", name), f"{name} is from 0 to {_MOST_THREADS}, not {text[:40]!r}")
    return int(text[:9])


def _flag(source: Source, name: str, text: str) -> bool:
    if text not in ("0", "1"):
        source.refuse(("parameters", name), f"{name} is 0 or 1, not {text[:40]!r}")
    return text == "1"
