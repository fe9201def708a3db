"""What the recorder heard, as plain data with its arrays apart, and said again in a worker.

Covers the arguments of recorded methods: text and numbers, OrtValues (whose memory stays live), bytes,
devices of execution providers, enumerations, LoRA adapters.  What cannot travel is refused by name.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnx_dl.core.environment import NOTHING, Environment
from onnx_dl.core.spec import file_identity
from onnx_dl.core.status import to_plain
from onnx_dl.errors import ConfigError
from onnx_dl.ort import ortvalues, recorder

_READ_AT_LOAD: Final = ("ORT_LOAD_CONFIG_FROM_MODEL",)
"""Environment variables that onnxruntime reads when a session is made; others are the supervisor's."""
_CONFIG: Final = ("add_session_config_entry", "add_run_config_entry")
_PATHS: Final = ("register_custom_ops_library",)
_LATE: Final = (
    "This {kind} was made before onnx_dl was imported. If it was told before that: {methods}, "
    "its model's worker does not know: onnxruntime does not tell. Import onnx_dl first, or make it anew."
)


class Portable(NamedTuple):
    """Recorded calls as plain data; ``arrays`` is what lies in memory, by the indices that the calls name."""

    calls: list[list[Any]]
    config: dict[str, str]
    arrays: list[NDArray[np.uint8]]
    owners: list[Any]


_seen: weakref.WeakSet[Any] = weakref.WeakSet()


def portable(options: Any, methods: Sequence[str]) -> Portable:
    """What a SessionOptions or RunOptions was told.

    Raises:
        ConfigError: something of that cannot reach a worker; the message names it.
    """
    if recorder.told(options) is None and options not in _seen:
        _seen.add(options)
        names = ", ".join(name for name in methods if not name.startswith(("clear_", *_CONFIG)))
        warnings.warn(_LATE.format(kind=type(options).__name__, methods=names), stacklevel=5)
    found = Portable([], {}, [], [])
    for call in recorder.told_since(options):
        if call.name in _CONFIG:
            key, value = map(str.__str__, (*call.args, *call.kwargs.values())[:2])
            found.config[key] = value
            continue
        args = [_plain(arg, call.name, found) for arg in call.args]
        kwargs = {name: _plain(arg, call.name, found) for name, arg in call.kwargs.items()}
        found.calls.append([call.name, args, kwargs])
    return found


def _plain(arg: Any, method: str, found: Portable) -> Any:
    if arg is None or isinstance(arg, str | os.PathLike | bool | int | float):
        plain = os.fspath(arg) if isinstance(arg, os.PathLike) else arg
        is_file = method in _PATHS and isinstance(plain, str) and os.path.exists(plain)
        return os.path.abspath(str(plain)) if is_file else plain
    if isinstance(arg, list | tuple):
        return [_plain(item, method, found) for item in arg]
    if isinstance(arg, dict):
        return {"$dict": [[_plain(part, method, found) for part in item] for item in arg.items()]}
    if isinstance(arg, bytes):
        return {"$bytes": _kept(np.frombuffer(arg, np.uint8), arg, found)}
    if (parts := ortvalues.take_apart(arg)) is not None:
        return _plain_value(parts, method, found)
    return _plain_object(arg, method)


def _kept(array: NDArray[np.uint8], owner: Any, found: Portable) -> list[int]:
    found.arrays.append(array)
    found.owners.append(owner)
    return [len(found.arrays) - 1, array.nbytes]


def _plain_value(parts: ortvalues.Parts, method: str, found: Portable) -> Any:
    inner = parts.items[0] if parts.kind == "OrtValue" else parts
    if inner.kind == "dense":
        element_type, shape, raw, *_ = inner.items
        return {"$dense": [element_type, shape, _kept(raw, parts, found)]}
    if inner.kind == "text":
        (array,) = inner.items
        return {"$text": [list(array.shape), [str(item) for item in array.flat]]}
    raise ConfigError(
        f"SessionOptions.{method}() was given an OrtValue of the kind {inner.kind}; use a tensor."
    )


def _plain_object(arg: Any, method: str) -> Any:
    with contextlib.suppress(TypeError):
        return to_plain(arg)
    kind = type(arg).__name__
    if kind == "LoraAdapter":
        path = recorder.adapter_path(arg)
        if path is None:
            raise ConfigError(
                "This LoraAdapter was loaded before onnx_dl was imported, so nobody knows from which file. "
                "Import onnx_dl first, or load it again."
            )
        return {"$adapter": os.path.abspath(path)}
    if kind == "OrtEpDevice":
        return {"$device": device_identity(arg)}
    if hasattr(type(arg), "__members__"):
        return {"$enum": [kind, arg.name]}
    raise ConfigError(
        f"{method}() was given {arg!r}, which cannot reach the model's worker: a function or an object of "
        "this process. Leave that call out, or use onnxruntime.InferenceSession for this model."
    )


def device_identity(device: Any) -> list[Any]:
    """What tells one OrtEpDevice from another, in this process and in a worker."""
    hardware = device.device
    return [device.ep_name, hardware.type.name, hardware.vendor_id, hardware.device_id, hardware.vendor]


def surroundings() -> dict[str, Any]:
    """What was set for the whole process, as plain data."""
    found: dict[str, Any] = {}
    libraries: dict[str, str] = {}
    for call in recorder.told_everywhere():
        args = [*call.args, *call.kwargs.values()]
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


def check_surroundings(found: dict[str, Any], plain: dict[str, Any] | None) -> None:
    """Refuses what a worker cannot have.

    Raises:
        ConfigError: the model is to use an allocator that was registered in this process.
    """
    wanted = (plain or {}).get("config", {}).get("session.use_env_allocators") == "1"
    if wanted and found.get("allocators"):
        raise ConfigError(
            "session.use_env_allocators asks for what create_and_register_allocator() registered in this "
            "process, which its model's worker does not have. A worker holds one model: leave the entry out."
        )


# --- said again, in a worker -------------------------------------------------------------------------------


def say_again(options: Any, calls: list[list[Any]], memory: Callable[[list[int]], Any]) -> list[Any]:
    """Tells ``options`` what another process recorded; ``memory`` finds arrays.

    Returns what must live as long as what is made with the options.
    """
    kept: list[Any] = []
    for name, args, kwargs in calls:
        made = [_made(arg, memory) for arg in args]
        named = {key: _made(arg, memory) for key, arg in kwargs.items()}
        kept += [made, named]
        getattr(options, name)(*made, **named)
    return kept


def _made(arg: Any, memory: Callable[[list[int]], Any]) -> Any:
    if isinstance(arg, list):
        return [_made(item, memory) for item in arg]
    match arg:
        case {"$dict": list(items)}:
            return {_made(key, memory): _made(value, memory) for key, value in items}
        case {"$bytes": list(place)}:
            return memory(place).tobytes()
        case {"$dense": [int(element_type), list(shape), list(place)]}:
            native = ortvalues.put_together("dense", [element_type, shape, memory(place)], copy=False)
            return ortvalues.put_together("OrtValue", [native], copy=False)
        case {"$text": [list(shape), list(items)]}:
            array = np.array(items, object).reshape(shape)
            native = ortvalues.put_together("text", [array], copy=False)
            return ortvalues.put_together("OrtValue", [native], copy=False)
        case dict():
            return _made_object(arg)
    return arg


def _made_object(arg: dict[str, Any]) -> Any:
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
    raise ConfigError(f"A worker was told {sorted(arg)}, which it does not know.")


@functools.lru_cache(maxsize=16)
def _adapter(identity: tuple[str, int, int, int, int]) -> Any:
    """Kept, because a RunOptions does not keep it, and because loading it takes time."""
    import onnxruntime

    adapter = onnxruntime.LoraAdapter()
    adapter.Load(identity[0])
    return adapter


def set_surroundings(found: dict[str, Any], own: Environment = NOTHING) -> None:
    """Has this process as the application was; ``own``: variables that the model has of its own."""
    import onnxruntime

    for name in set(_READ_AT_LOAD) - own.variables.keys():
        os.environ.pop(name, None)
    os.environ.update(own.over(found.get("environment", {})))
    for name in ("set_seed", "set_default_logger_severity", "set_default_logger_verbosity"):
        if name in found:
            getattr(onnxruntime, name)(found[name])
    for name, path in found.get("libraries", {}).items():
        onnxruntime.register_execution_provider_library(name, path)
