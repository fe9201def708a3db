"""What may come from the load cache, and under which key: rules; files are :mod:`onnx_dl.workers.load_cache.store`'s.

A model is cached as onnxruntime saves it: optimized, with its weights beside it and prepacked for this CPU.
That form depends on everything that is in the key.  Where it could mean something else than the model
(another provider than the CPU's, profiling, a user who saves the model himself, options that are not known to
be harmless), the model loads plainly.  Providers that compile have caches of their own, switched on here.
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

SMALLEST: Final = 8 << 20
"""Bytes of weights below which a saved form saves nothing worth a file."""

_HARMLESS: Final = ("session.intra_op", "session.inter_op", "session.set_denormal_as_zero")
_OFF: Final = {"enable_profiling": False, "optimized_model_filepath": ""}
_SAVE: Final = {
    "session.save_external_prepacked_constant_initializers": "1",
    "session.optimized_model_external_initializers_min_size_in_bytes": "4096",
}
_UNOPTIMIZED: Final = "ORT_DISABLE_ALL"

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
"""Options of providers that compile models, from onnxruntime's page of each provider."""


def is_cacheable(spec: ModelSpec) -> bool:
    """Whether the options leave no doubt that the saved form is the same model."""
    options = spec.options or {}
    keys: Mapping[str, str] = options.get("config", {})
    return (
        not (spec.path or "").endswith(".ort")
        and set(spec.extra) <= {"enable_fallback", "tuple"}
        and "calls" not in options
        and not spec.surroundings.get("libraries")
        and all(key.startswith(_HARMLESS) for key in keys)
        and all(options.get(name, value) in (value, None) for name, value in _OFF.items())
        and _providers(spec) <= {"CPUExecutionProvider"}
    )


def is_passing(spec: ModelSpec) -> bool:
    """Whether the file lies in the system's temporary folder: it will hardly be there the next time."""
    return spec.path is not None and os.path.realpath(spec.path).startswith(
        os.path.join(os.path.realpath(tempfile.gettempdir()), "")
    )


def _providers(spec: ModelSpec) -> set[str]:
    return {item[0] if isinstance(item, list) else item for item in spec.providers or []}


def key_of(spec: ModelSpec, onnxruntime: str) -> str:
    """The key of a model as it is on disk now.  ``onnxruntime``: version and build.

    Raises:
        OSError: its file cannot be looked at.
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
    return model_key(identity, *how, onnxruntime, _cpu())


@functools.cache
def _cpu() -> str:
    """What the weights are packed for: the processor's model and abilities."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("model", "flags", "Features", "CPU part")))


def saving(spec: ModelSpec, model: str, weights: str) -> ModelSpec:
    """How to load a model so that onnxruntime saves it."""
    options = dict(spec.options or {})
    names = {"session.optimized_model_external_initializers_file_name": weights}
    options["optimized_model_filepath"] = model
    options["config"] = options.get("config", {}) | _SAVE | names
    return msgspec.structs.replace(spec, options=options)


def loading(spec: ModelSpec, model: str) -> ModelSpec:
    """How to load a model that was saved: it is optimized already."""
    options = dict(spec.options or {}) | {"graph_optimization_level": _UNOPTIMIZED}
    return msgspec.structs.replace(spec, path=os.path.abspath(model), blob=None, options=options)


def with_engine_caches(spec: ModelSpec, folder: Path) -> ModelSpec:
    """Providers that compile keep what they compiled, unless the user said anything of that."""
    providers = spec.providers or []
    given = spec.provider_options or [{}] * len(providers)
    cached = [
        _with_engine_cache(item, rest or {}, folder) for item, rest in zip(providers, given, strict=False)
    ]
    if len(given) != len(providers) or not any(cached):
        return spec
    merged = [
        new or _merged(item, rest or {}) for new, item, rest in zip(cached, providers, given, strict=True)
    ]
    return msgspec.structs.replace(spec, providers=merged, provider_options=None)


def _merged(item: Any, rest: dict[str, Any]) -> list[Any]:
    name, options = item if isinstance(item, list) else (item, {})
    return [name, {**options, **rest}]


def _with_engine_cache(item: Any, rest: dict[str, Any], folder: Path) -> list[Any] | None:
    name, options = _merged(item, rest)
    defaults = _ENGINE_CACHES.get(name, {})
    if not defaults or any("cache" in option.lower() for option in options):
        return None
    path = str(folder / "engines" / name)
    return [name, options | {option: value.format(folder=path) for option, value in defaults.items()}]
