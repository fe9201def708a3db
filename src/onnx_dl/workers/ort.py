"""onnxruntime as an engine."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from onnx_dl.model import ModelDescription, ModelSpec, TensorSpec
from onnx_dl.options import (
    make_providers,
    make_run_options,
    make_session_options,
    read_session_options,
)
from onnx_dl.workers.backend import Place

_META_FIELDS = (
    "custom_metadata_map",
    "description",
    "domain",
    "graph_description",
    "graph_name",
    "producer_name",
    "version",
)


_Plan = list[tuple[str, str, tuple[int, ...]]]
"""Name, dtype and shape of each result."""

_MOST_PLANS: Final = 64
_WORTH: Final = 64 << 10
"""Bytes from which a result is worth binding; below, a binding costs more than the copy."""


class OnnxRuntimeBackend:
    """One ``onnxruntime.InferenceSession``."""

    def __init__(self, spec: ModelSpec, blob: bytes | None) -> None:
        """Raises what onnxruntime raises."""
        options = make_session_options(spec.options) if spec.options is not None else None
        providers = make_providers(spec.providers)
        self._profiling = bool(options and options.enable_profiling)
        self._plans: dict[Any, _Plan | None] = {}
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
        self._output_names = [node.name for node in self._session.get_outputs()]
        self._bindable = self._session.get_providers() == ["CPUExecutionProvider"]

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

    def run(
        self, outputs: Any, feed: dict[str, Any], options: dict[str, Any] | None, place: Place
    ) -> Sequence[Any]:
        run_options = make_run_options(options) if options is not None else None
        key = self._plan_key(outputs, feed) if run_options is None else None
        plan = self._plans.get(key) if key else None
        if plan:
            try:
                return self._run_bound(plan, feed, place)
            except Exception:
                # Other shapes than last time, or an error that run() words differently: run() shall tell.
                self._plans[key] = None
        result: list[Any] = self._session.run(outputs, feed, run_options)
        if key and key not in self._plans:
            self._remember(key, outputs, result)
        return result

    def _plan_key(self, outputs: Any, feed: dict[str, Any]) -> tuple[Any, ...] | None:
        """What decides the shapes of the results of most models; None if the call cannot be bound."""
        if not (self._bindable and (outputs is None or isinstance(outputs, list | tuple))):
            return None
        parts: list[Any] = [None if outputs is None else tuple(outputs)]
        for name, value in feed.items():
            if not (isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.dtype.isnative):
                return None
            parts.append((name, value.dtype.num, value.shape))
        return tuple(parts)

    def _remember(self, key: tuple[Any, ...], outputs: Any, result: list[Any]) -> None:
        """Notes shapes, so that the next call like this one computes its results where they are wanted."""
        names = list(outputs) if outputs else self._output_names
        plain = all(isinstance(value, np.ndarray) and value.dtype.kind in "biuf" for value in result)
        if len(self._plans) >= _MOST_PLANS:
            self._plans.clear()
        self._plans[key] = None
        if plain and len(set(names)) == len(names) and any(value.nbytes >= _WORTH for value in result):
            self._plans[key] = [(n, v.dtype.str, v.shape) for n, v in zip(names, result, strict=True)]

    def _run_bound(self, plan: _Plan, feed: dict[str, Any], place: Place) -> Sequence[Any]:
        binding = self._session.io_binding()
        for name, value in feed.items():
            binding.bind_cpu_input(name, value)
        placed = [place(dtype, shape) for _, dtype, shape in plan]
        for (name, _, shape), array in zip(plan, placed, strict=True):
            if array is None:
                binding.bind_output(name)
            else:
                binding.bind_output(name, "cpu", 0, array.dtype.type, shape, array.ctypes.data)
        self._session.run_with_iobinding(binding)
        values = binding.get_outputs()
        return [
            value.numpy() if array is None else array for array, value in zip(placed, values, strict=True)
        ]

    def repeat(
        self, outputs: Any, feed: dict[str, Any], results: list[NDArray[Any]]
    ) -> Callable[[], object] | None:
        names = list(outputs) if outputs else self._output_names
        numeric = all(array.dtype.kind in "biuf" and array.dtype.isnative for array in feed.values())
        if not (self._bindable and numeric and len(set(names)) == len(names) == len(results)):
            return None
        binding = self._session.io_binding()
        for name, array in feed.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        for name, array in zip(names, results, strict=True):
            binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        return functools.partial(self._session.run_with_iobinding, binding)

    def invoke(self, method: str, args: list[Any]) -> Any:
        if method.startswith("_"):
            raise AttributeError(f"{method} is not a public method of InferenceSession")
        return getattr(self._session, method)(*args)

    def close(self) -> None:
        if self._profiling:  # the profile is written when profiling ends
            self._session.end_profiling()


def _tensor_specs(nodes: Sequence[Any]) -> list[TensorSpec]:
    return [TensorSpec(node.name, node.type, list(node.shape)) for node in nodes]
