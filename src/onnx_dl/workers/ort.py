"""onnxruntime as an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnxruntime

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
        result: Sequence[Any] = self._session.run(outputs, feed, run_options)
        return result

    def invoke(self, method: str, args: list[Any]) -> Any:
        if method.startswith("_"):
            raise AttributeError(f"{method} is not a public method of InferenceSession")
        return getattr(self._session, method)(*args)

    def close(self) -> None:
        if self._profiling:  # the profile is written when profiling ends
            self._session.end_profiling()


def _tensor_specs(nodes: Sequence[Any]) -> list[TensorSpec]:
    return [TensorSpec(node.name, node.type, list(node.shape)) for node in nodes]
