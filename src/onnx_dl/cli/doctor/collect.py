"""Collects the facts for :mod:`onnx_dl.cli.doctor.checks`, from the system and from trials."""

from __future__ import annotations

import concurrent.futures
import difflib
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from onnx_dl.cli.doctor import checks, trials
from onnx_dl.cli.doctor.trials import TrialResult
from onnx_dl.core import settings
from onnx_dl.errors import ConfigError, PlatformError
from onnx_dl.supervisor.measure.memory_probe import Gpu, gpus
from onnx_dl.system import builds, installation, resources
from onnx_dl.transport import running_hosts
from onnx_dl.transport.running_hosts import RunningHost
from onnx_dl.workers.load_cache import store
from onnx_dl.workers.sandbox import landlock, seccomp

_BUDGET: Final = 9.0
"""Seconds for all trials together."""
_IMPORT: Final = 5.0
"""Seconds of these for the import of onnxruntime, before providers are tried."""


def examine() -> list[checks.Finding]:
    """All findings, the most important first.  Takes at most ten seconds and leaves no process behind."""
    end = time.monotonic() + _BUDGET
    chosen, complaint = _settings(os.environ)
    with concurrent.futures.ThreadPoolExecutor(16, "onnx-dl-doctor") as threads:

        def attempt(*trial: str, timeout: float) -> concurrent.futures.Future[TrialResult]:
            return threads.submit(trials.run, *trial, timeout=timeout, python=chosen.python)

        starting = attempt("start", timeout=_BUDGET)
        imported = attempt("installed", timeout=_IMPORT).result()
        report = imported.report or {}
        left = max(0.1, end - time.monotonic())
        tried = {name: attempt("provider", name, timeout=left) for name in report.get("providers", ())}
        found_gpus, no_gpus = _gpus()
        running, no_folder = _hosts(os.environ)
        installed, pip = installation.distributions(), installation.pip()
        return [
            checks.python_version(sys.version_info[:3]),
            checks.kernel(platform.system(), platform.release()),
            checks.environment(complaint, unknown_variables(os.environ)),
            checks.packages(installed, imported, installation.absence(), pip),
            *(checks.provider(name, trial.result(), found_gpus) for name, trial in tried.items()),
            checks.gpu(found_gpus, no_gpus, list(tried), builds.for_gpus(pip, installed)),
            checks.processors(resources.processors(), os.cpu_count() or 1),
            checks.memory(
                resources.memory(),
                resources.installed_memory(),
                resources.cgroup_version(),
                (starting.result().report or {}).get("memory_limit"),
            ),
            checks.shared_hosts(no_folder, wanted=bool(chosen.host)),
            *(checks.host(host, running) for host in running),
            checks.shared_memory(_size_of(Path("/dev/shm"))),
            checks.telemetry(report.get("version"), os.environ),
            checks.start(chosen.start, starting.result()),
            *([checks.sandbox(landlock.version(), seccomp.complaint())] if resources.is_platform() else []),
            *([] if complaint else [checks.load_cache(chosen, store.folder())]),
        ]


def _settings(environ: Mapping[str, str]) -> tuple[settings.Settings, str]:
    """The settings and an empty text, or the defaults and the error in the environment."""
    try:
        return settings.settings(environ), ""
    except ConfigError as error:
        return settings.Settings(), str(error)


def unknown_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """``ONNX_DL_*`` variables that nothing reads, each with a similar known name, or an empty text."""
    known = {f"ONNX_DL_{field.upper()}" for field in settings.Settings.__struct_fields__}
    known |= settings.ELSEWHERE.keys() | settings.INTERNAL.keys()
    strange = sorted(name for name in environ if name.startswith("ONNX_DL_") and name not in known)
    return {name: "".join(difflib.get_close_matches(name, known, 1, 0.85)) for name in strange}


def _hosts(environ: Mapping[str, str]) -> tuple[list[RunningHost], str]:
    """The shared hosts that run, and the error of their folder; empty: none."""
    try:
        return running_hosts.running(environ=environ), ""
    except PlatformError as error:
        return [], str(error)


def _gpus() -> tuple[list[Gpu], str]:
    try:
        return gpus(), "NVML finds none"
    except OSError as error:
        return [], str(error)


def _size_of(folder: Path) -> int | None:
    try:
        stat = os.statvfs(folder)
    except OSError:
        return None
    return stat.f_blocks * stat.f_frsize
