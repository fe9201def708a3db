"""Stand-in for onnxruntime's native session, ``_sess``, which some callers use."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from onnx_dl.core.types import Feed, OrtObject, Value
from onnx_dl.ort.metadata import ModelMetadata, NodeArg


class NativeSession:
    """The attributes and methods of ``onnxruntime``'s native session that make sense for a proxy."""

    def __init__(self, proxy: object) -> None:
        self._proxy = weakref.ref(proxy)

    def _alive(self) -> OrtObject:
        proxy = self._proxy()
        if proxy is None:
            raise ReferenceError("The session that this belonged to is gone.")
        return proxy

    @property
    def inputs_meta(self) -> list[NodeArg]:
        return list(self._alive().get_inputs())

    @property
    def outputs_meta(self) -> list[NodeArg]:
        return list(self._alive().get_outputs())

    @property
    def overridable_initializers(self) -> list[NodeArg]:
        return list(self._alive().get_overridable_initializers())

    @property
    def model_meta(self) -> ModelMetadata:
        found: ModelMetadata = self._alive().get_modelmeta()
        return found

    @property
    def session_options(self) -> OrtObject:
        return self._alive().get_session_options()

    @property
    def get_profiling_start_time_ns(self) -> int:
        return int(self._alive().get_profiling_start_time_ns())

    def get_providers(self) -> list[str]:
        return list(self._alive().get_providers())

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        return dict(self._alive().get_provider_options())

    def end_profiling(self) -> str:
        return str(self._alive().end_profiling())

    def run(
        self, output_names: Sequence[str] | None, feed: Feed, run_options: OrtObject = None
    ) -> list[Value]:
        return list(self._alive().run(output_names, feed, run_options))

    def run_with_iobinding(self, binding: OrtObject, run_options: OrtObject = None) -> None:
        self._alive().run_with_iobinding(binding, run_options)

    def is_webgpu_graph_capture_enabled(self) -> bool:
        """Never: buffers of WebGPU do not cross processes."""
        return False

    def webgpu_context_id(self) -> int:
        return 0
