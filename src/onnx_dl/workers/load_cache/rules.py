"""Rules of the load cache: which models it takes, and under which key; the order to save one.

A model is cached as onnxruntime saves it: optimized, with its weights in a file and prepacked for this CPU.
That form depends on everything that is in the key.  A model whose saved form could behave differently
(another provider than the CPU's, profiling, an optimized model that the user saves, options that are not
known to be harmless) is not cached.  Providers that compile have caches of their own, which are enabled here.
"""

from __future__ import annotations

import functools
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from onnx_dl.core.spec import ModelSpec, model_identity, model_key
from onnx_dl.core.status import ModelDescription

SMALLEST: Final = 8 << 20
"""Bytes of weights below which a saved form does not save enough time."""

_HARMLESS: Final = ("session.intra_op", "session.inter_op", "session.set_denormal_as_zero")
_OFF: Final = {"enable_profiling": False, "optimized_model_filepath": ""}
_SAVE: Final = {
    "session.save_external_prepacked_constant_initializers": "1",
    "session.optimized_model_external_initializers_min_size_in_bytes": "4096",
}
_UNOPTIMIZED: Final = "ORT_DISABLE_ALL"

_Options = dict[str, object]

_ENGINE_CACHES: Final[dict[str, dict[str, str]]] = {
    "TensorrtExecutionProvider": {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": "{folder}",
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": "{folder}",
    },
    "NvTensorRTRTXExecutionProvider": {"nv_runtime_cache_path": "{folder}"},
    "OpenVINOExecutionProvider": {"cache_dir": "{folder}"},
    "MIGraphXExecutionProvider": {"migraphx_model_cache_dir": "{folder}"},
    "CoreMLExecutionProvider": {"ModelCacheDirectory": "{folder}"},
}
"""Options of providers that compile models, from onnxruntime's documentation of each provider."""


class SaveOrder(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is worth saving; sent as JSON from the worker to :mod:`onnx_dl.workers.saver`."""

    key: str
    onnxruntime: str
    """Version and build."""
    spec: ModelSpec
    description: ModelDescription
    nbytes: int
    """Size of the model's files, or of its bytes."""


def is_cacheable(spec: ModelSpec) -> bool:
    """Tells whether the saved form behaves like the model with all these options."""
    options = spec.options or {}
    keys: Mapping[str, str] = options.get("config", {})
    return (
        not spec.sandbox
        and not (spec.path or "").endswith(".ort")
        and set(spec.extra) <= {"enable_fallback", "tuple"}
        and "calls" not in options
        and not spec.surroundings.get("libraries")
        and all(key.startswith(_HARMLESS) for key in keys)
        and all(options.get(name, value) in (value, None) for name, value in _OFF.items())
        and {*spec.provider_names} <= {"CPUExecutionProvider"}
    )


def is_temporary(spec: ModelSpec) -> bool:
    """Tells whether the file lies in the system's temporary folder: it is hardly loaded a second time."""
    return spec.path is not None and os.path.realpath(spec.path).startswith(
        os.path.join(os.path.realpath(tempfile.gettempdir()), "")
    )


def key_of(spec: ModelSpec, onnxruntime: str) -> str:
    """Returns the key of a model as it is on disk now.  ``onnxruntime``: version and build.

    Raises:
        OSError: stat() of its file fails.
    """
    identity = spec.blob if spec.path is None else model_identity(spec.path)
    how = (
        spec.options,
        spec.providers,
        spec.provider_options,
        spec.extra,
        spec.surroundings,
        spec.environment,
    )
    digests = (spec.sha256,) if spec.sha256 else ()
    return model_key(identity, *how, onnxruntime, _cpu(), *digests)


@functools.cache
def _cpu() -> str:
    """Returns model and features of the processor, for which the weights are packed."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("model", "flags", "Features", "CPU part")))


def saving(spec: ModelSpec, model: str, weights: str) -> ModelSpec:
    """Returns a spec with which onnxruntime saves the model when it loads it."""
    options = dict(spec.options or {})
    names = {"session.optimized_model_external_initializers_file_name": weights}
    options["optimized_model_filepath"] = model
    options["config"] = options.get("config", {}) | _SAVE | names
    return msgspec.structs.replace(spec, options=options)


def loading(spec: ModelSpec, model: str) -> ModelSpec:
    """Returns a spec of the saved model, which is optimized already."""
    options = dict(spec.options or {}) | {"graph_optimization_level": _UNOPTIMIZED}
    return msgspec.structs.replace(spec, path=os.path.abspath(model), blob=None, options=options)


def with_engine_caches(spec: ModelSpec, folder: Path) -> ModelSpec:
    """Enables the caches of providers that compile, unless the user has set options of these."""
    providers = spec.providers or []
    given = spec.provider_options or [{}] * len(providers)
    if len(given) != len(providers):
        return spec
    merged = [_merged(item, rest or {}) for item, rest in zip(providers, given, strict=True)]
    added = [_cache_options(name, options, folder) for name, options in merged]
    if not any(added):
        return spec
    cached = [[name, options | more] for (name, options), more in zip(merged, added, strict=True)]
    return msgspec.structs.replace(spec, providers=cached, provider_options=None)


def _merged(item: str | list[Any], rest: _Options) -> tuple[str, _Options]:
    name, options = item if isinstance(item, list) else (item, {})
    return name, {**options, **rest}


def _cache_options(name: str, options: _Options, folder: Path) -> _Options:
    """Returns options that enable the provider's cache; empty if it has none or the user has set one."""
    if any("cache" in option.lower() for option in options):
        return {}
    path = str(folder / "engines" / name)
    return {option: value.format(folder=path) for option, value in _ENGINE_CACHES.get(name, {}).items()}
