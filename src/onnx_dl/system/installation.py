"""Whether onnxruntime is installed, new enough, and whole.

Finds what is there without importing it; what is to be thought of it is :mod:`onnx_dl.system.builds`'s.
"""

from __future__ import annotations

import email.parser  # importlib.metadata needs it; a signal handler would find it imported by half  # noqa: F401
import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from onnx_dl.errors import InstallationError
from onnx_dl.system import builds
from onnx_dl.system.builds import Build

_METADATA: Final = re.compile(r"(onnxruntime|ort_nightly).*\.(dist|egg)-info", re.IGNORECASE)
_OF_LIVE: Final = Path("capi", "build_and_package_info.py")
"""The file of a build that names it."""


@functools.cache
def check(asked: tuple[str, ...] = ()) -> None:
    """Looks for an onnxruntime that can be used; warns if several builds harm each other.

    ``asked``: names of the providers that a model is to run on.

    Raises:
        InstallationError: there is none, it is too old, or its files are gone.
    """
    if complaint := complaint_of_none():
        raise InstallationError(complaint)
    found, live = distributions(), live_build()
    if builds.is_too_old(live.version):
        raise InstallationError(builds.too_old(pip(), found, live.version))
    if harm := builds.clash(pip(), found, live, asked):
        warnings.warn(harm, RuntimeWarning, stacklevel=2)


def complaint_of_none() -> str:
    """What to do where there is no onnxruntime, or only an empty folder of it; empty: there is one."""
    if folder() is None and _is_importable():
        return ""  # in a bundle, or by an importer of its own
    if folder() is not None and not _is_empty():
        return ""
    found = distributions()
    if found or folder() is not None:
        return builds.damaged(pip(), found)
    return missing()


def missing() -> str:
    """What to do without onnxruntime."""
    return builds.missing(pip(), sys.platform, platform.machine())


def pip() -> str:
    """How packages are installed here: uv's environments have no pip."""
    return "python -m pip" if importlib.util.find_spec("pip") else "uv pip"


@functools.cache
def build() -> str:
    """Distribution and version of what is live, such as ``onnxruntime-gpu-1.31.1``; imports nothing."""
    live = live_build()
    return f"{live.name}-{live.version or 'unknown'}" if live.name else "none"


def live_build() -> Build:
    """The build whose files are there, as it says of itself; else as the only distribution says."""
    found = distributions()
    alone = next(iter(found.items())) if len(found) == 1 else ("", "")
    said = _said()
    name, number = said.get("package_name") or alone[0], said.get("__version__") or alone[1]
    return Build(name or ("onnxruntime" if _is_importable() else ""), number)


def _said() -> dict[str, str]:
    """What the live build says of itself."""
    where = folder()
    try:
        text = "" if where is None else (where / _OF_LIVE).read_text(errors="replace")
    except OSError:
        return {}
    return dict(re.findall(r"^(package_name|__version__) *= *['\"](.+)['\"]", text, re.MULTILINE))


def distributions() -> dict[str, str]:
    """Versions of the distributions that wrote the onnxruntime package, by name.

    Those in another folder of the path are none: nothing of them is imported or overwritten.
    """
    where = folder()
    roots = [Path(entry or ".") for entry in sys.path] if where is None else [where.parent]
    return {
        str(found.metadata["Name"]).lower().replace("_", "-"): found.version
        for found in _named(roots)
        if _brings_onnxruntime(found)
    }


def _named(roots: Iterable[Path]) -> Iterator[importlib.metadata.Distribution]:
    """By their names alone: to read the metadata of all that is installed takes a tenth of a second."""
    for root in roots:
        try:
            names = os.listdir(root)
        except OSError:  # an archive, or gone
            continue
        yield from (
            importlib.metadata.PathDistribution(root / name) for name in names if _METADATA.fullmatch(name)
        )


def _brings_onnxruntime(found: importlib.metadata.Distribution) -> bool:
    """onnxruntime-extensions and its like have packages of their own."""
    top = found.read_text("top_level.txt")
    if top is not None:
        return "onnxruntime" in top.split()
    return "onnxruntime/__init__.py" in (found.read_text("RECORD") or "")


def folder() -> Path | None:
    """Where the package's files are, or what is left of them; None: it is not there, or not in a folder."""
    spec = _spec()
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return next((Path(place) for place in places if os.path.isdir(place)), None)


def _is_empty() -> bool:
    """What uninstalling leaves imports as a namespace package."""
    spec = _spec()
    return spec is not None and spec.origin is None


def _is_importable() -> bool:
    try:
        return importlib.util.find_spec("onnxruntime") is not None
    except ValueError:  # a module that somebody made by hand
        return True


def _spec() -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec("onnxruntime")
    except ValueError:
        return None
