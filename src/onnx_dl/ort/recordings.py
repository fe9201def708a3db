"""Turns calls of :mod:`onnx_dl.ort.recorder` into plain data and arrays, and replays them in a worker.

Covers the arguments of recorded methods: text and numbers, OrtValues (whose memory stays live), bytes,
devices of execution providers, enumerations, LoRA adapters.  An argument of any other kind is a ConfigError.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from onnx_dl.core.environment import NOTHING, Environment
from onnx_dl.core.spec import file_identity
from onnx_dl.core.status import to_plain
from onnx_dl.errors import ConfigError
from onnx_dl.ort import ortvalues, recorder
from onnx_dl.ort.ortvalues import Bytes

if TYPE_CHECKING:
    import onnxruntime

_READ_AT_LOAD: Final = ("ORT_LOAD_CONFIG_FROM_MODEL",)
"""Environment variables that onnxruntime reads when a session is made; others are the supervisor's."""
_CONFIG: Final = ("add_session_config_entry", "add_run_config_entry")
_PATHS: Final = ("register_custom_ops_library",)
_LATE: Final = (
    "This {kind} was made before onnx_dl was imported. Calls of {methods} before the import are unknown to "
    "the worker, because onnxruntime cannot report them. Import onnx_dl first, or make the object again."
)

_Settings = dict[str, Any]
_FindArray = Callable[[list[int]], Bytes]
"""Returns an array by index and size."""


class PortableCalls(NamedTuple):
    """Recorded calls as plain data.  They name ``arrays`` by index; ``owners`` keep these alive."""

    calls: list[list[object]]
    config: dict[str, str]
    arrays: list[Bytes]
    owners: list[object]


_warned: weakref.WeakSet[object] = weakref.WeakSet()


def portable(options: object, methods: Sequence[str]) -> PortableCalls:
    """Returns the recorded calls of a SessionOptions or RunOptions.

    Raises:
        ConfigError: an argument cannot be sent to a worker; the message names it.
    """
    if not recorder.has_all_calls(options) and options not in _warned:
        _warned.add(options)
        names = ", ".join(name for name in methods if not name.startswith(("clear_", *_CONFIG)))
        warnings.warn(_LATE.format(kind=type(options).__name__, methods=names), stacklevel=5)
    found = PortableCalls([], {}, [], [])
    for call in recorder.calls_of(options):
        if call.name in _CONFIG:
            key, value = (str.__str__(arg) for arg in (*call.args, *call.kwargs.values())[:2])
            found.config[key] = value
            continue
        args = [_encode(arg, call.name, found) for arg in call.args]
        kwargs = {name: _encode(arg, call.name, found) for name, arg in call.kwargs.items()}
        found.calls.append([call.name, args, kwargs])
    return found


def _encode(arg: object, method: str, found: PortableCalls) -> object:
    if arg is None or isinstance(arg, str | os.PathLike | bool | int | float):
        plain = os.fspath(arg) if isinstance(arg, os.PathLike) else arg
        is_file = method in _PATHS and isinstance(plain, str) and os.path.exists(plain)
        return os.path.abspath(str(plain)) if is_file else plain
    if isinstance(arg, list | tuple):
        return [_encode(item, method, found) for item in arg]
    if isinstance(arg, dict):
        return {"$dict": [[_encode(part, method, found) for part in item] for item in arg.items()]}
    if isinstance(arg, bytes):
        return {"$bytes": _keep(np.frombuffer(arg, np.uint8), arg, found)}
    if (parts := ortvalues.take_apart(arg)) is not None:
        return _encode_value(parts, method, found)
    return _encode_object(arg, method)


def _keep(array: Bytes, owner: object, found: PortableCalls) -> list[int]:
    found.arrays.append(array)
    found.owners.append(owner)
    return [len(found.arrays) - 1, array.nbytes]


def _encode_value(parts: ortvalues.Parts, method: str, found: PortableCalls) -> dict[str, object]:
    inner = parts.items[0] if parts.kind == "OrtValue" else parts
    if inner.kind == "dense":
        element_type, shape, raw, *_ = inner.items
        return {"$dense": [element_type, shape, _keep(raw, parts, found)]}
    if inner.kind == "text":
        (array,) = inner.items
        return {"$text": [list(array.shape), [str(item) for item in array.flat]]}
    raise ConfigError(
        f"SessionOptions.{method}() was given an OrtValue of the kind {inner.kind}; use a tensor."
    )


def _encode_object(arg: object, method: str) -> object:
    with contextlib.suppress(TypeError):
        return to_plain(arg)
    kind = type(arg).__name__
    if kind == "LoraAdapter":
        path = recorder.adapter_files.get(arg)
        if path is None:
            raise ConfigError(
                "This LoraAdapter was loaded before onnx_dl was imported, so its file is not known. "
                "Import onnx_dl first, or load it again."
            )
        return {"$adapter": os.path.abspath(path)}
    if kind == "OrtEpDevice":
        return {"$device": device_identity(arg)}
    if hasattr(type(arg), "__members__"):
        return {"$enum": [kind, getattr(arg, "name", None)]}
    raise ConfigError(
        f"{method}() was given {arg!r}, which cannot be sent to the model's worker: a function or an object "
        "of this process. Leave that call out, or use onnxruntime.InferenceSession for this model."
    )


def device_identity(device: onnxruntime.OrtEpDevice) -> list[object]:
    """Returns properties that distinguish a device from others, in this process and in a worker."""
    hardware = device.device
    return [device.ep_name, hardware.type.name, hardware.vendor_id, hardware.device_id, hardware.vendor]


def process_settings() -> _Settings:
    """Returns what was set for the whole process, as plain data."""
    found: _Settings = {}
    libraries: dict[str, str] = {}
    for call in list(recorder.global_calls):
        args: list[Any] = [*call.args, *call.kwargs.values()]
        match call.name:
            case "set_seed" | "set_default_logger_severity" | "set_default_logger_verbosity":
                found[call.name] = int(args[0])
            case "set_global_thread_pool_sizes":
                found[call.name] = [int(arg) for arg in args[:2]]
            case "register_execution_provider_library":
                libraries[str(args[0])] = os.path.abspath(os.fspath(args[1]))
            case "unregister_execution_provider_library":
                libraries.pop(str(args[0]), None)
            case _:
                found["allocators"] = True
    environment = {name: os.environ[name] for name in _READ_AT_LOAD if name in os.environ}
    more = {"libraries": libraries, "environment": environment}
    return found | {name: value for name, value in more.items() if value}


def check_process_settings(settings: _Settings, options: dict[str, Any] | None) -> None:
    """Checks that a worker can have the settings that the options of a model rely on.

    Raises:
        ConfigError: the model uses an allocator that was registered in this process.
    """
    wanted = (options or {}).get("config", {}).get("session.use_env_allocators") == "1"
    if wanted and settings.get("allocators"):
        raise ConfigError(
            "session.use_env_allocators uses allocators that create_and_register_allocator() registered in "
            "this process. The model's worker does not have them. Remove the entry: a worker has one model, "
            "which has nothing to share an allocator with."
        )


# --- in a worker -------------------------------------------------------------------------------------------


def replay(options: object, calls: list[Any], find: _FindArray | None = None) -> list[object]:
    """Makes calls on ``options`` that were recorded in another process; ``find``: None without arrays.

    Returns objects that must live as long as what is made with the options.
    """
    kept: list[object] = []
    for name, args, kwargs in calls:
        made = [_decode(arg, find) for arg in args]
        named = {key: _decode(arg, find) for key, arg in kwargs.items()}
        kept += [made, named]
        getattr(options, name)(*made, **named)
    return kept


def _decode(arg: object, find: _FindArray | None) -> object:
    if isinstance(arg, list):
        return [_decode(item, find) for item in arg]
    match arg:
        case {"$dict": list(items)}:
            return {_decode(key, find): _decode(value, find) for key, value in items}
        case {"$bytes": list(place)} if find is not None:
            return find(place).tobytes()
        case {"$dense": [int(element_type), list(shape), list(place)]} if find is not None:
            return _make_value("dense", [element_type, shape, find(place)])
        case {"$text": [list(shape), list(items)]}:
            return _make_value("text", [np.array(items, object).reshape(shape)])
        case dict():
            return _make_object(arg)
    return arg


def _make_value(kind: str, items: list[object]) -> onnxruntime.OrtValue:
    native = ortvalues.put_together(kind, items, copy=False)
    return ortvalues.put_together("OrtValue", [native], copy=False)


def _make_object(arg: dict[str, object]) -> object:
    import onnxruntime

    match arg:
        case {"$adapter": str(path)}:
            return _adapter(file_identity(path))
        case {"$device": list(identity)}:
            devices = [d for d in onnxruntime.get_ep_devices() if device_identity(d) == identity]
            if not devices:
                raise ConfigError(f"The model's worker has no device {identity} of that execution provider.")
            return devices[0]
        case {"$enum": [str(kind), str(member)]}:
            return getattr(getattr(onnxruntime, kind), member)
    raise ConfigError(f"A worker received {sorted(arg)}, which it does not know.")


@functools.lru_cache(maxsize=16)
def _adapter(identity: tuple[str, int, int, int, int]) -> onnxruntime.LoraAdapter:
    """Loads an adapter.  Cached, because a RunOptions does not keep it, and because loading it takes time."""
    import onnxruntime

    adapter = onnxruntime.LoraAdapter()
    adapter.Load(identity[0])
    return adapter


def apply_process_settings(settings: _Settings, environment: Environment = NOTHING) -> None:
    """Applies the application's settings to this process; ``environment``: the model's own variables."""
    import onnxruntime

    for name in set(_READ_AT_LOAD) - environment.variables.keys():
        os.environ.pop(name, None)
    os.environ.update(environment.over(settings.get("environment", {})))
    for name in ("set_seed", "set_default_logger_severity", "set_default_logger_verbosity"):
        if name in settings:
            getattr(onnxruntime, name)(settings[name])
    for name, path in settings.get("libraries", {}).items():
        onnxruntime.register_execution_provider_library(name, path)
