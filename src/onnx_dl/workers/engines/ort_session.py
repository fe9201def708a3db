"""Makes an ``onnxruntime.InferenceSession`` as the application would, and describes it.

onnxruntime copies a model's bytes before it reads them, and so does Python; a file is read piece by piece.
Bytes of a caller lie in memory that has a path under /proc, and are read there.  They are copied where a path
could change the meaning (files beside the model, formats known by the file name, names in profiles), and
where there is no /proc.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
import onnxruntime

from onnx_dl.core import load_output, model_files
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.status import ModelDescription, TensorSpec
from onnx_dl.ort import options as plain_options
from onnx_dl.ort import recordings
from onnx_dl.ort.metadata import ModelMetadata
from onnx_dl.ort.options import decode_refused, make_providers
from onnx_dl.ort.ortvalues import Bytes
from onnx_dl.system import resources
from onnx_dl.tensors import live_initializers, segment
from onnx_dl.workers.engines import thread_spinning
from onnx_dl.workers.load_cache.rules import ABOUT_FILES

_CUDA: Final = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")
_PATHLESS: Final = ("CPUExecutionProvider", "CUDAExecutionProvider")
"""Providers that do not use the path of a model."""


class LoadedSession:
    """A session, what was printed while it was made, and objects that must live as long as it."""

    def __init__(self, spec: ModelSpec, data: bytes | None, memory: int | None = None) -> None:
        """``memory``: descriptor of the arrays that the options name; taken over.

        Raises:
            Exception: onnxruntime's; its attribute ``remarks`` is what was printed before.
        """
        self.keys = list((spec.options or {}).get("config", {}))
        if spec.isolation:  # else these are the application's, in this process already
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
        # In the application's process, threads of a session spin as those of the application's own sessions.
        config = (spec.options or {}).get("config", {})
        self.added = thread_spinning.spin_entries(config) if spec.isolation else {}
        """Session config entries that the caller did not set; they are not described."""
        if options is None and (count is not None or self.added):
            options = onnxruntime.SessionOptions()
        if options is not None:
            _adjust(options, count, self.added)
        self.as_set = {name: (spec.options or {})[name] for name in _OF_POOLS} if _uses_pools(spec) else {}
        """Options that are described as the caller set them, though the session has others."""
        extra = {name: value for name, value in spec.extra.items() if name not in (_GIVEN, "tuple")}
        # In the application, prints and warnings of other threads would be captured, too.
        nothing: contextlib.nullcontext[load_output.Remarks] = contextlib.nullcontext([])
        with load_output.captured() if spec.isolation else nothing as self.remarks:
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
    wanted = (spec.options or {}).get("use_per_session_threads") is False
    return spec.isolation and _POOLS in spec.surroundings and wanted


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


def _adjust(options: onnxruntime.SessionOptions, threads: int | None, entries: Mapping[str, str]) -> None:
    """Sets what the caller left open.  ``threads``: None: as they are."""
    if threads is not None:
        options.intra_op_num_threads = threads
    for key, value in entries.items():
        options.add_session_config_entry(key, value)


def _preload_cuda(spec: ModelSpec) -> None:
    """Loads CUDA's libraries from Python packages, as ``preload_dlls()`` or torch did in the application."""
    preload = getattr(onnxruntime, "preload_dlls", None)
    wanted = set(_CUDA).intersection(spec.provider_names, onnxruntime.get_available_providers())
    if preload is not None and wanted:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            preload()


def load_from_memory(spec: ModelSpec, blob: int, memory: Callable[[], int | None]) -> LoadedSession:
    """Loads a model that lies in the memory of a descriptor.

    Args:
        memory: makes a descriptor of the arrays that the options name, for each attempt.

    Raises:
        Exception: what onnxruntime raises for bytes.
    """
    path = segment.path_of(blob)
    if is_like_a_file(spec) and _is_plain(blob) and _is_there(path, blob):
        try:
            return LoadedSession(msgspec.structs.replace(spec, path=path, blob=None), None, memory())
        except Exception as error:
            if path not in str(error):  # else it is an error of reading a file; for bytes its text differs
                raise
    return LoadedSession(spec, segment.thaw(blob), memory())


def files_of(spec: ModelSpec, blob: int | None = None) -> list[str]:
    """Returns the names of all files that onnxruntime reads for it: its own, external data, libraries.

    ``blob``: descriptor of the model, if it is given as bytes.
    """
    beside: list[str] = []
    model = spec.where("") if blob is None else blob
    with contextlib.suppress(OSError, ValueError):  # the load raises the proper error
        beside = model_files.external_files(model)
    return [*([""] if blob is None else []), *beside, *spec.libraries]


def is_like_a_file(spec: ModelSpec) -> bool:
    """Tells whether options and providers mean the same for bytes and for a file with them."""
    options = spec.options or {}
    return (
        not any(part in key for key in options.get("config", {}) for part in ABOUT_FILES)
        and not any("provider" in name for name, *_ in options.get("calls", []))
        and not options.get("enable_profiling")
        and not options.get("optimized_model_filepath")
        and set(spec.extra) <= {"enable_fallback", "tuple"}
        and not spec.surroundings.get("environment")  # ORT_LOAD_CONFIG_FROM_MODEL
        and {*spec.provider_names} <= set(_PATHLESS)
    )


def _is_plain(blob: int) -> bool:
    """Tells whether it is an ONNX model without external data."""
    try:
        return not model_files.external_files(blob)
    except (OSError, ValueError):
        return False


def _is_there(path: str, blob: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(blob))
    except OSError:  # /proc is missing or incomplete
        return False


def describe(loaded: LoadedSession) -> ModelDescription:
    """Returns the session's metadata."""
    session = loaded.session
    meta = session.get_modelmeta()
    return ModelDescription(
        inputs=_tensor_specs(session.get_inputs()),
        outputs=_tensor_specs(session.get_outputs()),
        overridable_initializers=_tensor_specs(session.get_overridable_initializers()),
        modelmeta={field.name: getattr(meta, field.name) for field in dataclasses.fields(ModelMetadata)},
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
    for key in loaded.added:
        options["config"].pop(key, None)
    return options | ({"intra_op_num_threads": 0} if loaded.limits_threads else {}) | loaded.as_set


def _tensor_specs(nodes: Sequence[onnxruntime.NodeArg]) -> list[TensorSpec]:
    return [TensorSpec(node.name, node.type, list(node.shape)) for node in nodes]


def _memory_infos(session: onnxruntime.InferenceSession, method: str) -> list[list[object]]:
    infos: Sequence[onnxruntime.OrtMemoryInfo] = getattr(session, method, list)()
    return [[i.name, i.allocator_type.name, i.device_id, i.mem_type.name] for i in infos]


def _epdevices(session: onnxruntime.InferenceSession) -> list[list[object] | None]:
    devices: Sequence[onnxruntime.OrtEpDevice | None] = getattr(session, "get_input_epdevices", list)()
    return [None if device is None else recordings.device_identity(device) for device in devices]
