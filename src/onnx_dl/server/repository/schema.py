"""The messages of Triton's ModelConfig, and how text and JSON become plain data in Triton's JSON form.

Names, types and enums as in model_config.proto of triton-inference-server/common.  A field that the message
does not have is refused: it may be a slip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

from onnx_dl.core import keywords
from onnx_dl.server.repository.text_format import DEEPEST, Malformed, Node, Word

Path: TypeAlias = tuple[str | int, ...]
"""The way to a value: names of fields, indices of repeated ones, keys of maps."""

ENUMS: Final[dict[str, tuple[str, ...]]] = {
    "DataType": (
        "TYPE_INVALID", "TYPE_BOOL", "TYPE_UINT8", "TYPE_UINT16", "TYPE_UINT32", "TYPE_UINT64", "TYPE_INT8",
        "TYPE_INT16", "TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_FP64", "TYPE_STRING",
        "TYPE_BF16",
    ),
    "Format": ("FORMAT_NONE", "FORMAT_NHWC", "FORMAT_NCHW"),
    "GroupKind": ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL"),
    "SecondaryKind": ("KIND_NVDLA",),
    "BatchInputKind": (
        "BATCH_ELEMENT_COUNT", "BATCH_ACCUMULATED_ELEMENT_COUNT", "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO",
        "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE", "BATCH_ITEM_SHAPE", "BATCH_ITEM_SHAPE_FLATTEN",
    ),
    "BatchOutputKind": ("BATCH_SCATTER_WITH_INPUT_SHAPE",),
    "Priority": ("PRIORITY_DEFAULT", "PRIORITY_MAX", "PRIORITY_MIN"),
    "TimeoutAction": ("REJECT", "DELAY"),
    "ControlKind": (
        "CONTROL_SEQUENCE_START", "CONTROL_SEQUENCE_READY", "CONTROL_SEQUENCE_END", "CONTROL_SEQUENCE_CORRID",
    ),
}  # fmt: skip
"""Values by their numbers."""

_QUEUE: Final = {
    "timeout_action": "TimeoutAction", "default_timeout_microseconds": "uint64",
    "allow_timeout_override": "bool", "max_queue_size": "uint32",
}  # fmt: skip
_CUDA_GRAPH: Final = {"batch_size": "int32", "input": "map:string:Shape"}
MESSAGES: Final[dict[str, dict[str, str]]] = {
    "ModelConfig": {
        "name": "string", "platform": "string", "backend": "string", "runtime": "string",
        "version_policy": "VersionPolicy", "max_batch_size": "int32", "input": "Input*", "output": "Output*",
        "batch_input": "BatchInput*", "batch_output": "BatchOutput*", "optimization": "Optimization",
        "dynamic_batching": "DynamicBatching", "sequence_batching": "SequenceBatching",
        "ensemble_scheduling": "Ensembling", "instance_group": "InstanceGroup*",
        "default_model_filename": "string", "cc_model_filenames": "map:string:string",
        "metric_tags": "map:string:string", "parameters": "map:string:Parameter", "model_warmup": "Warmup*",
        "model_operations": "Operations", "model_transaction_policy": "TransactionPolicy",
        "model_repository_agents": "RepositoryAgents", "response_cache": "ResponseCache",
        "model_metrics": "Metrics",
    },
    "VersionPolicy": {"latest": "Latest", "all": "All", "specific": "Specific"},
    "Latest": {"num_versions": "uint32"}, "All": {}, "Specific": {"versions": "int64*"},
    "Input": {
        "name": "string", "data_type": "DataType", "format": "Format", "dims": "int64*", "reshape": "Reshape",
        "is_shape_tensor": "bool", "allow_ragged_batch": "bool", "optional": "bool",
        "is_non_linear_format_io": "bool",
    },
    "Output": {
        "name": "string", "data_type": "DataType", "dims": "int64*", "reshape": "Reshape",
        "label_filename": "string", "is_shape_tensor": "bool", "is_non_linear_format_io": "bool",
    },
    "Reshape": {"shape": "int64*"},
    "BatchInput": {
        "kind": "BatchInputKind", "target_name": "string*", "data_type": "DataType",
        "source_input": "string*",
    },
    "BatchOutput": {"target_name": "string*", "kind": "BatchOutputKind", "source_input": "string*"},
    "Optimization": {
        "graph": "Graph", "priority": "Priority", "cuda": "Cuda",
        "execution_accelerators": "Accelerators", "input_pinned_memory": "PinnedMemory",
        "output_pinned_memory": "PinnedMemory", "gather_kernel_buffer_threshold": "uint32",
        "eager_batching": "bool",
    },
    "Graph": {"level": "int32"},
    "Cuda": {
        "graphs": "bool", "busy_wait_events": "bool", "graph_spec": "GraphSpec*",
        "output_copy_stream": "bool",
    },
    "GraphSpec": {**_CUDA_GRAPH, "graph_lower_bound": "LowerBound"}, "LowerBound": _CUDA_GRAPH,
    "Shape": {"dim": "int64*"},
    "Accelerators": {
        "gpu_execution_accelerator": "Accelerator*", "cpu_execution_accelerator": "Accelerator*",
    },
    "Accelerator": {"name": "string", "parameters": "map:string:string"},
    "PinnedMemory": {"enable": "bool"},
    "QueuePolicy": _QUEUE,
    "DynamicBatching": {
        "preferred_batch_size": "int32*", "max_queue_delay_microseconds": "uint64",
        "preserve_ordering": "bool", "priority_levels": "uint64", "default_priority_level": "uint64",
        "default_queue_policy": "QueuePolicy", "priority_queue_policy": "map:uint64:QueuePolicy",
    },
    "SequenceBatching": {
        "direct": "Direct", "oldest": "Oldest", "max_sequence_idle_microseconds": "uint64",
        "control_input": "ControlInput*", "state": "State*", "iterative_sequence": "bool",
    },
    "Direct": {"max_queue_delay_microseconds": "uint64", "minimum_slot_utilization": "float"},
    "Oldest": {
        "max_candidate_sequences": "int32", "preferred_batch_size": "int32*",
        "max_queue_delay_microseconds": "uint64", "preserve_ordering": "bool",
    },
    "ControlInput": {"name": "string", "control": "SequenceControl*"},
    "SequenceControl": {
        "kind": "ControlKind", "int32_false_true": "int32*", "fp32_false_true": "float*",
        "bool_false_true": "bool*", "data_type": "DataType",
    },
    "State": {
        "input_name": "string", "output_name": "string", "data_type": "DataType", "dims": "int64*",
        "initial_state": "InitialState*", "use_same_buffer_for_input_output": "bool",
        "use_growable_memory": "bool",
    },
    "InitialState": {
        "data_type": "DataType", "dims": "int64*", "zero_data": "bool", "data_file": "string",
        "name": "string",
    },
    "Ensembling": {"step": "Step*", "max_inflight_requests": "uint32"},
    "Step": {
        "model_name": "string", "model_version": "int64", "input_map": "map:string:string",
        "output_map": "map:string:string", "model_namespace": "string",
    },
    "InstanceGroup": {
        "name": "string", "kind": "GroupKind", "count": "int32", "rate_limiter": "RateLimiter",
        "gpus": "int32*", "secondary_devices": "SecondaryDevice*", "profile": "string*", "passive": "bool",
        "host_policy": "string",
    },
    "RateLimiter": {"resources": "Resource*", "priority": "uint32"},
    "Resource": {"name": "string", "global": "bool", "count": "uint32"},
    "SecondaryDevice": {"kind": "SecondaryKind", "device_id": "int64"},
    "Parameter": {"string_value": "string"},
    "Warmup": {
        "name": "string", "batch_size": "uint32", "inputs": "map:string:WarmupInput", "count": "uint32",
    },
    "WarmupInput": {
        "data_type": "DataType", "dims": "int64*", "zero_data": "bool", "random_data": "bool",
        "input_data_file": "string",
    },
    "Operations": {"op_library_filename": "string*"},
    "TransactionPolicy": {"decoupled": "bool"},
    "RepositoryAgents": {"agents": "Agent*"}, "Agent": {"name": "string", "parameters": "map:string:string"},
    "ResponseCache": {"enable": "bool"},
    "Metrics": {"metric_control": "MetricControl*"},
    "MetricControl": {"metric_identifier": "MetricIdentifier", "histogram_options": "HistogramOptions"},
    "MetricIdentifier": {"family": "string"}, "HistogramOptions": {"buckets": "double*"},
}  # fmt: skip
"""Fields and their types: a scalar, an enum, a message; ``*``: repeated; ``map:KEY:VALUE``."""

CHOICES: Final = {
    "ModelConfig": (("dynamic_batching", "sequence_batching", "ensemble_scheduling"),),
    "VersionPolicy": (("latest", "all", "specific"),),
    "WarmupInput": (("zero_data", "random_data", "input_data_file"),),
    "SequenceBatching": (("direct", "oldest"),),
}
"""Fields of which a message has one at most."""
_INTEGERS: Final = {
    "int32": (-(2**31), 2**31 - 1), "int64": (-(2**63), 2**63 - 1), "uint32": (0, 2**32 - 1),
    "uint64": (0, 2**64 - 1),
}  # fmt: skip
_NOT_FINITE: Final = {"inf": math.inf, "infinity": math.inf, "nan": math.nan}


def of_tree(nodes: list[Node], lines: dict[Path, int]) -> dict[str, Any]:
    """A ModelConfig of a text.  ``lines`` gets the line of each value.  Raises Malformed."""
    return _message(nodes, "ModelConfig", (), lines)


def of_json(value: object) -> dict[str, Any]:
    """A ModelConfig of decoded JSON, as protobuf reads it: names also in camelCase, numbers also as text.
    Raises Malformed, without a line."""
    return _object(value, "ModelConfig", ())


def _message(nodes: list[Node], kind: str, at: Path, lines: dict[Path, int]) -> dict[str, Any]:
    fields = MESSAGES[kind]
    found: dict[str, Any] = {}
    for node in nodes:
        declared = _declared(fields, node.name, node.line)
        if declared.startswith("map:"):
            key, value = _entry(node, declared, (*at, node.name), lines)
            found.setdefault(node.name, {})[key] = value
            continue
        if declared.endswith("*"):
            items = found.setdefault(node.name, [])
            place: Path = (*at, node.name, len(items))
            items.append(_typed(node, declared[:-1], place, lines))
            lines.setdefault((*at, node.name), node.line)
        elif node.name in found:
            raise Malformed(node.line, f"{node.name} is given twice")
        else:
            place = (*at, node.name)
            found[node.name] = _typed(node, declared, place, lines)
        lines[place] = node.line
    _check_choices(kind, found, nodes[-1].line if nodes else 0)
    return found


def _entry(node: Node, declared: str, at: Path, lines: dict[Path, int]) -> tuple[str, Any]:
    """One entry of a map: a message with a key and a value."""
    _, key_kind, value_kind = declared.split(":")
    if not isinstance(node.value, list):
        raise Malformed(node.line, f"{node.name} takes entries such as {{ key: ... value: ... }}")
    parts: dict[str, Node] = {}
    for part in node.value:
        _declared({"key": "", "value": ""}, part.name, part.line)
        if part.name in parts:
            raise Malformed(part.line, f"{part.name} is given twice")
        parts[part.name] = part
    key = str(_typed(parts["key"], key_kind, at, lines)) if "key" in parts else ""
    lines.setdefault(at, node.line)
    lines[*at, key] = node.line
    if "value" in parts:
        return key, _typed(parts["value"], value_kind, (*at, key), lines)
    return key, {} if value_kind in MESSAGES else ""


def _typed(node: Node, kind: str, at: Path, lines: dict[Path, int]) -> Any:
    if kind in MESSAGES:
        if not isinstance(node.value, list):
            raise Malformed(node.line, f"{node.name} takes a message: {node.name} {{ ... }}")
        return _message(node.value, kind, at, lines)
    if isinstance(node.value, list):
        raise Malformed(node.line, f"{node.name} takes {_allowed(kind)}, not a message")
    return _scalar(node.value, kind, node.name, node.line)


def _scalar(value: str | int | float, kind: str, name: str, line: int) -> Any:
    """A value of the text, as this type."""
    is_word = isinstance(value, Word)
    if kind == "string" and isinstance(value, str) and not is_word:
        return str(value)
    if kind == "bool":
        if is_word and value in ("true", "True", "t", "false", "False", "f"):
            return value in ("true", "True", "t")
        if value in (0, 1) and isinstance(value, int):
            return bool(value)
    if kind in _INTEGERS and isinstance(value, int):
        return _integer(value, kind, name, line)
    if kind in ("float", "double"):
        if isinstance(value, int | float):
            return float(value)
        if is_word and value.lower().lstrip("-") in _NOT_FINITE:
            return (-1 if value[0] == "-" else 1) * _NOT_FINITE[value.lower().lstrip("-")]
    if kind in ENUMS and (is_word or isinstance(value, int)):
        return _enumerated(str(value) if is_word else value, kind, name, line)
    shown = repr(str(value)[:60]) if isinstance(value, str) and not is_word else str(value)[:60]
    raise Malformed(line, f"{name} takes {_allowed(kind)}, not {shown}")


def _integer(value: int, kind: str, name: str, line: int) -> int:
    least, most = _INTEGERS[kind]
    if not least <= value <= most:
        raise Malformed(line, f"{name} takes {_allowed(kind)}, not {str(value)[:40]}")
    return value


def _enumerated(value: object, kind: str, name: str, line: int) -> str:
    values = ENUMS[kind]
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(values):
        return values[value]
    if isinstance(value, str) and value in values:
        return value
    near = keywords.hint([value], values) if isinstance(value, str) else ""
    raise Malformed(
        line, f"{name} takes one of {', '.join(values)}, not {str(value)[:60]}.{near}".rstrip(".")
    )


def _allowed(kind: str) -> str:
    if kind == "string":
        return "text in quotes"
    if kind == "bool":
        return "true or false"
    if kind in _INTEGERS:
        return f"a whole number from {_INTEGERS[kind][0]} to {_INTEGERS[kind][1]}"
    return f"one of {', '.join(ENUMS[kind])}" if kind in ENUMS else "a number"


def _declared(fields: Mapping[str, str], name: str, line: int) -> str:
    if name in fields:
        return fields[name]
    hint = keywords.hint([name], fields)
    known = "" if hint else f" Known here are: {', '.join(fields) or 'no fields'}."
    raise Malformed(line, f"{name[:80]} is not a field here.{hint or known}".rstrip("."))


def _check_choices(kind: str, found: Mapping[str, Any], line: int) -> None:
    for choice in CHOICES.get(kind, ()):
        given = [name for name in choice if name in found]
        if len(given) > 1:
            raise Malformed(line, f"{' and '.join(given)} exclude each other")


# --- JSON -------------------------------------------------------------------------------------------------


def _object(value: object, kind: str, at: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Malformed(0, f"{_dotted(at)} takes an object")
    if len(at) > DEEPEST:
        raise Malformed(0, f"objects are nested more than {DEEPEST} levels deep")
    fields = MESSAGES[kind]
    names = {_camel(name): name for name in fields}
    found: dict[str, Any] = {}
    for given, item in value.items():
        name = names.get(given, given) if isinstance(given, str) else str(given)
        declared = _declared(fields, name, 0)
        if item is None:  # protobuf: as if it were not given
            continue
        if name in found:
            raise Malformed(0, f"{name} is given twice")
        found[name] = _json(item, declared, (*at, name))
    _check_choices(kind, found, 0)
    return found


def _json(value: object, declared: str, at: Path) -> Any:
    if declared.startswith("map:"):
        if not isinstance(value, dict):
            raise Malformed(0, f"{_dotted(at)} takes an object")
        kind = declared.split(":")[2]
        return {str(key): _json(item, kind, (*at, str(key))) for key, item in value.items()}
    if declared.endswith("*"):
        if not isinstance(value, list):
            raise Malformed(0, f"{_dotted(at)} takes an array")
        return [_json(item, declared[:-1], (*at, index)) for index, item in enumerate(value)]
    if declared in MESSAGES:
        return _object(value, declared, at)
    return _json_scalar(value, declared, _dotted(at))


def _json_scalar(value: object, kind: str, name: str) -> Any:
    if kind == "string" and isinstance(value, str):
        return value
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind in _INTEGERS and not isinstance(value, bool):
        number = _whole(value)
        if number is not None:
            return _integer(number, kind, name, 0)
    if kind in ("float", "double") and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    if kind in ENUMS and isinstance(value, str | int):
        return _enumerated(value, kind, name, 0)
    raise Malformed(0, f"{name} takes {_allowed(kind)}, not {str(value)[:60]!r}")


def _whole(value: object) -> int | None:
    """The integer of a JSON number or text; None: it is none."""
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and len(value) <= 40 and value.strip().lstrip("-").isdecimal():
        return int(value)
    return None


def _camel(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(other.capitalize() for other in others)


def _dotted(at: Path) -> str:
    return ".".join(str(part) for part in at)[:120] or "the configuration"
