"""Finds what :mod:`onnx_dl.cli.doctor.checks` judges: what the system says, and what :mod:`onnx_dl.cli.doctor.trials` tries."""

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
from onnx_dl.cli.doctor.trials import Answer
from onnx_dl.core import settings
from onnx_dl.errors import ConfigError, PlatformError
from onnx_dl.supervisor.measure.memory_probe import Gpu, gpus
from onnx_dl.system import builds, installation, resources
from onnx_dl.transport import running_hosts
from onnx_dl.transport.running_hosts import Sighting
from onnx_dl.workers.load_cache import store

_BUDGET: Final = 9.0
"""Seconds that all trials together may take."""
_IMPORT: Final = 5.0
"""Seconds of it for the import of onnxruntime, which the providers wait for."""
_NO_SETTINGS: Final = frozenset({"ONNX_DL_RUNTIME_DIR"})
"""Variables that no host is set by, and that are read all the same."""


def examine() -> list[checks.Finding]:
    """All findings, in the order in which they matter.  Takes ten seconds at most and leaves no process."""
    end = time.monotonic() + _BUDGET
    chosen, complaint = _settings(os.environ)
    with concurrent.futures.ThreadPoolExecutor(16, "onnx-dl-doctor") as threads:

        def ask(*trial: str, timeout: float) -> concurrent.futures.Future[Answer]:
            return threads.submit(trials.ask, *trial, timeout=timeout, python=chosen.python)

        starting = ask("start", timeout=_BUDGET)
        here = ask("installed", timeout=_IMPORT).result()
        said = here.said or {}
        left = max(0.1, end - time.monotonic())
        tried = {name: ask("provider", name, timeout=left) for name in said.get("providers", ())}
        found_gpus, no_gpus = _gpus()
        running, no_folder = _hosts(os.environ)
        installed, pip = installation.distributions(), installation.pip()
        return [
            checks.python_version(sys.version_info[:3]),
            checks.kernel(platform.system(), platform.release()),
            checks.environment(complaint, unknown_variables(os.environ)),
            checks.packages(installed, here, installation.complaint_of_none(), pip),
            *(checks.provider(name, trial.result(), found_gpus) for name, trial in tried.items()),
            checks.gpu(found_gpus, no_gpus, list(tried), builds.for_gpus(pip, installed)),
            checks.processors(resources.processors(), os.cpu_count() or 1),
            checks.memory(
                resources.memory(),
                resources.installed_memory(),
                resources.cgroup_version(),
                (starting.result().said or {}).get("memory_limit"),
            ),
            checks.shared_hosts(no_folder, wanted=bool(chosen.host)),
            *(checks.host(seen, running) for seen in running),
            checks.shared_memory(_size_of(Path("/dev/shm"))),
            checks.telemetry(said.get("version"), os.environ),
            checks.start(chosen.start, starting.result()),
            *([] if complaint else [checks.load_cache(chosen, store.folder())]),
        ]


def _settings(environ: Mapping[str, str]) -> tuple[settings.Settings, str]:
    """The settings, or the defaults and what is wrong with the environment."""
    try:
        return settings.settings(environ), ""
    except ConfigError as error:
        return settings.Settings(), str(error)


def unknown_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """``ONNX_DL_*`` variables that nothing reads, each with the one that may be meant, or with nothing."""
    known = {f"ONNX_DL_{field.upper()}" for field in settings.Settings.__struct_fields__} | _NO_SETTINGS
    strange = sorted(name for name in environ if name.startswith("ONNX_DL_") and name not in known)
    return {name: "".join(difflib.get_close_matches(name, known, 1, 0.85)) for name in strange}


def _hosts(environ: Mapping[str, str]) -> tuple[list[Sighting], str]:
    """The shared hosts that run, and why there is no folder for their files; empty: there is one."""
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
