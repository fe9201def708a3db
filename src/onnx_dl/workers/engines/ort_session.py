"""An ``onnxruntime.InferenceSession`` as the application would have made it, and what it says of itself."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any, Final

import onnxruntime

from onnx_dl.core import load_output
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelDescription, TensorSpec
from onnx_dl.ort import recordings
from onnx_dl.ort.options import as_given, make_providers, make_session_options, read_session_options
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


class Opened:
    """A session, what was printed while it was made, and what must live as long as it does."""

    def __init__(self, spec: ModelSpec, data: bytes | None, memory: int | None = None) -> None:
        """``memory``: descriptor of the arrays that the options name; taken over.

        Raises:
            Exception: what onnxruntime raises; its attribute ``remarks`` is what was printed before.
        """
        self.keys = list((spec.options or {}).get("config", {}))
        recordings.set_surroundings(spec.surroundings, spec.environment)
        _preload_cuda(spec)
        _refuse_own_threads(spec)
        options = None
        self._kept: list[Any] = []
        if spec.options is not None:
            options, self._kept = _options(spec, None if memory is None else live_initializers.view(memory))
        options, self.shares = _with_share(options)
        self.as_set = {name: (spec.options or {})[name] for name in _OF_POOLS} if _uses_pools(spec) else {}
        """Options that read as the caller set them, though the session has others."""
        with load_output.captured() as self.remarks:
            self.session = onnxruntime.InferenceSession(
                spec.path if data is None else data, options, *_providers(spec), **_extra(spec)
            )
        self.fallback_providers = list(self.session._fallback_providers)
        # Which providers a proxy falls back to is the client's business: others may share this session.
        self.fallback = bool(self.session._enable_fallback)
        self.session.disable_fallback()
        self.session._model_bytes = None  # onnxruntime would keep them for ever, for a fallback


_POOLS: Final = "set_global_thread_pool_sizes"
_OF_POOLS: Final = ("use_per_session_threads", "intra_op_num_threads", "inter_op_num_threads")

_GIVEN: Final = "given"
"""The key in ``ModelSpec.extra`` of providers as the caller gave them, for onnxruntime to refuse them."""


def _providers(spec: ModelSpec) -> tuple[Any, Any]:
    if _GIVEN in spec.extra:
        providers, provider_options = spec.extra[_GIVEN]
        return as_given(providers), as_given(provider_options)
    providers = make_providers(spec.providers)
    return tuple(providers) if spec.extra.get("tuple") and providers else providers, make_providers(
        spec.provider_options
    )


def _extra(spec: ModelSpec) -> dict[str, Any]:
    return {name: value for name, value in spec.extra.items() if name not in (_GIVEN, "tuple")}


def _uses_pools(spec: ModelSpec) -> bool:
    """Whether the model is to compute with the threads that the application made for all its models."""
    return _POOLS in spec.surroundings and (spec.options or {}).get("use_per_session_threads") is False


def _refuse_own_threads(spec: ModelSpec) -> None:
    """Where the application has such threads, onnxruntime refuses a session with threads of its own.  So that
    it does here, it is told the same."""
    if _POOLS in spec.surroundings and not _uses_pools(spec):
        with contextlib.suppress(Exception):  # another model of this process was refused before
            onnxruntime.set_global_thread_pool_sizes(*spec.surroundings[_POOLS])


def _options(spec: ModelSpec, memory: Any) -> tuple[Any, list[Any]]:
    plain = dict(spec.options or {})
    if _uses_pools(spec):
        # One model in this process: pools of its own are the same as the process's.
        plain |= {"use_per_session_threads": True}
        plain |= dict(zip(_OF_POOLS[1:], spec.surroundings[_POOLS], strict=False))
    options = make_session_options(plain)
    places = plain.get("places", [])

    def find(which: list[int]) -> Any:
        index, nbytes = which
        return memory[places[index] : places[index] + nbytes]

    return options, [memory, *recordings.say_again(options, plain.get("calls", []), find)]


def _with_share(options: Any) -> tuple[Any, bool]:
    """Threads for as many processors as this process may use, where the caller left that to onnxruntime,
    which looks at the machine only.  Whether there was something to say."""
    count = resources.fewer_processors()
    if count is None or (options is not None and options.intra_op_num_threads):
        return options, False
    options = onnxruntime.SessionOptions() if options is None else options
    options.intra_op_num_threads = count
    return options, True


def _preload_cuda(spec: ModelSpec) -> None:
    """CUDA's libraries in the environment's Python packages: an application that imported torch, or called
    ``preload_dlls()`` itself, has them loaded."""
    wanted = {item[0] if isinstance(item, list) else item for item in spec.providers or []}
    preload = getattr(onnxruntime, "preload_dlls", None)
    if preload is not None and wanted & set(_CUDA) & set(onnxruntime.get_available_providers()):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            preload()


def describe(opened: Opened) -> ModelDescription:
    """What the session says of itself."""
    session = opened.session
    meta = session.get_modelmeta()
    return ModelDescription(
        inputs=_tensor_specs(session.get_inputs()),
        outputs=_tensor_specs(session.get_outputs()),
        overridable_initializers=_tensor_specs(session.get_overridable_initializers()),
        modelmeta={name: getattr(meta, name) for name in META_FIELDS},
        providers=session.get_providers(),
        provider_options=session.get_provider_options(),
        options=_options_of(opened),
        details={
            "input_memory_infos": _memory_infos(session, "get_input_memory_infos"),
            "output_memory_infos": _memory_infos(session, "get_output_memory_infos"),
            "input_epdevices": _epdevices(session),
            "profiling_start_time_ns": session.get_profiling_start_time_ns(),
            "fallback_providers": opened.fallback_providers,
            "fallback": opened.fallback,
            "remarks": opened.remarks,
        },
    )


def _options_of(opened: Opened) -> dict[str, Any]:
    options = read_session_options(opened.session.get_session_options(), opened.keys) or {}
    return options | ({"intra_op_num_threads": 0} if opened.shares else {}) | opened.as_set


def _tensor_specs(nodes: Sequence[Any]) -> list[TensorSpec]:
    return [TensorSpec(node.name, node.type, list(node.shape)) for node in nodes]


def _memory_infos(session: Any, method: str) -> list[list[Any]]:
    infos: list[Any] = getattr(session, method, list)()
    return [[i.name, i.allocator_type.name, i.device_id, i.mem_type.name] for i in infos]


def _epdevices(session: Any) -> list[Any]:
    devices: list[Any] = getattr(session, "get_input_epdevices", list)()
    return [None if device is None else recordings.device_identity(device) for device in devices]
