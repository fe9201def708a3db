"""Whether onnxruntime is installed, once.

Its builds (onnxruntime, onnxruntime-gpu and others) write into one folder: of two, the one written last wins,
and uninstalling either leaves a package that imports but is empty.  pip finds nothing wrong with that.
"""

from __future__ import annotations

import email.parser  # importlib.metadata needs it; a signal handler would find it imported by half  # noqa: F401
import functools
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Iterable

from onnx_dl.errors import InstallationError


@functools.cache
def check() -> None:
    """Warns if several builds are installed.

    Raises:
        InstallationError: there is no onnxruntime.
    """
    found = distributions()
    if importlib.util.find_spec("onnxruntime") is None:
        raise InstallationError(missing())
    if len(found) > 1:
        warnings.warn(several(found), RuntimeWarning, stacklevel=2)


def missing() -> str:
    """What to do without onnxruntime."""
    return (
        "onnxruntime is not installed. Install it with: pip install onnxruntime-gpu (Linux x86-64, Windows) "
        "or: pip install onnxruntime (elsewhere)."
    )


def several(found: Iterable[str]) -> str:
    """What to do with more than one onnxruntime."""
    names = sorted(found)
    return (
        f"{' and '.join(names)} are installed side by side and overwrite each other's files, so which one "
        f"runs is chance. Keep one: pip uninstall -y {' '.join(names)} && pip install onnxruntime-gpu "
        "(or onnxruntime, on a machine without NVIDIA GPUs)."
    )


@functools.cache
def build() -> str:
    """Distribution and version of what is installed, such as ``onnxruntime-gpu-1.20.0``; imports nothing."""
    return "+".join(sorted(f"{name}-{version}" for name, version in distributions().items())) or "none"


def version() -> str:
    """Ours; ``unknown`` in a bundle that left the packages' metadata out."""
    try:
        return importlib.metadata.version("onnx-dl")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def distributions() -> dict[str, str]:
    """Versions of the installed distributions that provide the onnxruntime package, by name."""
    return {
        str(distribution.metadata["Name"]).lower(): distribution.version
        for distribution in importlib.metadata.distributions()
        if str(distribution.metadata["Name"]).lower().startswith("onnxruntime")
        and distribution.read_text("top_level.txt") in ("onnxruntime", "onnxruntime\n")
    }
