"""Decides for one model whether it runs in a worker process or in this one, and warns of the difference."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Final

from onnx_dl.core.settings import settings
from onnx_dl.core.terms import WorkerOptions
from onnx_dl.errors import ConfigError, SandboxUnavailable
from onnx_dl.system import resources

logger = logging.getLogger("onnx_dl")

_MISSING: Final = (
    "A crash in native code ends this program. unload() may not give back all memory. "
    "max_memory, max_memory_hard, max_runs, group, environment and shared hosts have no effect."
)
_told: list[None] = []
_NO_OPTIONS: Final = WorkerOptions()


def applied(worker: WorkerOptions, isolation: object) -> WorkerOptions:
    """The options with the decision.  Says once per process why models run in-process, unless that was asked
    for by name.

    Args:
        isolation: True, False, or None: as ``ONNX_DL_ISOLATION`` and the platform say.

    Raises:
        ConfigError: it is none of these; or False together with options that need a worker process.
    """
    if isolation not in (None, True, False):
        raise ConfigError(f"isolation={isolation!r} is none of True, False and None.")
    if isolation is None:
        if resources.is_platform() and settings().isolation == "on":
            return worker
        if worker.sandbox:
            raise SandboxUnavailable(
                f"sandbox=True needs a worker process. {_reason()} The model was not loaded."
            )
        _tell_once()
    elif isolation:
        return worker
    elif worker._replace(sha256=_NO_OPTIONS.sha256) != _NO_OPTIONS:
        given = ", ".join(name for name, value in worker.fields().items() if value and name != "sha256")
        raise ConfigError(
            f"isolation=False has the model run in this process, where {given} can have no effect. Leave one "
            "of them out."
        )
    return WorkerOptions(isolation=False, sha256=worker.sha256)


def _reason() -> str:
    if resources.is_platform():
        return "ONNX_DL_ISOLATION=off: models run in this process."
    return f"onnx-dl isolates models on Linux only; on {sys.platform} they run in this process."


def _tell_once() -> None:
    if _told:
        return
    _told.append(None)
    if resources.is_platform():
        logger.warning("%s %s", _reason(), _MISSING)
        return
    warnings.warn(f"{_reason()} {_MISSING}", RuntimeWarning, stacklevel=4)
