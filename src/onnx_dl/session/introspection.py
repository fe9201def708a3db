"""Metadata of a session: onnxruntime's methods for it, and the private names that callers read.

Metadata is read once and remembered.  Reading it counts as a use of the model all the same.
"""

from __future__ import annotations

import operator
import os
import sys
from typing import Self

from onnx_dl.client.host_client import HostClient
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelDescription
from onnx_dl.core.terms import Terms
from onnx_dl.core.types import OrtObject, Value
from onnx_dl.ort.metadata import GONE, AssignedSubgraph, Description, ModelMetadata, NodeArg
from onnx_dl.session.model_handle import ModelHandle
from onnx_dl.session.model_source import Source
from onnx_dl.session.native_session import NativeSession
from onnx_dl.session.ortvalue_runs import OrtValueRuns
from onnx_dl.session.proxy import ModelProxy, bytes_of


class Metadata:
    """Metadata of one handle's model, as the objects that onnxruntime returns."""

    def __init__(self, handle: ModelHandle) -> None:
        self.handle = handle
        self._objects: Description | None = None
        self._made_of: ModelDescription | None = None

    def read(self) -> Description:
        """The metadata.  Once known, it costs no message, but counts as a use."""
        handle, objects = self.handle, self._objects
        if handle.is_gone:
            gone: Description = GONE
            return gone
        idle = handle.remote is None or not handle.remote.connection.usable
        if objects is not None and idle and not handle.lease.closed:
            return objects
        described = handle.described_model().describe(handle.lease)
        if objects is None or described is not self._made_of:
            objects = self._objects = Description(described)
            self._made_of = described
        return objects


def _read(method: str) -> property:
    """A private attribute of onnxruntime's class that has the same value as this public method."""
    return property(operator.methodcaller(method))


class MetadataProxy(ModelProxy):
    """A proxy with the methods of ``onnxruntime.InferenceSession`` that read metadata."""

    _metadata: Metadata
    _sess: NativeSession
    _runs: OrtValueRuns
    _sess_options_initial: OrtObject = None
    """``sess_options``, as the constructor was given them.  They cannot be pickled; the spec has their
    contents."""

    def _set_up(self, handle: ModelHandle) -> None:
        """Sets up the parts of a session.  Constructors, copies and changes of providers come here."""
        self._handle = handle
        self._metadata = Metadata(handle)
        self._sess = NativeSession(self)
        self._runs = OrtValueRuns(handle, self._sess, self._metadata.read)

    @classmethod
    def of_spec(cls, spec: ModelSpec, terms: Terms, *, host: HostClient) -> Self:
        """A proxy of a model that is already described, as in a host's file."""
        proxy = object.__new__(cls)
        proxy._set_up(ModelHandle(Source(spec), terms, host))
        return proxy

    def __copy__(self) -> Self:
        made = super().__copy__()
        made._sess_options_initial = self._sess_options_initial
        return made

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """``isinstance(proxy, onnxruntime.InferenceSession)`` holds, because packages ask."""
        onnxruntime = sys.modules.get("onnxruntime")
        return getattr(onnxruntime, "InferenceSession", None) or type(self)

    # --- metadata -----------------------------------------------------------------------------------------

    def get_inputs(self) -> list[NodeArg]:
        """The model's inputs; the same list at each call."""
        return self._metadata.read().inputs

    def get_outputs(self) -> list[NodeArg]:
        """The model's outputs; the same list at each call."""
        return self._metadata.read().outputs

    def get_overridable_initializers(self) -> list[NodeArg]:
        """Initializers that a feed may override."""
        return self._metadata.read().overridable_initializers

    def get_modelmeta(self) -> ModelMetadata:
        """The metadata that the model's author wrote into it."""
        return self._metadata.read().modelmeta

    def get_providers(self) -> list[str]:
        """The execution providers in use, in order of preference."""
        return self._metadata.read().providers

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        """The options in force for each provider in use."""
        return self._metadata.read().provider_options

    def get_session_options(self) -> OrtObject:
        """The options in force, as an ``onnxruntime.SessionOptions``: a copy; imports onnxruntime."""
        return self._metadata.read().session_options

    def get_input_memory_infos(self) -> list[OrtObject]:
        """An ``onnxruntime.OrtMemoryInfo`` per input: where the worker has it; imports onnxruntime."""
        return self._metadata.read().input_memory_infos

    def get_output_memory_infos(self) -> list[OrtObject]:
        """An ``onnxruntime.OrtMemoryInfo`` per output: where the worker has it; imports onnxruntime."""
        return self._metadata.read().output_memory_infos

    def get_input_epdevices(self) -> list[OrtObject]:
        """An ``onnxruntime.OrtEpDevice`` of this process per input; imports onnxruntime."""
        return self._metadata.read().input_epdevices

    def get_provider_graph_assignment_info(self) -> list[AssignedSubgraph]:
        """Nodes by the provider that took them; recorded only if the session's options ask for it."""
        return [AssignedSubgraph(*part) for part in self._invoke("get_provider_graph_assignment_info")]

    def get_profiling_start_time_ns(self) -> int:
        """When profiling began, comparable to ``time.monotonic_ns()``; 0 if it is off."""
        return int(self._metadata.read().details["profiling_start_time_ns"])

    def end_profiling(self) -> str:
        """Ends profiling; the name of the profile, relative to the working directory, or '' if it was off."""
        return str(self._invoke("end_profiling"))

    def _invoke(self, method: str, *args: object) -> Value:
        return self._handle.invoke(method, *args)

    # --- private names that callers read ------------------------------------------------------------------

    _sess_options = _read("get_session_options")
    _input_meminfos = _read("get_input_memory_infos")
    _output_meminfos = _read("get_output_memory_infos")
    _input_epdevices = _read("get_input_epdevices")
    _profiling_start_time_ns = _read("get_profiling_start_time_ns")
    _inputs_meta = _read("get_inputs")
    _outputs_meta = _read("get_outputs")
    _overridable_initializers = _read("get_overridable_initializers")
    _model_meta = _read("get_modelmeta")
    _providers = _read("get_providers")
    _provider_options = _read("get_provider_options")

    @property
    def _captured_graph_bindings(self) -> dict[int, OrtObject]:
        return {}

    @property
    def _read_config_from_model(self) -> bool:
        given = self._handle.spec.extra.get("read_config_from_model")
        if given is not None:
            return int(given) == 1
        return self._handle.spec.environment.over(os.environ).get("ORT_LOAD_CONFIG_FROM_MODEL") == "1"

    @property
    def _model_path(self) -> str | None:
        return self._handle.spec.path

    @property
    def _model_bytes(self) -> bytes | None:
        """The model if it was given as bytes; a copy, made anew each time."""
        blob = self._handle.spec.blob
        return None if blob is None else bytes_of(self._handle.blobs()[blob]())
