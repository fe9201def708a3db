"""What a session says of itself: onnxruntime's metadata methods, and the private names that callers look at.

Metadata is read once and remembered; reading it is a use of the model all the same.
"""

from __future__ import annotations

import os
from typing import Any

from onnx_dl.client.remote_model import RemoteModel
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.core.status import ModelDescription
from onnx_dl.ort.metadata import GONE, AssignedSubgraph, Description, ModelMetadata, NodeArg
from onnx_dl.session.native_session import NativeSession
from onnx_dl.session.proxy import ModelProxy


class DescribedProxy(ModelProxy):
    """A proxy with the methods of ``onnxruntime.InferenceSession`` that run nothing."""

    _arguments: tuple[Any, dict[str, Any]]
    """``sess_options`` and further keywords, as the constructor was given them."""
    _falls_back: bool | None = None
    """What was last said about falling back to other providers; None: nothing."""

    def _forget_metadata(self) -> None:
        self._description: Description | None = None
        self._is_gone = False
        self._described: ModelDescription | None = None
        self._sess = NativeSession(self)

    # --- metadata -----------------------------------------------------------------------------------------

    def get_inputs(self) -> list[NodeArg]:
        """The model's inputs; the same list at each call."""
        return self._describe().inputs

    def get_outputs(self) -> list[NodeArg]:
        """The model's outputs; the same list at each call."""
        return self._describe().outputs

    def get_overridable_initializers(self) -> list[NodeArg]:
        """Initializers that a feed may override."""
        return self._describe().overridable_initializers

    def get_modelmeta(self) -> ModelMetadata:
        """What the model's author wrote into it."""
        return self._describe().modelmeta

    def get_providers(self) -> list[str]:
        """The execution providers in use, in order of preference."""
        return self._describe().providers

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        """The options in force for each provider in use."""
        return self._describe().provider_options

    def get_session_options(self) -> Any:
        """The options in force, as an ``onnxruntime.SessionOptions``: a copy; imports onnxruntime."""
        return self._describe().session_options

    def get_input_memory_infos(self) -> list[Any]:
        """An ``onnxruntime.OrtMemoryInfo`` per input: where the worker has it; imports onnxruntime."""
        return self._describe().input_memory_infos

    def get_output_memory_infos(self) -> list[Any]:
        """An ``onnxruntime.OrtMemoryInfo`` per output: where the worker has it; imports onnxruntime."""
        return self._describe().output_memory_infos

    def get_input_epdevices(self) -> list[Any]:
        """An ``onnxruntime.OrtEpDevice`` of this process per input; imports onnxruntime."""
        return self._describe().input_epdevices

    def get_provider_graph_assignment_info(self) -> list[AssignedSubgraph]:
        """Which provider took which nodes; recorded only if the session's options ask for it."""
        return [AssignedSubgraph(*part) for part in self._invoke("get_provider_graph_assignment_info")]

    def get_profiling_start_time_ns(self) -> int:
        """When profiling began, comparable to ``time.monotonic_ns()``; 0 if it is off."""
        return int(self._describe().details["profiling_start_time_ns"])

    def end_profiling(self) -> str:
        """Ends profiling; the name of the profile, relative to the working directory, or '' if it was off."""
        return str(self._invoke("end_profiling"))

    # --- what callers look at though it is private --------------------------------------------------------

    @property
    def _enable_fallback(self) -> bool:
        return bool(self._describe().details["fallback"]) if self._falls_back is None else self._falls_back

    @property
    def _read_config_from_model(self) -> bool:
        given = self._arguments[1].get("read_config_from_model")
        if given is not None:
            return int(given) == 1
        return self._spec.environment.over(os.environ).get("ORT_LOAD_CONFIG_FROM_MODEL") == "1"

    @property
    def _fallback_providers(self) -> list[str]:
        return list(self._describe().details["fallback_providers"])

    @property
    def _sess_options(self) -> Any:
        return self.get_session_options()

    @property
    def _sess_options_initial(self) -> Any:
        return self._arguments[0]

    @property
    def _input_meminfos(self) -> list[Any]:
        return self.get_input_memory_infos()

    @property
    def _output_meminfos(self) -> list[Any]:
        return self.get_output_memory_infos()

    @property
    def _input_epdevices(self) -> list[Any]:
        return self.get_input_epdevices()

    @property
    def _profiling_start_time_ns(self) -> int:
        return self.get_profiling_start_time_ns()

    @property
    def _captured_graph_bindings(self) -> dict[int, Any]:
        return {}

    @property
    def _inputs_meta(self) -> list[NodeArg]:
        return self.get_inputs()

    @property
    def _outputs_meta(self) -> list[NodeArg]:
        return self.get_outputs()

    @property
    def _overridable_initializers(self) -> list[NodeArg]:
        return self.get_overridable_initializers()

    @property
    def _model_meta(self) -> ModelMetadata:
        return self.get_modelmeta()

    @property
    def _providers(self) -> list[str]:
        return self.get_providers()

    @property
    def _provider_options(self) -> dict[str, dict[str, str]]:
        return self.get_provider_options()

    def _awake(self) -> None:
        self._forget_metadata()

    # --- inside -------------------------------------------------------------------------------------------

    def _invoke(self, method: str, *args: Any) -> Any:
        if self._is_gone:
            raise AttributeError(f"'NoneType' object has no attribute {method!r}")
        return self._model().invoke(self._lease, method, *args)

    def _describe(self) -> Description:
        """Metadata, remembered: once known it is never asked for again, but counts as a use."""
        if self._is_gone:
            gone: Description = GONE
            return gone
        model = self._remote
        idle = model is None or not model.connection.usable
        if self._description is not None and idle and not self._lease.closed:
            return self._description
        described = self._described_model().describe(self._lease)
        if self._description is None or described is not self._described:
            self._description, self._described = Description(described), described
        return self._description

    def _model(self, deadline: Deadline | None = None) -> RemoteModel:
        if self._is_gone:
            raise AttributeError("'NoneType' object has no attribute 'run'")
        return super()._model(deadline)
