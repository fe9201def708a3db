"""A session beside its runs: metadata, private names that callers read, and changes of its providers.

Metadata is read once and remembered.  Reading it counts as a use of the model all the same.
"""

from __future__ import annotations

import operator
import os
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Self

from onnx_dl.client.host_client import HostClient
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelDescription
from onnx_dl.core.terms import Terms
from onnx_dl.core.types import Feed, OrtObject, Providers, Value
from onnx_dl.ort.metadata import GONE, AssignedSubgraph, Description, ModelMetadata, NodeArg
from onnx_dl.session import model_source
from onnx_dl.session.model_handle import ModelHandle
from onnx_dl.session.model_source import ModelSource
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
        idle = handle.served is None or not handle.served.usable
        if objects is not None and idle and not handle.lease.closed:
            return objects
        described = handle.describe()
        if objects is None or described is not self._made_of:
            objects = self._objects = Description(described)
            self._made_of = described
        return objects


def _copied(method: str, copy: Callable[[OrtObject], object]) -> property:
    """An attribute that has the result of this method of the proxy."""
    return property(lambda native: copy(getattr(native._alive(), method)()))


class NativeSession:
    """Stand-in for onnxruntime's native session, ``_sess``, with the methods that make sense for a proxy."""

    def __init__(self, proxy: object) -> None:
        self._proxy = weakref.ref(proxy)

    def _alive(self) -> OrtObject:
        proxy = self._proxy()
        if proxy is None:
            raise ReferenceError("The session that this belonged to is gone.")
        return proxy

    inputs_meta = _copied("get_inputs", list)
    outputs_meta = _copied("get_outputs", list)
    overridable_initializers = _copied("get_overridable_initializers", list)
    model_meta = _copied("get_modelmeta", lambda found: found)
    session_options = _copied("get_session_options", lambda found: found)
    get_profiling_start_time_ns = _copied("get_profiling_start_time_ns", int)

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


def _read(method: str) -> property:
    """A private attribute of onnxruntime's class that has the same value as this public method."""
    return property(operator.methodcaller(method))


class SessionProxy(ModelProxy):
    """A proxy with the methods of ``onnxruntime.InferenceSession`` beside its runs."""

    _metadata: Metadata
    _sess: NativeSession
    _sess_options_initial: OrtObject = None
    """``sess_options``, as the constructor was given them.  They cannot be pickled; the spec has their
    contents."""
    _falls_back: bool | None = None
    """Fallback to other providers as last set; None: as the session's options say."""

    def _set_up(self, handle: ModelHandle) -> None:
        """Sets up the parts of a session.  Constructors, copies and changes of providers come here."""
        self._handle = handle
        self._metadata = Metadata(handle)
        self._sess = NativeSession(self)

    @classmethod
    def of_spec(cls, spec: ModelSpec, terms: Terms, *, host: HostClient) -> Self:
        """A proxy of a model that is already described, as in a host's file."""
        proxy = object.__new__(cls)
        proxy._set_up(ModelHandle(ModelSource(spec), terms, host))
        return proxy

    def __getstate__(self) -> tuple[object, ...]:
        return (self._falls_back,)

    def __setstate__(self, state: tuple[ModelHandle, bool | None]) -> None:
        handle, self._falls_back = state
        self._set_up(handle)

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
        """Time when profiling began, comparable to ``time.monotonic_ns()``; 0 if it is off."""
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

    # --- changes ------------------------------------------------------------------------------------------

    def set_providers(self, providers: Providers = None, provider_options: Providers = None) -> None:
        """Loads the model again with these providers.  Its other proxies keep theirs.

        Raises: onnxruntime's own errors.  Then the session is unusable until working providers are set.
        """
        old = self._handle
        old.release()
        try:
            spec = model_source.with_providers(old.spec, providers, provider_options)
            self._set_up(ModelHandle(ModelSource(spec, old.blobs(), old.live), old.lease.terms, old.host))
            self.load()
        except BaseException:
            self._handle.give_up_session()
            raise

    def _reset_session(self, providers: Providers, provider_options: Providers) -> None:
        """onnxruntime's private method, which subclasses of its class call."""
        self.set_providers(providers, provider_options)

    def disable_fallback(self) -> None:
        """A run that fails in an execution provider raises."""
        self._falls_back = False

    def enable_fallback(self) -> None:
        """A run that fails in an execution provider is made again with other providers."""
        self._falls_back = True

    @property
    def _enable_fallback(self) -> bool:
        given = self._falls_back
        return bool(self._metadata.read().details["fallback"]) if given is None else given

    @property
    def _fallback_providers(self) -> list[str]:
        return list(self._metadata.read().details["fallback_providers"])

    def _fall_back(self, error: Exception) -> None:
        """Sets other providers if a provider failed and that is wanted, else raises the error again."""
        if type(error).__name__ != "EPFail" or not self._enable_fallback:
            raise error
        print(f"EP Error: {error!s} using {self.get_providers()}")
        print(f"Falling back to {self._fallback_providers} and retrying.")
        self.set_providers(self._fallback_providers)
        self.disable_fallback()

    def set_ep_dynamic_options(self, options: dict[str, str]) -> None:
        """Changes options of execution providers; for all proxies of the model, until it unloads."""
        self._invoke("set_ep_dynamic_options", options)

    def get_tuning_results(self) -> Value:
        """Results of tunable operators, as onnxruntime gives them."""
        return self._invoke("get_tuning_results")

    def set_tuning_results(self, results: Value, *, error_on_invalid: bool = False) -> None:
        """Gives tunable operators the results of an earlier session."""
        self._invoke("set_tuning_results", results, error_on_invalid)

    def release_captured_graph(self, graph_annotation_id: int = 0) -> None:
        """Releases a graph that a provider captured."""
        self._invoke("release_captured_graph", graph_annotation_id)
