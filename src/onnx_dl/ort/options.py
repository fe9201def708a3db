"""onnxruntime's SessionOptions, RunOptions and providers, to and from plain data.

Covers all that can be read back from these C++ objects; they can be neither pickled nor copied.  Config
entries can be read by key only, so the keys that onnxruntime knows are listed here; what cannot be read back
at all comes from :mod:`onnx_dl.ort.recorder` by way of :mod:`onnx_dl.ort.recordings`.  onnxruntime is imported only to
make such an object, never to read one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any, Final

from onnx_dl.core.status import to_plain
from onnx_dl.errors import ConfigError
from onnx_dl.ort import recorder, recordings

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


def read_session_options(options: Any, more_keys: Iterable[str] = ()) -> dict[str, Any] | None:
    """A SessionOptions as plain data; None stays None.  ``more_keys``: of entries that may be there, too.

    Raises:
        AttributeError: it is no SessionOptions, in onnxruntime's words.
    """
    if options is None:
        return None
    options.has_providers()
    return _read(options, SESSION_FIELDS, "get_session_config_entry", (*SESSION_KEYS, *more_keys))


def record_session_options(options: Any) -> tuple[dict[str, Any] | None, recordings.Portable | None]:
    """Like :func:`read_session_options`, with what was recorded; and that with the arrays that it names.

    Raises:
        AttributeError: it is no SessionOptions, in onnxruntime's words.
        ConfigError: it was told what cannot reach a worker.
    """
    plain = read_session_options(options)
    if plain is None:
        return None, None
    found = recordings.portable(options, recorder.SESSION_METHODS)
    plain["config"] |= {key: value for key, value in found.config.items() if key not in plain["config"]}
    if options.has_providers() and not any("provider" in name for name, *_ in found.calls):
        raise ConfigError(
            "add_provider() or add_provider_for_devices() of this SessionOptions was called before onnx_dl "
            "was imported, and onnxruntime does not tell which provider it was. Import onnx_dl before it."
        )
    return plain | ({"calls": found.calls} if found.calls else {}), found


def read_run_options(options: Any) -> dict[str, Any] | None:
    """A RunOptions as plain data; None stays None.

    Of anything else only its ``repr`` travels, for onnxruntime to refuse it in its own words.

    Raises:
        ConfigError: it was told what cannot reach a worker.
    """
    if options is None:
        return None
    if not hasattr(options, "get_run_config_entry"):
        return {"stranger": repr(options)}
    plain = _read(options, RUN_FIELDS, "get_run_config_entry", RUN_KEYS)
    found = recordings.portable(options, recorder.RUN_METHODS)
    plain["config"] |= {key: value for key, value in found.config.items() if key not in plain["config"]}
    return plain | {"calls": found.calls} if found.calls else plain


def _read(options: Any, fields: Sequence[str], getter: str, keys: Sequence[str]) -> dict[str, Any]:
    values = {name: getattr(options, name) for name in fields if hasattr(options, name)}
    plain = {name: getattr(value, "name", value) for name, value in values.items()}
    config = {}
    for key in keys:
        try:
            config[key] = getattr(options, getter)(key)
        except RuntimeError:  # not set
            continue
    return plain | {"config": config}


def make_session_options(plain: dict[str, Any]) -> Any:
    """An ``onnxruntime.SessionOptions`` that says the same, except what was recorded; imports it."""
    import onnxruntime

    return _fill(onnxruntime.SessionOptions(), plain, onnxruntime, "add_session_config_entry")


class _Stranger:
    """Something that is no RunOptions, and looks like what the caller gave."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def make_run_options(plain: dict[str, Any]) -> Any:
    """An ``onnxruntime.RunOptions`` that says the same; imports onnxruntime."""
    import onnxruntime

    if "stranger" in plain:
        return _Stranger(plain["stranger"])

    options = _fill(onnxruntime.RunOptions(), plain, onnxruntime, "add_run_config_entry")
    recordings.say_again(options, plain.get("calls", []), lambda place: None)
    return options


def _fill(options: Any, plain: dict[str, Any], onnxruntime: Any, setter: str) -> Any:
    for name, value in plain.items():
        if name == "config":
            for key, text in value.items():
                getattr(options, setter)(key, text)
        elif name not in ("calls", "places"):
            enum_name = _ENUMS.get(name)
            setattr(options, name, getattr(getattr(onnxruntime, enum_name), value) if enum_name else value)
    return options


def in_order(providers: Any) -> bool:
    """Whether these are names, or pairs of name and options: what onnxruntime takes."""
    return providers is None or (
        isinstance(providers, list | tuple)
        and all(
            isinstance(item, str)
            or (
                isinstance(item, tuple)
                and len(item) == 2
                and isinstance(item[0], str)
                and isinstance(item[1], dict)
            )
            for item in providers
        )
    )


def faithful(value: Any) -> Any:
    """Plain data that :func:`as_given` turns into the same again, lists and tuples and sets told apart.

    For arguments that onnxruntime is to refuse in its own words, where it shows them.
    """
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if type(value) in (list, tuple, set, frozenset):
        return {type(value).__name__: [faithful(item) for item in value]}
    if type(value) is dict:
        return {"dict": [[faithful(key), faithful(item)] for key, item in value.items()]}
    return {"other": repr(value)}


_CONTAINERS: Final = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def as_given(plain: Any) -> Any:
    """What :func:`faithful` read."""
    if not isinstance(plain, dict):
        return plain
    ((kind, items),) = plain.items()
    if kind == "other":
        return _Stranger(items)
    if kind == "dict":
        return {as_given(key): as_given(item) for key, item in items}
    return _CONTAINERS[kind](as_given(item) for item in items)


def read_providers(providers: Any) -> list[Any] | None:
    """``providers=`` as plain data: names, or ``[name, options]``; None stays None.

    Raises:
        ConfigError: it holds something that is neither text nor a number nor a container of these.
    """
    return None if providers is None else [_read_provider(item) for item in providers]


def _read_provider(item: Any) -> Any:
    if isinstance(item, tuple | list):
        return [_read_provider(part) for part in item]
    if isinstance(item, dict):
        return {str(key): _read_provider(value) for key, value in item.items()}
    if item is None or type(item) in (str, int, float, bool):
        return item
    with contextlib.suppress(TypeError):
        return to_plain(item)
    raise ConfigError(f"providers= and provider_options= cannot hold a {type(item).__name__}: {item!r}.")


def provider_names(plain: list[Any] | None) -> tuple[str, ...]:
    """The names in what :func:`read_providers` read."""
    names = [item[0] if isinstance(item, list) and item else item for item in plain or ()]
    return tuple(name for name in names if isinstance(name, str))


def make_providers(plain: list[Any] | None) -> list[Any] | None:
    """What :func:`read_providers` read, in the form that onnxruntime takes."""
    return None if plain is None else [tuple(p) if isinstance(p, list) else p for p in plain]
