"""ONNX Dynamic Loading: onnxruntime sessions that live in worker processes and give all their memory back.

``from onnx_dl import InferenceSessionProxy`` in place of ``onnxruntime.InferenceSession``.  Importing this
package imports neither onnxruntime nor anything else of weight: names are fetched when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from onnx_dl.client import host_registry
from onnx_dl.core.version import __version__
from onnx_dl.errors import (
    CapacityError,
    ConfigError,
    DescriptorsExhausted,
    EngineError,
    FilesChanging,
    ForeignMemoryError,
    HostClosing,
    InstallationError,
    InvalidTransition,
    LoadTimeout,
    MemoryLimitExceeded,
    ModelDigestMismatch,
    OnnxDLError,
    PlaceTooSmall,
    PlatformError,
    ProcessesExhausted,
    ProtocolError,
    ProxyClosedError,
    ReentrantUse,
    RemoteError,
    RunTimeout,
    SandboxUnavailable,
    SharedMemoryError,
    SupervisorDied,
    SupervisorError,
    SupervisorStartError,
    SupervisorTimeout,
    SupervisorUnreachable,
    UnloadTimeout,
    UnsupportedValueError,
    WorkerDied,
    WorkerError,
)
from onnx_dl.ort import recorder

if TYPE_CHECKING:
    from onnx_dl.client.event_dispatch import EventStream
    from onnx_dl.core.events import EventType, ModelEvent
    from onnx_dl.core.lifecycle import ModelState
    from onnx_dl.core.status import ModelStatus, Snapshot, Usage
    from onnx_dl.host.connect import connect, default_host, warm_up
    from onnx_dl.host.model_host import ModelHost
    from onnx_dl.integrations.onnxruntime_patch import Patch, Unpatched, patch, unpatch, unpatched_report
    from onnx_dl.session.execution_session import ExecutionSession
    from onnx_dl.session.inference_session import InferenceSession, InferenceSessionProxy
    from onnx_dl.session.pipeline import Pipeline, pipeline
    from onnx_dl.system.boot import freeze_support

_HOMES = {
    "client.event_dispatch": ("EventStream",),
    "core.events": ("EventType", "ModelEvent"),
    "core.lifecycle": ("ModelState",),
    "core.status": ("ModelStatus", "Snapshot", "Usage"),
    "host.connect": ("connect", "default_host", "warm_up"),
    "host.model_host": ("ModelHost",),
    "integrations.onnxruntime_patch": ("Patch", "Unpatched", "patch", "unpatch", "unpatched_report"),
    "session.execution_session": ("ExecutionSession",),
    "session.inference_session": ("InferenceSession", "InferenceSessionProxy"),
    "session.pipeline": ("Pipeline", "pipeline"),
    "system.boot": ("freeze_support",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

_ERRORS = [
    name for name, value in globals().items() if isinstance(value, type) and issubclass(value, Exception)
]

__all__ = sorted([*_HOME_OF, *_ERRORS])

# Records options from now on, because onnxruntime's objects do not give them back.
recorder.install()


def _make_host(name: str | None) -> ModelHost:
    return importlib.import_module(f"{__name__}.host.model_host").ModelHost.of_name(name)  # type: ignore[no-any-return]


host_registry.set_factory(_make_host)


def __getattr__(name: str) -> Any:
    if (home := _HOME_OF.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
