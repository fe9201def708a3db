"""What onnxruntime is told and does not tell again.

Covers the methods of SessionOptions, RunOptions and LoraAdapter whose effect cannot be read back, and the
settings of the whole process.  They are recorded from the moment that ``onnx_dl`` is imported, whether
onnxruntime is imported before or after: its native classes allow a method to be replaced, and each
replacement calls the original first.  In our own processes nothing is recorded (:func:`remove`).
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
import weakref
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Final, NamedTuple

_C: Final = "onnxruntime.capi.onnxruntime_pybind11_state"
_COLLECTION: Final = "onnxruntime.capi.onnxruntime_inference_collection"

SESSION_METHODS: Final = (
    "add_external_initializers",
    "add_external_initializers_from_files_in_memory",
    "add_free_dimension_override_by_denotation",
    "add_free_dimension_override_by_name",
    "add_initializer",
    "add_provider",
    "add_provider_for_devices",
    "add_session_config_entry",
    "clear_ep_context_data_read_func",
    "register_custom_ops_library",
    "set_ep_context_data_read_func",
    "set_load_cancellation_flag",
    "set_provider_selection_policy",
    "set_provider_selection_policy_delegate",
)
RUN_METHODS: Final = ("add_active_adapter", "add_run_config_entry")
GLOBALS: Final = (
    "create_and_register_allocator",
    "create_and_register_allocator_v2",
    "register_execution_provider_library",
    "set_default_logger_severity",
    "set_default_logger_verbosity",
    "set_global_thread_pool_sizes",
    "set_seed",
    "unregister_execution_provider_library",
)


class Told(NamedTuple):
    """One call that was recorded."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


_told: weakref.WeakKeyDictionary[Any, list[Told]] = weakref.WeakKeyDictionary()
_adapters: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
_everywhere: list[Told] = []


def told(options: Any) -> list[Told] | None:
    """What this SessionOptions or RunOptions was told; None: it was made before anybody listened."""
    return _told.get(options)


def adapter_path(adapter: Any) -> str | None:
    """Where a LoraAdapter was loaded from; None: it is not known."""
    return _adapters.get(adapter)


def told_everywhere() -> list[Told]:
    """What was set for the whole process."""
    return list(_everywhere)


# --- listening ---------------------------------------------------------------------------------------------


def _listen(native: ModuleType) -> None:
    """To onnxruntime's native module, which was just imported or was there before."""
    for cls, methods in ((native.SessionOptions, SESSION_METHODS), (native.RunOptions, RUN_METHODS)):
        _listen_to_birth(cls)
        for name in methods:
            if hasattr(cls, name):
                setattr(cls, name, _recording(getattr(cls, name), name))
    if adapter := getattr(native, "LoraAdapter", None):
        adapter.Load = _recording_path(adapter.Load)
    for name in GLOBALS:
        if original := getattr(native, name, None):
            _replace_everywhere(name, original, _recording_everywhere(original, name))


def _listen_to_birth(cls: Any) -> None:
    original = cls.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _told[self] = []

    cls.__init__ = __init__


def _recording(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)  # what onnxruntime refuses was not told
        calls = _late.setdefault(self, []) if (early := _told.get(self)) is None else early
        if name.startswith("clear_"):
            calls[:] = [call for call in calls if call.name != name.replace("clear_", "set_", 1)]
        else:
            calls.append(Told(name, args, kwargs))
        return result

    return method


_late: weakref.WeakKeyDictionary[Any, list[Told]] = weakref.WeakKeyDictionary()
"""Of options that were made before anybody listened: what they were told since."""


def told_since(options: Any) -> list[Told]:
    """What these options were told since somebody listens."""
    return _told.get(options) or _late.get(options) or []


def _recording_path(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load(self: Any, path: Any) -> Any:
        result = original(self, path)
        _adapters[self] = str(path)
        return result

    return load


def _recording_everywhere(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        _everywhere.append(Told(name, args, kwargs))
        return result

    return function


def _replace_everywhere(name: str, original: object, replacement: object) -> None:
    """In every module that has the function under its own name."""
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is original:
            setattr(module, name, replacement)


def _bind_to_proxies(collection: ModuleType) -> None:
    """``onnxruntime.IOBinding(session)`` asks a proxy for its own kind of binding."""
    original = collection.IOBinding

    def __new__(cls: type, session: Any = None, *args: Any, **kwargs: Any) -> Any:
        proxy = getattr(session, "__dict__", {}).get("_onnx_dl_proxy", session)
        if cls is original and hasattr(type(proxy), "_invoke"):
            return proxy.io_binding()
        return object.__new__(cls)

    original.__new__ = __new__


_LISTENERS: Final = {_C: _listen, _COLLECTION: _bind_to_proxies}


class _Finder(importlib.abc.MetaPathFinder):
    """Has what others find listened to as soon as it is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _LISTENERS:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            if find is not None and (spec := find(fullname, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                found: importlib.machinery.ModuleSpec = spec
                return found
        return None


class _Loader(importlib.abc.Loader):
    """The loader that was found, and then a word with the module."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _LISTENERS[module.__name__](module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


_finder: Final = _Finder()


def install() -> None:
    """Listens from now on."""
    sys.meta_path.insert(0, _finder)
    for name, listen in _LISTENERS.items():
        if (module := sys.modules.get(name)) is not None:
            listen(module)


def remove() -> None:
    """For processes of our own, before they import onnxruntime."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
