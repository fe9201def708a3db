"""Converts onnxruntime's SessionOptions, RunOptions and providers to plain data and back.

Covers all that can be read from these C++ objects; they can be neither pickled nor copied.  Config entries
can be read by key only, so the keys that onnxruntime knows are listed here.  What cannot be read comes from
:mod:`onnx_dl.ort.recorder` by :mod:`onnx_dl.ort.recordings`.  Only making such an object imports onnxruntime.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from onnx_dl.core.status import to_plain
from onnx_dl.errors import ConfigError
from onnx_dl.ort import recorder, recordings

if TYPE_CHECKING:
    import onnxruntime

PlainOptions = dict[str, Any]
"""Options by attribute; ``config``: config entries; ``calls``: recorded; ``places``: of their arrays."""
Providers = list[object]
"""Names, or ``[name, options]``."""

_ADDRESSES: Final = frozenset(
    "user_compute_stream has_user_compute_stream gpu_external_alloc gpu_external_free "
    "gpu_external_empty_cache".split()
)
"""Options of providers that are addresses in the process that gives them, or tell of one."""
_UNSET: Final = ("", "0", 0, None, False)

SESSION_FIELDS: Final = (
    "enable_cpu_mem_arena",
    "enable_mem_pattern",
    "enable_mem_reuse",
    "enable_profiling",
    "execution_mode",
    "execution_order",
    "graph_optimization_level",
    "inter_op_num_threads",
    "intra_op_num_threads",
    "log_severity_level",
    "log_verbosity_level",
    "logid",
    "optimized_model_filepath",
    "profile_file_prefix",
    "use_deterministic_compute",
    "use_per_session_threads",
)
RUN_FIELDS: Final = (
    "log_severity_level",
    "log_verbosity_level",
    "logid",
    "only_execute_path_to_fetches",
    "terminate",
)
_ENUMS: Final = {
    "execution_mode": "ExecutionMode",
    "execution_order": "ExecutionOrder",
    "graph_optimization_level": "GraphOptimizationLevel",
}
# onnxruntime_session_options_config_keys.h, as of onnxruntime 1.31.
SESSION_KEYS: Final = """
ep.context_embed_mode ep.context_enable ep.context_file_path ep.context_model_external_initializers_file_name
ep.context_node_name_prefix ep.dynamic.workload_type ep.enable_weightless ep.nvtensorrtrtx.max_shared_mem_size
ep.share_ep_contexts ep.stop_share_ep_contexts
mlas.disable_kleidiai mlas.enable_gemm_fastmath_arm64_bfloat16 mlas.qnbit.force_fp32 mlas.use_lut_gemm
optimization.constant_folding_max_output_size_in_bytes optimization.disable_specified_optimizers
optimization.enable_cast_chain_elimination optimization.enable_gelu_approximation
optimization.minimal_build_optimizations
session.allow_released_opsets_only session.collect_node_memory_stats_to_file session.compile_only
session.debug_layout_transformation session.disable_aot_function_inlining session.disable_cpu_ep_fallback
session.disable_double_qdq_remover session.disable_model_compile session.disable_prepacking
session.disable_qdq_constant_folding session.disable_quant_qdq session.dynamic_block_base
session.enable_dq_matmulnbits_fusion session.enable_quant_qdq_cleanup
session.enable_saved_runtime_optimizations session.fail_on_suboptimal_compiled_model
session.force_spinning_stop session.function_expansion_byte_limit session.function_expansion_node_limit
session.graph_optimizations_loop_level session.inter_op.allow_spinning session.inter_op.spin_backoff_max
session.inter_op.spin_duration_us session.intra_op.allow_spinning session.intra_op.spin_backoff_max
session.intra_op.spin_duration_us session.intra_op_thread_affinities session.layer_assignment_settings
session.load_model_format session.max_shape_override session.model_external_initializers_file_folder_path
session.node_partition_config_file session.optimized_model_external_initializers_file_name
session.optimized_model_external_initializers_min_size_in_bytes session.prepack.enable_parallel
session.qdq_matmulnbits_accuracy_level session.qdq_matmulnbits_block_size session.qdqisint8allowed
session.record_ep_graph_assignment_info session.resource_cuda_partitioning_settings
session.save_external_prepacked_constant_initializers session.save_model_format session.set_denormal_as_zero
session.strict_shape_type_inference session.use_device_allocator_for_initializers
session.use_env_allocators session.use_memory_mapped_ort_model session.use_ort_model_bytes_directly
session.use_ort_model_bytes_for_initializers session.x64quantprecision
""".split()
RUN_KEYS: Final = """
disable_synchronize_execution_providers ep.dynamic.workload_type gpu_graph_id
memory.enable_memory_arena_shrinkage qnn.htp_perf_mode qnn.htp_perf_mode_post_run qnn.lora_config
qnn.rpc_control_latency
""".split()


def read_session_options(
    options: onnxruntime.SessionOptions | None, more_keys: Iterable[str] = ()
) -> PlainOptions | None:
    """Returns a SessionOptions as plain data; None stays None.  ``more_keys``: further config entries.

    Raises:
        AttributeError: it is no SessionOptions; the text is onnxruntime's.
    """
    if options is None:
        return None
    options.has_providers()
    return _read(options, SESSION_FIELDS, "get_session_config_entry", (*SESSION_KEYS, *more_keys))


def record_session_options(
    options: onnxruntime.SessionOptions | None,
) -> tuple[PlainOptions | None, recordings.PortableCalls | None]:
    """Returns a SessionOptions with its recorded calls as plain data, and the calls with their arrays.

    Raises:
        AttributeError: it is no SessionOptions; the text is onnxruntime's.
        ConfigError: one of the calls cannot be repeated in a worker.
    """
    plain = read_session_options(options)
    if plain is None or options is None:
        return None, None
    found = recordings.portable(options, recorder.SESSION_METHODS)
    plain["config"] = found.config | plain["config"]
    if options.has_providers() and not any("provider" in str(name) for name, *_ in found.calls):
        raise ConfigError(
            "add_provider() or add_provider_for_devices() of this SessionOptions was called before onnx_dl "
            "was imported, and onnxruntime cannot report which provider it was. Import onnx_dl before it."
        )
    return plain | ({"calls": found.calls} if found.calls else {}), found


def read_run_options(options: onnxruntime.RunOptions | None) -> PlainOptions | None:
    """Returns a RunOptions as plain data; None stays None.

    Of any other object only the ``repr`` is sent: onnxruntime has to refuse it with its own message.

    Raises:
        ConfigError: one of the recorded calls cannot be repeated in a worker.
    """
    if options is None:
        return None
    if not hasattr(options, "get_run_config_entry"):
        return {"stranger": repr(options)}
    plain = _read(options, RUN_FIELDS, "get_run_config_entry", RUN_KEYS)
    found = recordings.portable(options, recorder.RUN_METHODS)
    plain["config"] = found.config | plain["config"]
    return plain | {"calls": found.calls} if found.calls else plain


def _read(options: object, fields: Sequence[str], getter: str, keys: Sequence[str]) -> PlainOptions:
    values = {name: getattr(options, name) for name in fields if hasattr(options, name)}
    plain = {name: getattr(value, "name", value) for name, value in values.items()}
    config = {}
    for key in keys:
        try:
            config[key] = getattr(options, getter)(key)
        except RuntimeError:  # not set
            continue
    return plain | {"config": config}


def make_session_options(plain: PlainOptions) -> onnxruntime.SessionOptions:
    """Makes an ``onnxruntime.SessionOptions`` without the recorded calls; imports onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    _fill(options, plain, onnxruntime, "add_session_config_entry")
    return options


class _Lookalike:
    """Stands for an argument of a type that onnxruntime refuses; has the same ``repr``."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def make_run_options(plain: PlainOptions) -> onnxruntime.RunOptions:
    """Makes an ``onnxruntime.RunOptions``, or a lookalike of another object; imports onnxruntime."""
    import onnxruntime

    if "stranger" in plain:
        return _Lookalike(plain["stranger"])

    options = onnxruntime.RunOptions()
    _fill(options, plain, onnxruntime, "add_run_config_entry")
    recordings.replay(options, plain.get("calls", []))
    return options


def _fill(options: object, plain: PlainOptions, onnxruntime: ModuleType, setter: str) -> None:
    for name, value in plain.items():
        if name == "config":
            for key, text in value.items():
                getattr(options, setter)(key, text)
        elif name not in ("calls", "places"):
            enum_name = _ENUMS.get(name)
            setattr(options, name, getattr(getattr(onnxruntime, enum_name), value) if enum_name else value)


def are_accepted(providers: object) -> bool:
    """Tells whether onnxruntime accepts these providers: names, or pairs of name and options."""
    if not isinstance(providers, list | tuple):
        return providers is None
    pairs = [item for item in providers if not isinstance(item, str)]
    return all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], dict)
        for pair in pairs
    )


def check_addresses(*plain: object) -> None:
    """Checks that providers and recorded calls, as plain data, name no address.

    Raises:
        ConfigError: an option of a provider is an address of this process.
    """
    for value in plain:
        if isinstance(value, dict):
            pairs = value["$dict"] if list(value) == ["$dict"] else value.items()
            for name, setting in pairs:
                if name in _ADDRESSES and setting not in _UNSET:
                    raise ConfigError(
                        f"The provider option {name}={setting!r} is an address of this process, or tells of "
                        "one: it means nothing in the model's worker. Leave it out, or run the model in this "
                        "process with isolation=False. Without it, a call waits for what this process has "
                        "given to the GPU, and its results are there when it returns."
                    )
            check_addresses(*value.values())
        elif isinstance(value, list | tuple):
            check_addresses(*value)


def encode_refused(value: object) -> object:
    """Encodes an argument that onnxruntime has to refuse, exactly, because its message shows the argument."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple | set | frozenset) and type(value) in _CONTAINERS.values():
        return {type(value).__name__: [encode_refused(item) for item in value]}
    if isinstance(value, dict) and type(value) is dict:
        return {"dict": [[encode_refused(key), encode_refused(item)] for key, item in value.items()]}
    return {"other": repr(value)}


_CONTAINERS: Final[Mapping[str, Callable[..., object]]] = {
    kind.__name__: kind for kind in (list, tuple, set, frozenset)
}


def decode_refused(plain: object) -> object:
    """Restores an argument that :func:`encode_refused` encoded."""
    if not isinstance(plain, dict):
        return plain
    ((kind, items),) = plain.items()
    if kind == "other":
        return _Lookalike(items)
    if kind == "dict":
        return {decode_refused(key): decode_refused(item) for key, item in items}
    return _CONTAINERS[kind](decode_refused(item) for item in items)


def read_providers(providers: Iterable[object] | None) -> Providers | None:
    """Returns ``providers=`` as plain data; None stays None.

    Raises:
        ConfigError: it holds something that is neither text nor a number nor a container of these.
    """
    return None if providers is None else [_read_provider(item) for item in providers]


def _read_provider(item: object) -> object:
    if isinstance(item, tuple | list):
        return [_read_provider(part) for part in item]
    if isinstance(item, dict):
        return {str(key): _read_provider(value) for key, value in item.items()}
    if item is None or type(item) in (str, int, float, bool):
        return item
    with contextlib.suppress(TypeError):
        return to_plain(item)
    raise ConfigError(f"providers= and provider_options= cannot hold a {type(item).__name__}: {item!r}.")


def make_providers(plain: Providers | None) -> Providers | None:
    """Returns a result of :func:`read_providers` in the form that onnxruntime takes."""
    return None if plain is None else [tuple(p) if isinstance(p, list) else p for p in plain]
