"""Checks of ``onnx-dl doctor``: pure functions of facts about the system, each with one finding.

:mod:`onnx_dl.cli.doctor.collect` collects the facts, :mod:`onnx_dl.cli.doctor.report` prints the findings.
"""

from __future__ import annotations

import enum
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from onnx_dl.cli.doctor.trials import TrialResult
from onnx_dl.core import settings
from onnx_dl.core.text import format_bytes
from onnx_dl.supervisor.measure.memory_probe import Gpu
from onnx_dl.system import builds
from onnx_dl.transport import running_hosts
from onnx_dl.transport.running_hosts import RunningHost
from onnx_dl.workers.load_cache import store

_CPU: Final = "CPUExecutionProvider"
_NO_GPU: Final = "Nothing to do without a device for it: models that ask for it use the next provider."


class Mark(enum.StrEnum):
    """The result of a check."""

    OK = "ok"
    WARNING = "warning"
    """Something works, but not as well as it could."""
    PROBLEM = "problem"
    """Models cannot be used, or not as the settings demand."""


class Finding(msgspec.Struct, frozen=True):
    """The result of one check, and advice."""

    check: str
    mark: Mark
    found: str
    advice: str = ""


# --- the system --------------------------------------------------------------------------------------------


def python_version(version: Sequence[int]) -> Finding:
    """Checks the version of this interpreter."""
    text = ".".join(map(str, version))
    if (3, 12, 0) <= tuple(version) <= (3, 12, 2):
        return Finding(
            "python",
            Mark.WARNING,
            f"{text} starts no thread once the main thread has ended: models cannot be loaded then",
            "Python 3.12.3 or newer has no such limit.",
        )
    return Finding("python", Mark.OK, text)


def kernel(system: str, release: str) -> Finding:
    """Checks for Linux 5.3, which is the first with pidfd_open()."""
    if system == "Linux" and builds.release(release) >= (5, 3):
        return Finding("kernel", Mark.OK, f"{system} {release}")
    return Finding(
        "kernel",
        Mark.PROBLEM,
        f"{system} {release}",
        "Worker processes need Linux 5.3 or newer; by default, models run in-process here.",
    )


def environment(complaint: str, unknown: Mapping[str, str]) -> Finding:
    """Checks the ONNX_DL_* variables.  ``unknown``: those that nothing reads, each with a similar name."""
    if complaint:
        return Finding("settings", Mark.PROBLEM, complaint, "Correct the variable, or unset it.")
    if unknown:
        meant = [f"{name} (or is it {other}?)" if other else name for name, other in unknown.items()]
        return Finding(
            "settings", Mark.WARNING, f"nothing reads {', '.join(meant)}", "Correct it, or unset it."
        )
    return Finding("settings", Mark.OK, "the ONNX_DL_* environment variables can be used")


def processors(allowed: int, installed: int) -> Finding:
    """Shows how many processors affinity and cgroup allow."""
    some = f"{allowed} of {installed}, by affinity or cgroup"
    return Finding("processors", Mark.OK, some if allowed < installed else f"all {installed}")


def memory(
    allowed: int | None, installed: int | None, cgroup: int | None, limit: int | None = None
) -> Finding:
    """Shows how much memory may be used.  Sizes are in bytes.

    ``cgroup``: the version that limits it; ``limit``: of all models of a host, None if no host came up.
    """
    if allowed is None or installed is None:
        return Finding(
            "memory",
            Mark.WARNING,
            "the system does not tell its size, so there is no limit for models",
            "Mount /proc if it is missing; ONNX_DL_MEMORY_LIMIT sets a limit.",
        )
    groups = f"cgroup v{cgroup}" if cgroup else "a cgroup"
    models = f"; models of a host may take {format_bytes(limit)}" if limit else ""
    if allowed < installed:
        of = f"{format_bytes(allowed)} of {format_bytes(installed)}, by {groups}"
        return Finding("memory", Mark.OK, of + models)
    return Finding("memory", Mark.OK, f"all {format_bytes(installed)}, {groups} sets no limit{models}")


def shared_hosts(complaint: str, *, wanted: bool) -> Finding:
    """Checks the folder of this user's shared hosts.  ``wanted``: the settings name a shared host."""
    if complaint:
        mark = Mark.PROBLEM if wanted else Mark.WARNING
        return Finding("shared hosts", mark, complaint, "Programs without a shared host do not need it.")
    return Finding("shared hosts", Mark.OK, "have a folder of this user alone")


def host(running: RunningHost, hosts: Sequence[RunningHost]) -> Finding:
    """Checks a running shared host.  ``hosts``: all that run."""
    check, described = f"host {running.name}", running_hosts.describe(running)
    outlook = running_hosts.outlook(running, hosts)
    if running.reachable:
        leaves = f"; {outlook}" if running_hosts.successor(running, hosts) is not None else ""
        return Finding(check, Mark.OK, described + leaves)
    return Finding(
        check,
        Mark.WARNING,
        f"{described}; this version of onnx-dl cannot connect to it: the models of both are in memory twice",
        outlook,
    )


def shared_memory(size: int | None) -> Finding:
    """Shows the size of /dev/shm, which other shared-memory programs need to be large, and onnx-dl not."""
    there = "is missing" if size is None else f"has {format_bytes(size)}"
    return Finding("/dev/shm", Mark.OK, f"{there}; not needed, tensors are in memfds")


# --- onnxruntime -------------------------------------------------------------------------------------------


def packages(
    found: Mapping[str, str], imported: TrialResult, missing: str = "", pip: str = "python -m pip"
) -> Finding:
    """Checks the builds of onnxruntime.

    ``found``: versions of installed builds; ``imported``: trial of the import; ``missing``: advice if there
    is nothing to import, else empty; ``pip``: the installer's command.
    """
    listed = " and ".join(f"{name} {version}" for name, version in sorted(found.items())) or "none installed"
    if missing:
        return Finding("onnxruntime", Mark.PROBLEM, listed, missing)
    repair = f"Reinstall it: {builds.repair(pip, found)}"
    if imported.report is None:
        return Finding("onnxruntime", Mark.PROBLEM, f"{listed}; its import {_why(imported)}", repair)
    live = builds.Build(imported.report["build"] or builds.PLAIN, imported.report["version"])
    if builds.is_too_old(live.version):
        return Finding("onnxruntime", Mark.PROBLEM, listed, builds.too_old(pip, found, live.version))
    if harm := builds.clash(pip, found, live):
        return Finding(
            "onnxruntime", Mark.WARNING, f"{listed}; the files are those of {' '.join(live)}", harm
        )
    if found and live.version not in found.values():
        words = f"{listed}, but the files are those of {' '.join(live)}"
        return Finding("onnxruntime", Mark.WARNING, words, repair)
    return Finding("onnxruntime", Mark.OK, f"{' '.join(live)} in {imported.report['folder']}")


def provider(name: str, tried: TrialResult, found_gpus: Sequence[Gpu]) -> Finding:
    """Checks a provider that onnxruntime lists: it may still not work."""
    check = f"provider {name.removesuffix('ExecutionProvider')}"
    if tried.report is None:
        mark = Mark.PROBLEM if name == _CPU else Mark.WARNING
        return Finding(check, mark, f"a session with it {_why(tried)}", _without(name))
    if name not in tried.report["providers"]:
        advice = _without(name) if found_gpus else _NO_GPU
        return Finding(check, Mark.WARNING, f"is listed, but falls back: {reason(tried.stderr)}", advice)
    if not tried.report["computes"]:
        return Finding(check, Mark.PROBLEM, "works, but |-2| is not 2 with it", _without(name))
    return Finding(check, Mark.OK, "works")


def _without(name: str) -> str:
    if name == _CPU:
        return "Reinstall onnxruntime."
    return f"Install its libraries, or remove {name} from providers=: models then use the next one."


def gpu(found: Sequence[Gpu], why_none: str, providers: Sequence[str], repair: str) -> Finding:
    """Checks the GPUs.

    ``why_none``: message of NVML; ``providers``: those that onnxruntime lists; ``repair``: the command that
    installs the build for GPUs.
    """
    if not found:
        return Finding("gpu", Mark.OK, f"none: {why_none}")
    listed = "; ".join(f"{one.name}, {format_bytes(one.memory)}, driver {one.driver}" for one in found)
    if providers and "CUDAExecutionProvider" not in providers:
        return Finding("gpu", Mark.WARNING, f"{listed}; this onnxruntime cannot use it", repair)
    return Finding("gpu", Mark.OK, listed)


def telemetry(version: str | None, environ: Mapping[str, str]) -> Finding:
    """Checks telemetry: onnxruntime 1.29 and later send it in a thread, unless the environment forbids it."""
    if builds.release(version or "") < (1, 29):
        return Finding("telemetry", Mark.OK, "this onnxruntime sends none")
    if environ.get("ORT_DISABLE_TELEMETRY") == "1":
        return Finding("telemetry", Mark.OK, "off in workers, and here: ORT_DISABLE_TELEMETRY=1")
    return Finding(
        "telemetry",
        Mark.WARNING,
        "off in workers, but ORT_DISABLE_TELEMETRY is not set here: a program that imports onnxruntime "
        "itself gets its telemetry thread",
        "export ORT_DISABLE_TELEMETRY=1",
    )


# --- onnx-dl -----------------------------------------------------------------------------------------------


def start(mode: str, tried: TrialResult) -> Finding:
    """Checks how workers are started.  ``mode``: ``ONNX_DL_START``."""
    if tried.report is None:
        return Finding("workers", Mark.PROBLEM, f"starting one {_why(tried)}", "Solve that problem first.")
    seconds = f"first model ready after {tried.report['seconds']:.2f} s"
    if tried.report["forked"]:
        return Finding("workers", Mark.OK, f"are forked from a template; {seconds}")
    if mode == "exec":
        return Finding("workers", Mark.OK, f"each is a fresh interpreter, by ONNX_DL_START=exec; {seconds}")
    return Finding(
        "workers",
        Mark.WARNING,
        f"each is a fresh interpreter, because the template has more than one thread; {seconds}",
        "Loads take 0.1 s longer. Some code starts threads when Python starts or onnxruntime is "
        "imported: look at sitecustomize, .pth files, profilers.",
    )


def sandbox(landlock: int, seccomp: str) -> Finding:
    """Shows whether ``sandbox=True`` works here.

    ``landlock``: its version, 0: there is none; ``seccomp``: why filters cannot be used, empty: they can.
    """
    if landlock and not seccomp:
        return Finding("sandbox", Mark.OK, f"Landlock version {landlock}, seccomp")
    lacks = ([] if landlock else ["no Landlock"]) + ([f"no seccomp filters ({seccomp})"] if seccomp else [])
    return Finding(
        "sandbox",
        Mark.OK,
        f"not available: {', '.join(lacks)}; models with sandbox=True are not loaded",
        "Linux 5.13 or newer with landlock in the kernel parameter lsm= has it." if not landlock else "",
    )


def load_cache(chosen: settings.Settings, root: Path) -> Finding:
    """Checks whether the load cache below ``root`` can be written."""
    if chosen.cache == "off":
        return Finding("load cache", Mark.OK, "off, by ONNX_DL_CACHE=off")
    size = sum(entry.nbytes for entry in store.Cache(root, 0).entries())
    found = f"{format_bytes(size)} of {format_bytes(chosen.cache_limit)} in {root}"
    if is_writable(root):
        return Finding("load cache", Mark.OK, found)
    return Finding(
        "load cache",
        Mark.WARNING,
        f"{found}, which cannot be written to",
        "Large models load slower than they could. Set ONNX_DL_CACHE_DIR to a writable folder.",
    )


def is_writable(folder: Path) -> bool:
    """Returns whether files can be made in the folder, or the folder itself if it does not exist."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    try:
        with tempfile.TemporaryFile(dir=there):  # os.access() is wrong for root
            return True
    except OSError:
        return False


# --- text --------------------------------------------------------------------------------------------------

_ORT_ERROR: Final[Sequence[Callable[[str], re.Match[str] | None]]] = (
    re.compile(r"with error: (.+)").search,
    re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : (.+)").search,
    re.compile(r"^(?=.*\S)(.+)$", re.MULTILINE).search,
)


def reason(stderr: str) -> str:
    """The reason in onnxruntime's log, without colours, times and source lines."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", stderr)
    found = next(filter(None, (search(plain) for search in _ORT_ERROR)), None)
    return found[1].strip() if found else "no reason given"


def _why(tried: TrialResult) -> str:
    """The failure of a trial, and the last line of its stderr."""
    lines = tried.stderr.strip().splitlines()
    return f"{tried.failure}: {lines[-1]}" if lines else tried.failure
