"""Records calls of onnxruntime whose effect cannot be read back.

Covers methods of SessionOptions, RunOptions and LoraAdapter, and settings of the whole process.  They are
recorded from the import of ``onnx_dl`` on, whether onnxruntime is imported before or after that: its native
classes allow a method to be replaced, and each replacement calls the original first.  onnx-dl's own
processes record nothing (:func:`remove`).
"""

from __future__ import annotations

import functools
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


_Function = Callable[..., object]


class RecordedCall(NamedTuple):
    """One call with its arguments."""

    name: str
    args: tuple[object, ...]
    kwargs: dict[str, object]


_calls: weakref.WeakKeyDictionary[object, list[RecordedCall]] = weakref.WeakKeyDictionary()
"""Calls on options that were made while calls are recorded."""
_late_calls: weakref.WeakKeyDictionary[object, list[RecordedCall]] = weakref.WeakKeyDictionary()
"""Calls since then on options that were made before."""
adapter_files: Final[weakref.WeakKeyDictionary[object, str]] = weakref.WeakKeyDictionary()
"""Files by the LoraAdapter that was loaded from them."""
global_calls: Final[list[RecordedCall]] = []
"""Calls that affect the whole process."""


def has_all_calls(options: object) -> bool:
    """Tells whether this SessionOptions or RunOptions was made while calls are recorded."""
    return options in _calls


def calls_of(options: object) -> list[RecordedCall]:
    """Returns the calls recorded for this SessionOptions or RunOptions."""
    return _calls.get(options) or _late_calls.get(options) or []


def _patch_native(native: ModuleType) -> None:
    """Replaces methods of onnxruntime's native module."""
    for cls, methods in ((native.SessionOptions, SESSION_METHODS), (native.RunOptions, RUN_METHODS)):
        cls.__init__ = _recording(cls.__init__, "__init__", _record_birth)
        for name in methods:
            if hasattr(cls, name):
                setattr(cls, name, _recording(getattr(cls, name), name, _record_method))
    if adapter := getattr(native, "LoraAdapter", None):
        adapter.Load = _recording(adapter.Load, "Load", _record_path)
    for name in GLOBALS:
        if original := getattr(native, name, None):
            _replace_everywhere(name, original, _recording(original, name, global_calls.append))


def _recording(original: _Function, name: str, record: Callable[[RecordedCall], object]) -> _Function:
    @functools.wraps(original)
    def function(*args: object, **kwargs: object) -> object:
        result = original(*args, **kwargs)  # first: a call that onnxruntime refuses is not recorded
        record(RecordedCall(name, args, kwargs))
        return result

    return function


def _record_birth(call: RecordedCall) -> None:
    _calls[call.args[0]] = []


def _record_method(call: RecordedCall) -> None:
    name, (options, *args), kwargs = call
    calls = _late_calls.setdefault(options, []) if (early := _calls.get(options)) is None else early
    if name.startswith("clear_"):
        calls[:] = [call for call in calls if call.name != name.replace("clear_", "set_", 1)]
    else:
        calls.append(RecordedCall(name, tuple(args), kwargs))


def _record_path(call: RecordedCall) -> None:
    adapter, path = (*call.args, *call.kwargs.values())
    adapter_files[adapter] = str(path)


def _replace_everywhere(name: str, original: object, replacement: object) -> None:
    """Replaces a function in every module that has it under its own name."""
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is original:
            setattr(module, name, replacement)


def _patch_binding(collection: ModuleType) -> None:
    """Has ``onnxruntime.IOBinding(proxy)`` make a binding of the proxy's own class."""
    original = collection.IOBinding

    def __new__(cls: type, session: Any = None, *args: object, **kwargs: object) -> object:
        proxy = getattr(session, "__dict__", {}).get("_onnx_dl_proxy", session)
        if cls is original and hasattr(type(proxy), "_invoke"):
            return proxy.io_binding()
        return object.__new__(cls)

    original.__new__ = __new__


_PATCHES: Final = {_C: _patch_native, _COLLECTION: _patch_binding}


class _ImportHook:
    """Has onnxruntime's modules patched as soon as they are imported.

    Not an ``importlib.abc.MetaPathFinder``: that module takes every program 10 ms.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _PATCHES:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            if find is not None and (spec := find(fullname, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                found: importlib.machinery.ModuleSpec = spec
                return found
        return None


class _Loader:
    """Loads a module with the loader that was found, and patches it."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _PATCHES[module.__name__](module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


_finder: Final = _ImportHook()


def install() -> None:
    """Starts recording."""
    sys.meta_path.insert(0, _finder)
    for name, patch in _PATCHES.items():
        if (module := sys.modules.get(name)) is not None:
            patch(module)


def remove() -> None:
    """Stops recording, in processes of onnx-dl, before they import onnxruntime."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
