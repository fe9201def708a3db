"""``onnx-dl doctor``: what onnx-dl stands on, and what to do where it does not hold.

Each check is a function of what was found, and gives one finding.  Who finds it is
:mod:`onnx_dl.cli.doctor.collect`, what is printed :mod:`onnx_dl.cli.doctor.report`'s.
"""

from __future__ import annotations

import enum
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from onnx_dl.cli.doctor.trials import Answer
from onnx_dl.core import settings
from onnx_dl.core.text import format_bytes
from onnx_dl.supervisor.measure.memory_probe import Gpu
from onnx_dl.system import builds
from onnx_dl.transport import running_hosts
from onnx_dl.transport.running_hosts import Sighting
from onnx_dl.workers.load_cache import store

_CPU: Final = "CPUExecutionProvider"
_NO_GPU: Final = "Nothing to do where there is no device for it: models that ask for it use the next one."


class Mark(enum.StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    """Something works less well than it could."""
    PROBLEM = "problem"
    """Models cannot be used, or not as the settings say."""


class Finding(msgspec.Struct, frozen=True):
    """What one check found, and what to do about it."""

    check: str
    mark: Mark
    found: str
    advice: str = ""


# --- the system --------------------------------------------------------------------------------------------


def python_version(version: Sequence[int]) -> Finding:
    """The interpreter that runs this."""
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
    """Linux 5.3 has pidfds, the last thing that onnx-dl needs of it."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", release)[:2])
    if system == "Linux" and numbers >= (5, 3):
        return Finding("kernel", Mark.OK, f"{system} {release}")
    return Finding(
        "kernel",
        Mark.PROBLEM,
        f"{system} {release}",
        "onnx-dl needs Linux 5.3 or newer; use onnxruntime.InferenceSession here.",
    )


def environment(complaint: str, unknown: Mapping[str, str]) -> Finding:
    """The ONNX_DL_* variables; ``unknown``: those that nothing reads, with what may be meant."""
    if complaint:
        return Finding("settings", Mark.PROBLEM, complaint, "Correct the variable, or unset it.")
    if unknown:
        meant = [f"{name} (or is it {other}?)" if other else name for name, other in unknown.items()]
        return Finding(
            "settings", Mark.WARNING, f"nothing reads {', '.join(meant)}", "Correct it, or unset it."
        )
    return Finding("settings", Mark.OK, "the ONNX_DL_* environment variables can be used")


def processors(allowed: int, installed: int) -> Finding:
    """Those that affinity and cgroup leave."""
    if allowed < installed:
        return Finding("processors", Mark.OK, f"{allowed} of {installed}, by affinity or cgroup")
    return Finding("processors", Mark.OK, f"all {installed}")


def memory(
    allowed: int | None, installed: int | None, cgroup: int | None, limit: int | None = None
) -> Finding:
    """What of the machine's memory may be used, in bytes; ``cgroup``: which version limits it; ``limit``: of
    all models of a host together, None if none came up."""
    if allowed is None or installed is None:
        return Finding(
            "memory",
            Mark.WARNING,
            "the system does not say how much there is, so there is no limit for models",
            "Mount /proc if it is not there; ONNX_DL_MEMORY_LIMIT sets a limit.",
        )
    groups = f"cgroup v{cgroup}" if cgroup else "a cgroup"
    models = f"; models of a host may take {format_bytes(limit)}" if limit else ""
    if allowed < installed:
        of = f"{format_bytes(allowed)} of {format_bytes(installed)}, by {groups}"
        return Finding("memory", Mark.OK, of + models)
    return Finding("memory", Mark.OK, f"all {format_bytes(installed)}, {groups} sets no limit{models}")


def shared_hosts(complaint: str, *, wanted: bool) -> Finding:
    """The folder in which the hosts of this user are found; ``wanted``: the settings name one."""
    if complaint:
        mark = Mark.PROBLEM if wanted else Mark.WARNING
        return Finding("shared hosts", mark, complaint, "Programs that use no shared host need none.")
    return Finding("shared hosts", Mark.OK, "have a folder of this user alone")


def host(seen: Sighting, hosts: Sequence[Sighting]) -> Finding:
    """A shared host that runs; ``hosts``: all that run."""
    check = f"host {seen.name}"
    if seen.reachable:
        leaves = (
            f"; {running_hosts.outlook(seen, hosts)}"
            if running_hosts.successor(seen, hosts) is not None
            else ""
        )
        return Finding(check, Mark.OK, running_hosts.told(seen) + leaves)
    return Finding(
        check,
        Mark.WARNING,
        f"{running_hosts.told(seen)}; this version of onnx-dl cannot ask it and uses one of its own: models of both "
        "are in memory twice",
        running_hosts.outlook(seen, hosts),
    )


def shared_memory(size: int | None) -> Finding:
    """/dev/shm, which other programs for tensors in shared memory want to be large."""
    there = "is not there" if size is None else f"has {format_bytes(size)}"
    return Finding("/dev/shm", Mark.OK, f"{there}; not needed, tensors lie in memfds")


# --- onnxruntime -------------------------------------------------------------------------------------------


def packages(found: Mapping[str, str], here: Answer, gone: str = "", pip: str = "python -m pip") -> Finding:
    """``found``: installed builds and their versions; ``here``: what is imported; ``gone``: what to do where
    nothing of it is left to import, else empty; ``pip``: how it is called."""
    listed = " and ".join(f"{name} {version}" for name, version in sorted(found.items())) or "none installed"
    if gone:
        return Finding("onnxruntime", Mark.PROBLEM, listed, gone)
    anew = f"Install it anew: {builds.mend(pip, found)}"
    if here.said is None:
        return Finding("onnxruntime", Mark.PROBLEM, f"{listed}; importing it {_why(here)}", anew)
    live = builds.Build(here.said["build"] or builds.PLAIN, here.said["version"])
    if builds.is_too_old(live.version):
        return Finding("onnxruntime", Mark.PROBLEM, listed, builds.too_old(pip, found, live.version))
    if harm := builds.clash(pip, found, live):
        return Finding(
            "onnxruntime", Mark.WARNING, f"{listed}; the files are those of {' '.join(live)}", harm
        )
    if found and live.version not in found.values():
        words = f"{listed}, but the files are those of {' '.join(live)}"
        return Finding("onnxruntime", Mark.WARNING, words, anew)
    return Finding("onnxruntime", Mark.OK, f"{' '.join(live)} in {here.said['folder']}")


def provider(name: str, tried: Answer, found_gpus: Sequence[Gpu]) -> Finding:
    """Whether a provider that onnxruntime lists works; that it lists one says little."""
    check = f"provider {name.removesuffix('ExecutionProvider')}"
    if tried.said is None:
        mark = Mark.PROBLEM if name == _CPU else Mark.WARNING
        return Finding(check, mark, f"a session with it {_why(tried)}", _without(name))
    if name not in tried.said["providers"]:
        advice = _without(name) if found_gpus else _NO_GPU
        return Finding(check, Mark.WARNING, f"is listed, but falls back: {reason(tried.stderr)}", advice)
    if not tried.said["computes"]:
        return Finding(check, Mark.PROBLEM, "works, but |-2| is not 2 with it", _without(name))
    return Finding(check, Mark.OK, "works")


def _without(name: str) -> str:
    if name == _CPU:
        return "Install onnxruntime anew."
    return (
        f"Install what it lacks, or leave {name} out of providers=; models that ask for it use the next one."
    )


def gpu(found: Sequence[Gpu], why_none: str, providers: Sequence[str], mend: str) -> Finding:
    """``why_none``: what NVML said; ``providers``: those that onnxruntime lists; ``mend``: the command that
    brings the build for GPUs."""
    if not found:
        return Finding("gpu", Mark.OK, f"none: {why_none}")
    listed = "; ".join(f"{one.name}, {format_bytes(one.memory)}, driver {one.driver}" for one in found)
    if providers and "CUDAExecutionProvider" not in providers:
        return Finding(
            "gpu",
            Mark.WARNING,
            f"{listed}; this onnxruntime cannot use it",
            mend,
        )
    return Finding("gpu", Mark.OK, listed)


def telemetry(version: str | None, environ: Mapping[str, str]) -> Finding:
    """onnxruntime 1.29 and later start a thread that sends telemetry, unless the environment forbids it."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", version or "")[:2])
    if version is None or numbers < (1, 29):
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


def start(mode: str, tried: Answer) -> Finding:
    """How workers come to be; ``mode``: how they should."""
    if tried.said is None:
        return Finding(
            "workers",
            Mark.PROBLEM,
            f"starting one {_why(tried)}",
            "What is said there has to be mended first.",
        )
    seconds = f"first model ready after {tried.said['seconds']:.2f} s"
    if tried.said["forked"]:
        return Finding("workers", Mark.OK, f"are forked from a template; {seconds}")
    if mode == "exec":
        return Finding(
            "workers", Mark.OK, f"each is a fresh interpreter, as ONNX_DL_START=exec asks; {seconds}"
        )
    return Finding(
        "workers",
        Mark.WARNING,
        f"each is a fresh interpreter, because the template has more than one thread; {seconds}",
        "Loads take 0.1 s longer. Look for what starts threads when Python starts or onnxruntime is "
        "imported: sitecustomize, .pth files, profilers.",
    )


def load_cache(chosen: settings.Settings, root: Path) -> Finding:
    """Whether models can be saved, below ``root``, in the form that loads fastest."""
    if chosen.cache == "off":
        return Finding("load cache", Mark.OK, "off, as ONNX_DL_CACHE=off asks")
    size = sum(entry.nbytes for entry in store.Cache(root, 0).entries())
    found = f"{format_bytes(size)} of {chosen.cache_limit} in {root}"
    if is_writable(root):
        return Finding("load cache", Mark.OK, found)
    return Finding(
        "load cache",
        Mark.WARNING,
        f"{found}, which cannot be written to",
        "Large models load slower than they could. Set ONNX_DL_CACHE_DIR to a folder that can.",
    )


def is_writable(folder: Path) -> bool:
    """Whether files can be made there, or the folder itself where it does not exist yet."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    try:
        with tempfile.TemporaryFile(dir=there):  # os.access() tells root what is not so
            return True
    except OSError:
        return False


# --- words -----------------------------------------------------------------------------------------------

_ORT_ERROR: Final[Sequence[Callable[[str], re.Match[str] | None]]] = (
    re.compile(r"with error: (.+)").search,
    re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : (.+)").search,
    re.compile(r"^(?=.*\S)(.+)$", re.MULTILINE).search,
)


def reason(stderr: str) -> str:
    """Why, in the words of onnxruntime's log, without its colours, times and places."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", stderr)
    found = next(filter(None, (search(plain) for search in _ORT_ERROR)), None)
    return found[1].strip() if found else "it does not say why"


def _why(tried: Answer) -> str:
    """What went wrong, and the last line that it said."""
    lines = tried.stderr.strip().splitlines()
    return f"{tried.failure}: {lines[-1]}" if lines else tried.failure
