"""The tables of ``host.toml`` as typed structs, and errors about values of the wrong type.

The description of a type says what is allowed, for the error message.
"""

from __future__ import annotations

import enum
import json
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from onnx_dl.core import keywords

_Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
_Scalar = bool | Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | float | str
_Name = Annotated[str, Meta(min_length=1)]

_Threads = Annotated[
    Annotated[int, Meta(ge=0, le=4096)] | None, Meta(description="a number of threads from 0 to 4096")
]
_Severity = Annotated[Annotated[int, Meta(ge=-1, le=4)] | None, Meta(description="a number from 0 to 4")]
"""Number from -1 on; -1 stands for onnxruntime's default."""

_Flag = Annotated[bool | None, Meta(description="true or false")]
_Whole = Annotated[_Int32 | None, Meta(description="a whole number of 32 bits")]
_Text = Annotated[str | None, Meta(description="text in quotes")]
_Size = Annotated[int | str | None, Meta(description='a number of bytes, or text such as "2GiB"')]
_GpuSize = Annotated[
    int | str | dict[str, int | str] | None,
    Meta(description='a number of bytes, text such as "2GiB", or a table of these by number of the device'),
]
_Time = Annotated[int | float | str | None, Meta(description='a number of seconds, or text such as "90s"')]
_Ttl = Annotated[
    int | float | str | None, Meta(description='-1, 0, a number of seconds, or text such as "5m"')
]
_Providers = Annotated[
    list[str | tuple[str, dict[str, _Scalar]]] | None,
    # Not _Name: in a union of text with a minimum length and a tuple, msgspec 0.22 reads a wrong length.
    Meta(description='a list of names, or of pairs such as ["CUDAExecutionProvider", {device_id = 0}]'),
]


class _Choice(enum.Enum):
    """Members have onnxruntime's names; values are short names."""

    @classmethod
    def _missing_(cls, value: object) -> _Choice | None:
        return cls.__members__.get(str(value))


class _Mode(_Choice):
    ORT_SEQUENTIAL = "sequential"
    ORT_PARALLEL = "parallel"


class _Order(_Choice):
    DEFAULT = "default"
    PRIORITY_BASED = "priority_based"
    MEMORY_EFFICIENT = "memory_efficient"


class _Level(_Choice):
    ORT_DISABLE_ALL = "disable_all"
    ORT_ENABLE_BASIC = "basic"
    ORT_ENABLE_EXTENDED = "extended"
    ORT_ENABLE_LAYOUT = "layout"
    ORT_ENABLE_ALL = "all"


def _one_of(names: type[_Choice]) -> Meta:
    return Meta(description="one of " + ", ".join(f'"{choice.value}" ({choice.name})' for choice in names))


class SessionTable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``options``: onnxruntime's SessionOptions; None: onnxruntime's default."""

    enable_cpu_mem_arena: _Flag = None
    enable_mem_pattern: _Flag = None
    enable_mem_reuse: _Flag = None
    enable_profiling: _Flag = None
    execution_mode: Annotated[_Mode | None, _one_of(_Mode)] = None
    execution_order: Annotated[_Order | None, _one_of(_Order)] = None
    graph_optimization_level: Annotated[_Level | None, _one_of(_Level)] = None
    inter_op_num_threads: _Threads = None
    intra_op_num_threads: _Threads = None
    log_severity_level: _Severity = None
    log_verbosity_level: _Whole = None
    logid: _Text = None
    optimized_model_filepath: _Text = None
    profile_file_prefix: _Text = None
    use_deterministic_compute: _Flag = None
    use_per_session_threads: _Flag = None
    config: Annotated[
        dict[Annotated[str, Meta(min_length=1, max_length=1024)], str],
        Meta(
            description='text in quotes, such as "session.intra_op.allow_spinning" = "0", '
            "by a key of 1 to 1024 characters"
        ),
    ] = {}

    def plain(self) -> dict[str, Any]:
        """The given options, as arguments of :func:`onnx_dl.ort.options.make_session_options`."""
        given = {name: getattr(self, name) for name in self.__struct_fields__}
        return {
            name: value.name if isinstance(value, enum.Enum) else value
            for name, value in given.items()
            if value not in (None, {})
        }


class InputTable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One input in ``warmup``."""

    shape: Annotated[
        Annotated[list[Annotated[int, Meta(ge=0, le=2**31 - 1)]], Meta(max_length=32)],
        Meta(description="a list of sizes, such as [1, 3, 224, 224]"),
    ]
    dtype: Annotated[str, Meta(description='the name of a numpy dtype, such as "float32"')] = "float32"
    fill: Annotated[bool | int | float | str | None, Meta(description="a number, or text for str")] = None


class DefaultsTable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[defaults]``: values for models without their own."""

    ttl: _Ttl = None
    pin: _Flag = None
    priority: _Whole = None
    providers: _Providers = None
    options: Annotated[dict[str, Any], Meta(description="a table of SessionOptions")] = {}


class ModelTable(DefaultsTable, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[models.NAME]``."""

    path: Annotated[_Name, Meta(description="the path of a model file, in quotes")]
    eager: _Flag = None
    provider_options: Annotated[
        list[dict[str, _Scalar]] | None, Meta(description="a list of tables, one for each of the providers")
    ] = None
    warmup: Annotated[
        dict[str, dict[str, Any]], Meta(description="a table of inputs, such as { x = {shape = [1, 4]} }")
    ] = {}
    max_memory: _Size = None
    max_memory_hard: _Size = None
    max_runs: Annotated[
        Annotated[int, Meta(ge=1, le=2**63 - 1)] | None, Meta(description="a number of calls, 1 or more")
    ] = None
    group: _Text = None
    environment: Annotated[
        dict[str, str], Meta(description='a table of text, such as { OMP_NUM_THREADS = "4" }')
    ] = {}
    sha256: Annotated[
        str | dict[str, str] | None,
        Meta(description="64 hexadecimal digits in quotes, or a table of them by the names of files"),
    ] = None
    sandbox: _Flag = None


_Address = Annotated[str | None, Meta(description='"host:port", such as "127.0.0.1:8000", or "off"')]
_Path = Annotated[str | None, Meta(description="a path, in quotes")]


class ServeTable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[serve]``: options of ``onnx-dl serve``; the supervisor itself has no use for them."""

    repository: Annotated[
        _Name | list[_Name] | None, Meta(description="the path of a folder, or a list of such paths")
    ] = None
    http: _Address = None
    grpc: _Address = None
    metrics: _Address = None
    host: _Text = None
    model_control: Annotated[
        Literal["none", "poll", "explicit"] | None, Meta(description='"none", "poll" or "explicit"')
    ] = None
    load_models: Annotated[
        list[str] | None, Meta(description='a list of names of models; ["*"]: all of them')
    ] = None
    poll_every: _Time = None
    strict_readiness: _Flag = None
    server_name: _Text = None
    client_shm: Annotated[
        Literal["off", "copy", "map"] | None, Meta(description='"off", "copy" or "map"')
    ] = None
    memory_limit: _Size = None
    """Limit of the server's own host; it overrides the file's."""
    max_body: _Size = None
    processes: Annotated[
        Annotated[int, Meta(ge=1, le=64)] | None, Meta(description="a number of processes from 1 to 64")
    ] = None
    max_queue_size: Annotated[
        Annotated[int, Meta(ge=0, le=10**6)] | None, Meta(description="a number of requests, 0 to 1000000")
    ] = None
    max_in_flight: _Size = None
    drain_timeout: _Time = None
    token_file: _Path = None
    insecure: _Flag = None
    tls_cert: _Path = None
    tls_key: _Path = None
    tls_ca: _Path = None


class HostTable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    memory_limit: _Size = None
    gpu_memory_limit: _GpuSize = None
    room_timeout: _Time = None
    load_timeout: _Time = None
    metrics: _Text = None
    defaults: Annotated[dict[str, Any], Meta(description="a table: [defaults]")] = {}
    models: Annotated[dict[str, dict[str, Any]], Meta(description="a table: [models.NAME]")] = {}
    serve: Annotated[dict[str, Any], Meta(description="a table: [serve]")] = {}


def culprit(raw: dict[str, Any], kind: type[Struct]) -> tuple[tuple[str, ...], str]:
    """The key in a table with an invalid value, and the problem; no key: the table itself."""
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    for name in raw:
        if name not in fields:
            near = keywords.nearest(name, fields)
            meant = "" if near is None else f" (did you mean {near}?)"
            return (name,), f"is not a known key{meant}; known here are: {', '.join(fields)}"
    for name, field in fields.items():
        if field.required and name not in raw:
            return (), f"has no {name}; give it {_allowed(field.type)}"
    name = next((name for name in raw if not _fits(raw[name], fields[name].type)), "")
    keys, value = _narrowed(name, raw[name], fields[name].type)
    return keys, f"= {shown(value)} must be {_allowed(fields[name].type)}"


def _narrowed(name: str, value: Any, kind: Any) -> tuple[tuple[str, ...], Any]:
    """The invalid entry, if the value is a table whose entries all have one type."""
    entries = value.items() if isinstance(value, dict) else ()
    wrong = ((key, entry) for key, entry in entries if not _fits({key: entry}, kind))
    key, entry = next(wrong, (None, None))
    return ((name,), value) if key is None else ((name, key), entry)


def _fits(value: Any, kind: Any) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


def _allowed(kind: Any) -> str:
    described = (meta.description for meta in kind.__metadata__ if getattr(meta, "description", None))
    return str(next(described))


def shown(value: Any) -> str:
    """A value for a message, shortened, and written much as in TOML."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:60]}..."
