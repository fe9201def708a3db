"""Sandbox of a worker: what it may still do when it opens a model that is not trusted.

In two steps, before the model is opened.  :func:`confine` comes first, while the process has one thread:
Landlock restricts a thread and its later ones only.  :func:`lock` comes when the worker is connected and
listens: from then on no thread can make sockets, processes or signals to others.  docs/security.md: the
effect, and what it does not cover.
"""

from __future__ import annotations

import contextlib
import glob
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Final

from onnx_dl.core import model_files
from onnx_dl.core.spec import Confinement
from onnx_dl.errors import SandboxUnavailable
from onnx_dl.system import resources
from onnx_dl.workers.sandbox import capabilities, landlock, seccomp

_SYSTEM: Final = (
    "/usr", "/lib", "/lib32", "/lib64", "/nix/store", "/gnu/store", "/sys",
    "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/random", "/dev/zero",
    "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/sys", "/proc/filesystems", "/proc/version",
)  # fmt: skip
"""Files of the system that the loader, onnxruntime and Python read, and that have no user's data."""
_OF_ACCELERATORS: Final = ("/opt/rocm", "/proc/devices", "/proc/driver", "/etc/OpenCL", "/etc/vulkan")
_DEVICES: Final = ("/dev/nvidia*", "/dev/dri", "/dev/kfd", "/dev/accel", "/dev/dxg")
_SITES: Final = ("site-packages", "dist-packages")
_SELF: Final = "/proc/self"

_kept: list[int] = []
"""Descriptor of /proc/PID: the kernel would forget the rule for it under memory pressure."""


def confine(terms: Confinement, blobs: Mapping[str, int]) -> None:
    """Restricts this process to reading what the models need, for ever.  It must have one thread.

    Args:
        blobs: descriptors of models given as bytes, by tag.

    Raises:
        SandboxUnavailable: the system lacks something.
    """
    if not resources.has_one_thread():
        raise SandboxUnavailable(
            "sandbox=True needs a worker process that starts with one thread, and this one has more: a "
            "library starts threads when it is imported (a sitecustomize module, or a .pth file)."
        )
    if not landlock.version():
        raise landlock.missing()
    _leave_streams()
    with contextlib.suppress(OSError):  # there is no /proc
        _kept.append(os.open(_SELF, os.O_PATH | os.O_CLOEXEC))
    readable = {*_SYSTEM, _SELF, *_installation(), *_of_models(terms, blobs)}
    devices = {os.devnull}
    if terms.devices:
        readable.update(_OF_ACCELERATORS)
        devices.update(path for pattern in _DEVICES for path in glob.glob(pattern))
    try:
        landlock.no_new_privileges()
        capabilities.drop()
        landlock.restrict(sorted(readable), sorted(devices))
    except OSError as error:
        if isinstance(error, SandboxUnavailable):
            raise
        raise SandboxUnavailable(f"sandbox=True: Landlock refuses a rule: {error.strerror}.") from error


def lock() -> None:
    """Takes away sockets, processes, and signals to others, from all threads, for ever.

    Raises:
        SandboxUnavailable: the kernel refuses.
    """
    seccomp.install(truncation=landlock.version() < landlock.TRUNCATION_SINCE)


def _leave_streams() -> None:
    """Gives up the application's standard input and output, which may be a terminal.  Output goes where the
    worker's stderr goes."""
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)


def _installation() -> Iterator[str]:
    """Yields folders and files of Python, its packages, and libraries."""
    yield os.path.dirname(os.__file__)  # without sysconfig, which takes 2 MB
    for prefix in (sys.prefix, sys.base_prefix, sys.exec_prefix):  # conda keeps libraries there
        yield from (os.path.join(prefix, name) for name in ("lib", "lib64", "DLLs"))
    if (unpacked := getattr(sys, "_MEIPASS", None)) is not None:  # an application of PyInstaller
        yield str(unpacked)
    yield from filter(os.path.isabs, os.environ.get("LD_LIBRARY_PATH", "").split(":"))
    for module in list(sys.modules.values()):
        if (path := _home_of(module)) is not None:
            yield path


def _home_of(module: object) -> str | None:
    """Returns the folder of installed packages that a module lies in, or, elsewhere, only its own package."""
    name, file = getattr(module, "__name__", ""), getattr(module, "__file__", None)
    if not isinstance(name, str) or not isinstance(file, str) or name == "__main__":
        return None
    folder = os.path.dirname(os.path.abspath(file))
    parts = folder.split(os.sep)
    for site in _SITES:
        if site in parts:
            return os.sep.join(parts[: parts.index(site) + 1])
    levels = name.count(".") if os.path.basename(file).startswith("__init__.") else name.count(".") - 1
    if levels < 0:
        return file  # a module in no package: not its folder, which may be the user's
    return os.path.normpath(os.path.join(folder, *[os.pardir] * levels))


def _of_models(terms: Confinement, blobs: Mapping[str, int]) -> Iterator[str]:
    """Yields the files that the models are read from, and no folders: others' files may lie there."""
    yield from terms.files
    for path in terms.models:
        yield path
        yield os.path.splitext(path)[0] + ".constants.bin"  # of onnx-mlir
        yield from _external(path, os.path.dirname(path))
    for tag, folder in terms.blobs.items():
        if (blob := blobs.get(tag)) is not None:
            yield from _external(blob, folder)


def _external(model: str | int, folder: str) -> Iterator[str]:
    """Yields the paths of external data in a model's folder.  A model cannot name others."""
    with contextlib.suppress(OSError, ValueError):  # the load raises the proper error
        root = os.path.join(os.path.realpath(folder), "")
        for name in model_files.external_files(model):
            path = os.path.join(folder, name)
            inside = os.path.normpath(os.path.join(root, name)).startswith(root)
            if inside and not os.path.isabs(name):
                yield path
