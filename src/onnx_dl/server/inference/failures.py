"""Errors of the core and of onnxruntime as failures of a request."""

from __future__ import annotations

import logging
import re
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
_OF_DATA: Final = frozenset(("InvalidArgument", "NotImplemented"))
"""Classes of onnxruntime that say that it does not take these inputs."""
_OF_NODES: Final = frozenset(("Fail", "RuntimeException"))
"""Classes that may also say so, if a node failed."""
_NODE_FAILED: Final = "Non-zero status code returned while running"
_MISSING: Final = re.compile(r"Required inputs \(|Model requires \d+ inputs")
"""Begins of the errors of class ValueError that onnxruntime raises for inputs."""
_OUT_OF_MEMORY: Final = (
    "std::bad_alloc",
    "failed to allocate memory",
    "out of memory",
    "is smaller than requested bytes",
)
_OF_GPU: Final = re.compile(
    r"\bCU(DA|DNN|BLAS|FFT|RAND|SPARSE)(_FE)? (failure|error)|\bCUDA_ERROR|\bcudaError|\bCU[A-Z]+_STATUS_"
)
"""Words for a GPU, its driver or libraries that failed.  Names of nodes and files may have "cuda", too."""


def failure_of(error: Exception, model: str, *, is_loading: bool = False) -> RequestFailure:
    """Return the failure for an error of a run, or of a load.

    ``is_loading``: it was raised before the run could begin.
    """
    if isinstance(error, RequestFailure):
        return error
    name, text = _engine_class(error), _text_of(error)
    if is_loading or isinstance(error, _NOT_LOADED) or (name in _OF_LOADS and _NODE_FAILED not in text):
        return _load_failure(error, model)
    if isinstance(error, ForeignMemoryError):
        return regions.failure_of(error)
    if isinstance(error, _NO_ROOM) and not isinstance(error, SupervisorDied):
        return unavailable(f"model '{model}' cannot run now: {error}", _retry_after(error))
    if isinstance(error, (WorkerDied, SupervisorDied)):  # in a run that had begun
        return internal(f"model '{model}' failed: {error}")
    if name is not None:
        return _engine_failure(name, text, model)
    if isinstance(error, ValueError) and _MISSING.match(text):
        return _refused(text, model)
    if isinstance(error, OnnxDLError):
        return internal(f"model '{model}' failed: {error}")
    return own_failure(error, model)


def _engine_failure(name: str, text: str, model: str) -> RequestFailure:
    """Return the failure for an error of onnxruntime in a run.  ``name``: of its class."""
    if any(part in text.lower() for part in _OUT_OF_MEMORY):
        return unavailable(f"model '{model}' has no memory for this request: {text}")
    is_of_data = name in _OF_DATA or (name in _OF_NODES and _NODE_FAILED in text)
    if is_of_data and not _OF_GPU.search(text):
        return _refused(text, model)
    _log.error("A run of model %s failed: %s: %s", model, name, text)
    return internal(f"model '{model}' failed: {text}")


def _refused(text: str, model: str) -> RequestFailure:
    return invalid(f"model '{model}' refused the request: {text}")


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
    """Return the name of onnxruntime's class; None: it is not onnxruntime's."""
    if isinstance(error, RemoteError):
        module, _, name = error.type_name.rpartition(".")
        return name if module == _ENGINE else None
    return type(error).__name__ if type(error).__module__ == _ENGINE else None


def _text_of(error: Exception) -> str:
    if isinstance(error, RemoteError):
        return str(error).removeprefix(f"{error.type_name}: ")
    return str(error)


def _retry_after(error: Exception) -> float:
    """Return the seconds until another try makes sense; at least one, which is what headers can say."""
    return max(1.0, error.retry_after) if isinstance(error, WorkerError) else 1.0
