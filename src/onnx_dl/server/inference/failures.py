"""Errors of the core and of onnxruntime as failures of a request."""

from __future__ import annotations

import logging
from typing import Final

from onnx_dl.errors import (
    CapacityError,
    ConfigError,
    DescriptorsExhausted,
    FilesChanging,
    ForeignMemoryError,
    InstallationError,
    LoadTimeout,
    MemoryLimitExceeded,
    ModelDigestMismatch,
    OnnxDLError,
    PlatformError,
    ProcessesExhausted,
    ProxyClosedError,
    RemoteError,
    SharedMemoryError,
    SupervisorDied,
    SupervisorError,
    WorkerDied,
    WorkerError,
)
from onnx_dl.server.shm import regions
from onnx_dl.server.v2.failures import RequestFailure, internal, invalid, unavailable

_log: Final = logging.getLogger("onnx_dl.server")

_ENGINE: Final = "onnxruntime.capi.onnxruntime_pybind11_state"
_OF_LOADS: Final = frozenset(
    "NoSuchFile NoModel InvalidProtobuf InvalidGraph ModelLoaded ModelLoadCanceled ModelRequiresCompilation "
    "EngineError EPFail".split()
)
"""Classes of onnxruntime that say that a model could not be loaded."""
_NOT_LOADED: Final = (
    ConfigError,
    InstallationError,
    PlatformError,
    FilesChanging,
    ModelDigestMismatch,
    FileNotFoundError,
    PermissionError,
)
_NO_ROOM: Final = (
    CapacityError,
    SharedMemoryError,
    DescriptorsExhausted,
    ProcessesExhausted,
    LoadTimeout,
    MemoryLimitExceeded,
    SupervisorError,
    ProxyClosedError,
    MemoryError,
)
_OUT_OF_MEMORY: Final = ("std::bad_alloc", "failed to allocate memory", "out of memory")


def failure_of(error: Exception, model: str, *, is_loading: bool = False) -> RequestFailure:
    """Return the failure for an error of a run, or of a load.

    ``is_loading``: it was raised before the run could begin.
    """
    if isinstance(error, RequestFailure):
        return error
    if is_loading or isinstance(error, _NOT_LOADED) or _engine_class(error) in _OF_LOADS:
        return _load_failure(error, model)
    if isinstance(error, ForeignMemoryError):
        return regions.failure_of(error)
    if isinstance(error, _NO_ROOM) and not isinstance(error, SupervisorDied):
        return unavailable(f"model '{model}' cannot run now: {error}", _retry_after(error))
    if isinstance(error, (WorkerDied, SupervisorDied)):  # in a run that had begun
        return internal(f"model '{model}' failed: {error}")
    if _engine_class(error) is not None:
        text = _text_of(error)
        if any(part in text.lower() for part in _OUT_OF_MEMORY):
            return unavailable(f"model '{model}' has no memory for this request: {text}")
        return invalid(f"model '{model}' refused the request: {text}")
    if isinstance(error, OnnxDLError):
        return internal(f"model '{model}' failed: {error}")
    return own_failure(error, model)


def own_failure(error: Exception, model: str) -> RequestFailure:
    """Return the failure for an error that is neither the engine's nor the core's."""
    if isinstance(error, RequestFailure):
        return error
    if isinstance(error, MemoryError):
        return unavailable(f"there is no memory for a request of model '{model}'")
    _log.error("A request for model %s failed", model, exc_info=error)
    return internal(f"model '{model}' failed: {type(error).__name__}")


def _load_failure(error: Exception, model: str) -> RequestFailure:
    return unavailable(f"failed to load '{model}': {_text_of(error)}", _retry_after(error))


def _engine_class(error: Exception) -> str | None:
    """Return the name of onnxruntime's class, or of the builtin one that it raises; None: it is not
    onnxruntime's."""
    if isinstance(error, RemoteError):
        module, _, name = error.type_name.rpartition(".")
        return name if module == _ENGINE else None
    if type(error).__module__ == _ENGINE or type(error) in (RuntimeError, ValueError, TypeError):
        return type(error).__name__
    return None


def _text_of(error: Exception) -> str:
    if isinstance(error, RemoteError):
        return str(error).removeprefix(f"{error.type_name}: ")
    return str(error)


def _retry_after(error: Exception) -> float:
    """Return the seconds until another try makes sense; at least one, which is what headers can say."""
    return max(1.0, error.retry_after) if isinstance(error, WorkerError) else 1.0
