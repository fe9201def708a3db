"""Rules of the load cache: which models it takes, and under which key; the order to save one.

A model for the CPU is cached as onnxruntime saves it: optimized, with its weights in a file and prepacked for
this CPU.  That form depends on everything that is in the key.  A model for CUDA is cached as it is, with its
weights in a file (:mod:`onnx_dl.workers.load_cache.external_form`); that form depends on the model alone.  A
model whose saved form could behave differently (other providers, profiling, an optimized model that the user
saves, options that are not known to be harmless) is not cached.  Providers that compile have caches of their
own, which are enabled here.
"""

from __future__ import annotations

import enum
import functools
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from onnx_dl.core.spec import ModelSpec, model_identity, model_key
from onnx_dl.core.status import ModelDescription

ABOUT_FILES: Final = ("compile", "context", "external", "file", "folder", "format", "ort_model")
"""Parts of the names of session config entries that onnxruntime combines with the model's path."""
_CPU: Final = "CPUExecutionProvider"
_CUDA: Final = "CUDAExecutionProvider"
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


class SavedForm(enum.Enum):
    """Form of a saved model.  The value: bytes below which it does not save enough time."""

    OPTIMIZED = 8 << 20
    """Optimized and prepacked by onnxruntime, for the CPU."""
    EXTERNAL = 32 << 20
    """The model as it is, with its weights in another file, for CUDA.  A load of 512 MB takes 0.9 s less."""

    def serves(self, providers: Sequence[str]) -> bool:
        """Tells whether a session with these providers gains by it."""
        return {*providers} == ({_CPU} if self is SavedForm.OPTIMIZED else {_CUDA, _CPU})


class SaveOrder(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is worth saving; sent as JSON from the worker to :mod:`onnx_dl.workers.saver`."""

    key: str
    onnxruntime: str
    """Version and build."""
    spec: ModelSpec
    description: ModelDescription
    nbytes: int
    """Size of the model's files, or of its bytes."""

    @property
    def in_memory(self) -> int:
        """Bytes of the model that a saver has in memory.  The external form is written part by part."""
        return 0 if form_of(self.spec) is SavedForm.EXTERNAL else self.nbytes


def form_of(spec: ModelSpec) -> SavedForm | None:
    """Returns the form that behaves like the model with all these options; None: it is not cached."""
    options = spec.options or {}
    keys: Mapping[str, str] = options.get("config", {})
    if (
        spec.sandbox
        or (spec.path or "").endswith(".ort")
        or not set(spec.extra) <= {"enable_fallback", "tuple"}
        or "calls" in options
        or spec.surroundings.get("libraries")
        or any(options.get(name, value) not in (value, None) for name, value in _OFF.items())
    ):
        return None
    if SavedForm.OPTIMIZED.serves([_CPU, *spec.provider_names]):
        return SavedForm.OPTIMIZED if all(key.startswith(_HARMLESS) for key in keys) else None
    # Optimized at each load, with the options that the user gave.  So those are harmless that name no file.
    is_harmless = not any(part in key for key in keys for part in ABOUT_FILES)
    return (
        SavedForm.EXTERNAL
        if is_harmless and SavedForm.EXTERNAL.serves([_CPU, *spec.provider_names])
        else None
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
    digests = (spec.sha256,) if spec.sha256 else ()
    if form_of(spec) is SavedForm.EXTERNAL:
        return model_key(identity, SavedForm.EXTERNAL.name, *digests)
    how = (
        spec.options,
        spec.providers,
        spec.provider_options,
        spec.extra,
        spec.surroundings,
        spec.environment,
    )
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
    """Returns a spec of the saved model.  One that is optimized already is not optimized again."""
    options = spec.options
    if form_of(spec) is SavedForm.OPTIMIZED:
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
