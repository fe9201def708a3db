"""Makes an ``onnxruntime.InferenceSession`` as the application would, and describes it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any, Final

import onnxruntime

from onnx_dl.core import load_output
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelDescription, TensorSpec
from onnx_dl.ort import options as plain_options
from onnx_dl.ort import recordings
from onnx_dl.ort.options import decode_refused, make_providers
from onnx_dl.ort.ortvalues import Bytes
from onnx_dl.system import resources
from onnx_dl.tensors import live_initializers

META_FIELDS: Final = (
    "custom_metadata_map",
    "description",
    "domain",
    "graph_description",
    "graph_name",
    "producer_name",
    "version",
)
_CUDA: Final = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")


class LoadedSession:
    """A session, what was printed while it was made, and objects that must live as long as it."""

    def __init__(self, spec: ModelSpec, data: bytes | None, memory: int | None = None) -> None:
        """``memory``: descriptor of the arrays that the options name; taken over.

        Raises:
            Exception: onnxruntime's; its attribute ``remarks`` is what was printed before.
        """
        self.keys = list((spec.options or {}).get("config", {}))
        recordings.apply_process_settings(spec.surroundings, spec.environment)
        _preload_cuda(spec)
        _create_thread_pools(spec)
        options = None
        self._kept: list[object] = []
        if spec.options is not None:
            options, self._kept = _options(spec, None if memory is None else live_initializers.view(memory))
        count = None if options is not None and options.intra_op_num_threads else resources.fewer_processors()
        self.limits_threads = count is not None
        """True if the threads are set to the processors of this process: onnxruntime counts the machine's."""
        if count is not None:
            options = onnxruntime.SessionOptions() if options is None else options
            options.intra_op_num_threads = count
        self.as_set = {name: (spec.options or {})[name] for name in _OF_POOLS} if _uses_pools(spec) else {}
        """Options that are described as the caller set them, though the session has others."""
        extra = {name: value for name, value in spec.extra.items() if name not in (_GIVEN, "tuple")}
        with load_output.captured() as self.remarks:
            self.session = onnxruntime.InferenceSession(
                spec.path if data is None else data, options, *_providers(spec), **extra
            )
        self.fallback_providers = list(self.session._fallback_providers)
        # A proxy decides on its own which providers it falls back to: others may share this session.
        self.fallback = bool(self.session._enable_fallback)
        self.session.disable_fallback()
        self.session._model_bytes = None  # onnxruntime keeps them for a fallback


_POOLS: Final = "set_global_thread_pool_sizes"
_OF_POOLS: Final = ("use_per_session_threads", "intra_op_num_threads", "inter_op_num_threads")

_GIVEN: Final = "given"
"""Key in ``ModelSpec.extra`` of providers that onnxruntime has to refuse, encoded as the caller gave them."""


def _providers(spec: ModelSpec) -> tuple[object, object]:
    if _GIVEN in spec.extra:
        providers, provider_options = spec.extra[_GIVEN]
        return decode_refused(providers), decode_refused(provider_options)
    providers = make_providers(spec.providers)
    given = tuple(providers) if providers and spec.extra.get("tuple") else providers
    return given, make_providers(spec.provider_options)


def _uses_pools(spec: ModelSpec) -> bool:
    """Tells whether the model uses the threads that the application made for all its models."""
    return _POOLS in spec.surroundings and (spec.options or {}).get("use_per_session_threads") is False


def _create_thread_pools(spec: ModelSpec) -> None:
    """Has onnxruntime refuse threads of a session's own, as it does in an application with global pools."""
    if _POOLS in spec.surroundings and not _uses_pools(spec):
        with contextlib.suppress(Exception):  # another model of this process was refused before
            onnxruntime.set_global_thread_pool_sizes(*spec.surroundings[_POOLS])


def _options(spec: ModelSpec, memory: Any) -> tuple[onnxruntime.SessionOptions, list[object]]:
    """Returns the options, and objects that must live as long as the session."""
    plain = dict(spec.options or {})
    if _uses_pools(spec):
        # This process has one model, so threads of its own are the same as threads of the process.
        plain |= {"use_per_session_threads": True}
        plain |= dict(zip(_OF_POOLS[1:], spec.surroundings[_POOLS], strict=False))
    options = plain_options.make_session_options(plain)
    places = plain.get("places", [])

    def find(place: list[int]) -> Bytes:
        index, nbytes = place
        found: Bytes = memory[places[index] : places[index] + nbytes]
        return found

    return options, [memory, *recordings.replay(options, plain.get("calls", []), find)]


def _preload_cuda(spec: ModelSpec) -> None:
    """Loads CUDA's libraries from Python packages, as ``preload_dlls()`` or torch did in the application."""
    preload = getattr(onnxruntime, "preload_dlls", None)
    wanted = set(_CUDA).intersection(spec.provider_names, onnxruntime.get_available_providers())
    if preload is not None and wanted:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            preload()


def describe(loaded: LoadedSession) -> ModelDescription:
    """Returns the session's metadata."""
    session = loaded.session
    meta = session.get_modelmeta()
    return ModelDescription(
        inputs=_tensor_specs(session.get_inputs()),
        outputs=_tensor_specs(session.get_outputs()),
        overridable_initializers=_tensor_specs(session.get_overridable_initializers()),
        modelmeta={name: getattr(meta, name) for name in META_FIELDS},
        providers=session.get_providers(),
        provider_options=session.get_provider_options(),
        options=_options_of(loaded),
        details={
            "input_memory_infos": _memory_infos(session, "get_input_memory_infos"),
            "output_memory_infos": _memory_infos(session, "get_output_memory_infos"),
            "input_epdevices": _epdevices(session),
            "profiling_start_time_ns": session.get_profiling_start_time_ns(),
            "fallback_providers": loaded.fallback_providers,
            "fallback": loaded.fallback,
            "remarks": loaded.remarks,
        },
    )


def _options_of(loaded: LoadedSession) -> dict[str, object]:
    options = plain_options.read_session_options(loaded.session.get_session_options(), loaded.keys) or {}
    return options | ({"intra_op_num_threads": 0} if loaded.limits_threads else {}) | loaded.as_set


def _tensor_specs(nodes: Sequence[onnxruntime.NodeArg]) -> list[TensorSpec]:
    return [TensorSpec(node.name, node.type, list(node.shape)) for node in nodes]


def _memory_infos(session: onnxruntime.InferenceSession, method: str) -> list[list[object]]:
    infos: Sequence[onnxruntime.OrtMemoryInfo] = getattr(session, method, list)()
    return [[i.name, i.allocator_type.name, i.device_id, i.mem_type.name] for i in infos]


def _epdevices(session: onnxruntime.InferenceSession) -> list[list[object] | None]:
    devices: Sequence[onnxruntime.OrtEpDevice | None] = getattr(session, "get_input_epdevices", list)()
    return [None if device is None else recordings.device_identity(device) for device in devices]
