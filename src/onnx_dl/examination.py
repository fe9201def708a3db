"""Finds what :mod:`onnx_dl.doctor` judges: what the system says, and what :mod:`onnx_dl.trials` tries."""

from __future__ import annotations

import concurrent.futures
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from onnx_dl import config, doctor, installation, machine, trials
from onnx_dl.errors import ConfigError
from onnx_dl.supervisor.probe import Gpu, gpus
from onnx_dl.trials import Answer
from onnx_dl.workers import cache

_BUDGET: Final = 9.0
"""Seconds that all trials together may take."""
_IMPORT: Final = 5.0
"""Seconds of it for the import of onnxruntime, which the providers wait for."""


def examine() -> list[doctor.Finding]:
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
        return [
            doctor.python_version(sys.version_info[:3]),
            doctor.kernel(platform.system(), platform.release()),
            doctor.environment(complaint),
            doctor.packages(installation.distributions(), here),
            *(doctor.provider(name, trial.result(), found_gpus) for name, trial in tried.items()),
            doctor.gpu(found_gpus, no_gpus, list(tried)),
            doctor.processors(machine.processors(), os.cpu_count() or 1),
            doctor.memory(
                machine.memory(),
                machine.installed_memory(),
                machine.cgroup_version(),
                (starting.result().said or {}).get("memory_limit"),
            ),
            doctor.shared_memory(_size_of(Path("/dev/shm"))),
            doctor.telemetry(said.get("version"), os.environ),
            doctor.start(chosen.start, starting.result()),
            *([] if complaint else [doctor.load_cache(chosen, cache.folder())]),
        ]


def _settings(environ: Mapping[str, str]) -> tuple[config.Settings, str]:
    """The settings, or the defaults and what is wrong with the environment."""
    try:
        return config.settings(environ), ""
    except ConfigError as error:
        return config.Settings(), str(error)


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
