"""Checks that onnxruntime is installed, complete and new enough, without importing it."""

from __future__ import annotations

import functools
import importlib.machinery
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
_BUILD_INFO: Final = Path("capi", "build_and_package_info.py")
"""The file with the name of the build."""


@functools.cache
def check(asked: tuple[str, ...] = ()) -> None:
    """Checks the installed onnxruntime; warns if several builds are in conflict.

    ``asked``: names of the providers that a model shall use.

    Raises:
        InstallationError: it is missing, incomplete or too old.
    """
    if problem := absence():
        raise InstallationError(problem)
    found, live = distributions(), live_build()
    if builds.is_too_old(live.version):
        raise InstallationError(builds.too_old(pip(), found, live.version))
    if harm := builds.clash(pip(), found, live, asked):
        warnings.warn(harm, RuntimeWarning, stacklevel=2)


def absence() -> str:
    """The message if there is no onnxruntime, or only an empty folder; empty: there is one."""
    where, spec = folder(), _spec()
    # Without a folder: in a frozen program, or by another importer.  Without an origin: uninstalling has left
    # a folder that imports as a namespace package.
    if _is_importable() if where is None else spec is not None and spec.origin is not None:
        return ""
    found = distributions()
    if found or where is not None:
        return builds.damaged(pip(), found)
    return builds.missing(pip(), sys.platform, platform.machine())


def pip() -> str:
    """The command that installs packages here: uv's environments have no pip."""
    return "python -m pip" if importlib.util.find_spec("pip") else "uv pip"


@functools.cache
def build() -> str:
    """Distribution and version of the live build, such as ``onnxruntime-gpu-1.31.1``."""
    live = live_build()
    return f"{live.name}-{live.version or 'unknown'}" if live.name else "none"


def live_build() -> Build:
    """The build whose files are there: by its own file, else by the only distribution."""
    found = distributions()
    alone = next(iter(found.items())) if len(found) == 1 else ("", "")
    info = _build_info()
    name, number = info.get("package_name") or alone[0], info.get("__version__") or alone[1]
    return Build(name or ("onnxruntime" if _is_importable() else ""), number)


def _build_info() -> dict[str, str]:
    """Name and version in the file of the live build."""
    where = folder()
    try:
        text = "" if where is None else (where / _BUILD_INFO).read_text(errors="replace")
    except OSError:
        return {}
    return dict(re.findall(r"^(package_name|__version__) *= *['\"](.+)['\"]", text, re.MULTILINE))


def distributions() -> dict[str, str]:
    """Versions of the distributions that wrote the onnxruntime package, by name.

    Distributions in other folders of the path do not count: their files are neither imported nor replaced.
    """
    where = folder()
    roots = [Path(entry or ".") for entry in sys.path] if where is None else [where.parent]
    found = (_name_and_version(folder) for folder in _named(roots) if _brings_onnxruntime(folder))
    return {name.lower().replace("_", "-"): version for name, version in found if name}


def _named(roots: Iterable[Path]) -> Iterator[Path]:
    """Finds metadata of distributions by name alone: reading all would take a tenth of a second."""
    for root in roots:
        try:
            names = os.listdir(root)
        except OSError:  # an archive, or missing
            continue
        yield from (root / name for name in names if _METADATA.fullmatch(name))


def _name_and_version(metadata: Path) -> tuple[str, str]:
    """Name and version in the metadata of a distribution; empty if it has none.

    Not by ``importlib.metadata``: it takes 10 ms of an application's first call, and 1.3 MB of each process.
    """
    text = _read(metadata / "METADATA") or _read(metadata / "PKG-INFO") or ""
    fields = dict(re.findall(r"^(Name|Version): *(\S+)", text.partition("\n\n")[0], re.MULTILINE))
    return fields.get("Name", ""), fields.get("Version", "")


def _brings_onnxruntime(metadata: Path) -> bool:
    """Returns whether it contains the package onnxruntime; onnxruntime-extensions, for example, does not."""
    top = _read(metadata / "top_level.txt")
    if top is not None:
        return "onnxruntime" in top.split()
    return "onnxruntime/__init__.py" in (_read(metadata / "RECORD") or "")


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def folder() -> Path | None:
    """The folder of the package, even if incomplete; None: there is none, or it is in an archive."""
    spec = _spec()
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return next((Path(place) for place in places if os.path.isdir(place)), None)


def _is_importable() -> bool:
    return _spec() is not None or sys.modules.get("onnxruntime") is not None


def _spec() -> importlib.machinery.ModuleSpec | None:
    try:
        return importlib.util.find_spec("onnxruntime")
    except ValueError:  # a module without __spec__ in sys.modules
        return None
