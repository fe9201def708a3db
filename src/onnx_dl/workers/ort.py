"""onnxruntime as an engine."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Final

import onnxruntime
from numpy.typing import NDArray

from onnx_dl import config
from onnx_dl.model import ModelDescription, ModelSpec, TensorSpec, file_identity
from onnx_dl.options import (
    make_providers,
    make_run_options,
    make_session_options,
    read_session_options,
)
from onnx_dl.workers import cache, cacheable, saver

_META_FIELDS = (
    "custom_metadata_map",
    "description",
    "domain",
    "graph_description",
    "graph_name",
    "producer_name",
    "version",
)


_WORTH: Final = 512 << 10
"""Bytes of results from which it pays to have onnxruntime silent (28 µs per run) rather than to copy them."""


class OnnxRuntimeBackend:
    """One ``onnxruntime.InferenceSession``."""

    def __init__(self, spec: ModelSpec, blob: bytes | None) -> None:
        """Raises what onnxruntime raises."""
        self._spec = cacheable.with_engine_caches(spec, cache.folder()) if _caching() else spec
        self._cached: cache.Entry | None = None
        self._key = _key_of(spec)
        self._session = self._open_cached() or open_session(self._spec, blob)
        self._profiling = bool((spec.options or {}).get("enable_profiling"))
        # Not tried with other providers: there, results come from another memory anyway.
        self._bindable = self._session.get_providers() == ["CPUExecutionProvider"]
        self._outputs = {node.name: node for node in self._session.get_outputs()}
        self._input_sizes = {size for node in self._session.get_inputs() for size in node.shape}

    def _open_cached(self) -> Any:
        """A session of the saved form; None if there is none, or none that can be used."""
        store = _store()
        entry = store.find(self._key) if self._key is not None else None
        if entry is None or [_identity(path) for path, *_ in entry.meta.external] != entry.meta.external:
            return None
        try:
            session = open_session(cacheable.loading(self._spec, entry.model), None)
        except Exception:  # whatever is wrong with it, the model itself will load or say why not
            store.discard(entry.key)
            return None
        self._cached = entry
        return session

    def ready(self, seconds: float, blob: int | None) -> None:
        slow = seconds >= config.settings().cache_from
        on_cpu = self._session.get_providers() == ["CPUExecutionProvider"]
        if self._key is None or self._cached is not None or not (slow and on_cpu):
            return
        mine = not config.settings().cache_dir  # who names a folder knows what goes there
        if _store().is_refused(self._key) or (mine and cacheable.is_passing(self._spec)):
            return
        watch = os.pidfd_open(os.getppid())
        try:
            saver.start(
                saver.Order(
                    key=self._key,
                    onnxruntime=_build(),
                    spec=self._spec,
                    description=self.describe(),
                    blob=blob,
                    watch=watch,
                )
            )
        finally:
            os.close(watch)

    def describe(self) -> ModelDescription:
        if self._cached is not None:  # the saved form has other options, and need not tell all
            return self._cached.meta.description
        session = self._session
        meta = session.get_modelmeta()
        return ModelDescription(
            inputs=_tensor_specs(session.get_inputs()),
            outputs=_tensor_specs(session.get_outputs()),
            overridable_initializers=_tensor_specs(session.get_overridable_initializers()),
            modelmeta={name: getattr(meta, name) for name in _META_FIELDS},
            providers=session.get_providers(),
            provider_options=session.get_provider_options(),
            options=read_session_options(session.get_session_options()) or {},
        )

    def run(self, outputs: Any, feed: dict[str, Any], options: dict[str, Any] | None) -> Sequence[Any]:
        run_options = make_run_options(options) if options is not None else None
        result: list[Any] = self._session.run(outputs, feed, run_options)
        return result

    def repeat(
        self, outputs: Any, feed: dict[str, Any], results: list[NDArray[Any]]
    ) -> Callable[[], object] | None:
        names = list(outputs) if outputs else list(self._outputs)
        numeric = all(array.dtype.kind in "biuf" and array.dtype.isnative for array in feed.values())
        if not (self._bindable and numeric and len(set(names)) == len(names) == len(results)):
            return None
        binding = self._session.io_binding()
        for name, array in feed.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        if all(map(self._has_known_shape, names)):
            return self._bound(binding, names, results, None)
        # A result of another shape than the last time would be an error, which onnxruntime logs on stderr.
        if sum(array.nbytes for array in results) >= _WORTH:
            return self._bound(binding, names, results, make_run_options({"log_severity_level": 4}))
        return self._copied(binding, names, results)

    def _has_known_shape(self, name: str) -> bool:
        """Whether the shapes of the inputs decide the shape of this output."""
        return all(isinstance(size, int) or size in self._input_sizes for size in self._outputs[name].shape)

    def _bound(
        self, binding: Any, names: list[str], results: list[NDArray[Any]], options: Any
    ) -> Callable[[], object]:
        for name, array in zip(names, results, strict=True):
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return functools.partial(self._session.run_with_iobinding, binding, options)

    def _copied(self, binding: Any, names: list[str], results: list[NDArray[Any]]) -> Callable[[], object]:
        def run() -> None:
            for name in names:  # each time: what the last run allocated would be bound
                binding.bind_output(name)
            self._session.run_with_iobinding(binding)
            for value, array in zip(binding.get_outputs(), results, strict=True):
                got = value.numpy()
                if got.shape != array.shape or got.dtype != array.dtype:
                    raise ValueError("a result has another shape than the last time")
                array[...] = got

        return run

    def invoke(self, method: str, args: list[Any]) -> Any:
        if method.startswith("_"):
            raise AttributeError(f"{method} is not a public method of InferenceSession")
        return getattr(self._session, method)(*args)

    def close(self) -> None:
        if self._profiling:  # the profile is written when profiling ends
            self._session.end_profiling()


def open_session(spec: ModelSpec, blob: bytes | None) -> Any:
    """An ``onnxruntime.InferenceSession``.  Raises what onnxruntime raises."""
    session = onnxruntime.InferenceSession(
        spec.path if blob is None else blob,
        make_session_options(spec.options) if spec.options is not None else None,
        make_providers(spec.providers),
        make_providers(spec.provider_options),
        **spec.extra,
    )
    # onnxruntime keeps the bytes of the model for ever, for a fallback to another provider.
    if not session._enable_fallback:
        session._model_bytes = None
    return session


def _build() -> str:
    return f"{onnxruntime.__version__} {onnxruntime.get_build_info()}"


def _caching() -> bool:
    return config.settings().cache == "on"


def _store() -> cache.Cache:
    return cache.Cache(cache.folder(), config.parse_size(config.settings().cache_limit))


def _key_of(spec: ModelSpec) -> str | None:
    """The model's key in the load cache; None: it loads plainly."""
    if not (_caching() and cacheable.is_cacheable(spec)):
        return None
    try:
        return cacheable.key_of(spec, _build())
    except OSError:  # onnxruntime shall say what is wrong with the file
        return None


def _identity(path: str) -> cache.Identity | None:
    try:
        return file_identity(path)
    except OSError:
        return None


def _tensor_specs(nodes: Sequence[Any]) -> list[TensorSpec]:
    return [TensorSpec(node.name, node.type, list(node.shape)) for node in nodes]
