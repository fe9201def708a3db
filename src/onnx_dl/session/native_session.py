"""What stands where onnxruntime has its native session: ``_sess``, which some callers look at."""

from __future__ import annotations

import weakref
from typing import Any


class NativeSession:
    """The attributes and methods of ``onnxruntime``'s native session that mean something from afar."""

    def __init__(self, proxy: Any) -> None:
        """``proxy``: the InferenceSessionProxy that this belongs to."""
        self._proxy = weakref.ref(proxy)

    def _alive(self) -> Any:
        proxy = self._proxy()
        if proxy is None:
            raise ReferenceError("The session that this belonged to is gone.")
        return proxy

    @property
    def inputs_meta(self) -> list[Any]:
        return list(self._alive().get_inputs())

    @property
    def outputs_meta(self) -> list[Any]:
        return list(self._alive().get_outputs())

    @property
    def overridable_initializers(self) -> list[Any]:
        return list(self._alive().get_overridable_initializers())

    @property
    def model_meta(self) -> Any:
        return self._alive().get_modelmeta()

    @property
    def session_options(self) -> Any:
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

    def run(self, output_names: Any, feed: Any, run_options: Any = None) -> Any:
        return self._alive().run(output_names, feed, run_options)

    def run_with_iobinding(self, binding: Any, run_options: Any = None) -> None:
        self._alive().run_with_iobinding(binding, run_options)

    def is_webgpu_graph_capture_enabled(self) -> bool:
        """Never: buffers of WebGPU do not cross processes."""
        return False

    def webgpu_context_id(self) -> int:
        return 0
