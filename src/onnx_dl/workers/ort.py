"""onnxruntime as an engine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import onnxruntime
from numpy.typing import NDArray

from onnx_dl.model import ModelDescription, ModelSpec, TensorSpec
from onnx_dl.options import (
    make_providers,
    make_run_options,
    make_session_options,
    read_session_options,
)

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
        options = make_session_options(spec.options) if spec.options is not None else None
        providers = make_providers(spec.providers)
        self._profiling = bool(options and options.enable_profiling)
        self._session = onnxruntime.InferenceSession(
            spec.path if blob is None else blob,
            options,
            providers,
            make_providers(spec.provider_options),
            **spec.extra,
        )
        # onnxruntime keeps the bytes of the model for ever, for a fallback to another provider.
        if not self._session._enable_fallback:
            self._session._model_bytes = None
        # Not tried with other providers: there, results come from another memory anyway.
        self._bindable = self._session.get_providers() == ["CPUExecutionProvider"]
        self._outputs = {node.name: node for node in self._session.get_outputs()}
        self._input_sizes = {size for node in self._session.get_inputs() for size in node.shape}

    def describe(self) -> ModelDescription:
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
        for name in names:
            binding.bind_output(name)

        def run() -> None:
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


def _tensor_specs(nodes: Sequence[Any]) -> list[TensorSpec]:
    return [TensorSpec(node.name, node.type, list(node.shape)) for node in nodes]
