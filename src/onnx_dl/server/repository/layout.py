"""Triton's layout of a repository: ``NAME/VERSION/model.onnx`` with or without ``NAME/config.pbtxt``.

Reading lists names only; what they mean is decided by pure functions.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Final

import msgspec

from onnx_dl.server.repository import versions
from onnx_dl.system import small_files

CONFIG: Final = "config.pbtxt"
MODEL: Final = "model.onnx"
ORT_MODEL: Final = "model.ort"
MOST_CONFIG: Final = 1 << 20
"""Bytes of one config.pbtxt."""
_MOST_NAMES: Final = 100_000
"""Names in one folder."""


class Folder(msgspec.Struct, frozen=True):
    """One model's folder.

    Attributes:
        name: the folder's name, which is the model's.
        path: of the folder.
        config: text of config.pbtxt; None: there is none.
        problem: why the folder cannot be used; empty: it can.
        is_unreadable: what is in the folder is not known.
        versions: by number: the names in the version's folder.
    """

    name: str
    path: str
    config: str | None = None
    problem: str = ""
    is_unreadable: bool = False
    versions: dict[int, tuple[str, ...]] = {}

    @property
    def config_path(self) -> str:
        return os.path.join(self.path, CONFIG)


def read(root: str) -> list[Folder]:
    """The models of a repository, by name.  Names that begin with a dot are not models: volumes of
    Kubernetes have such folders beside their links.

    Raises:
        OSError: the repository's folder cannot be listed.
    """
    return [read_model(root, name) for name in sorted(_folders(root)) if not name.startswith(".")]


def read_model(root: str, name: str) -> Folder:
    """One model's folder; one that cannot be read has a ``problem``."""
    path = os.path.join(root, name)
    if not name.isprintable():
        return Folder(name.encode(errors="replace").decode(), path, problem="its name is not printable text")
    try:
        config = _config(os.path.join(path, CONFIG))
        found = {number: each for each in _folders(path) if (number := versions.number(each)) is not None}
        names = {number: _names(os.path.join(path, each)) for number, each in found.items()}
    except OSError as error:
        problem = f"{error.filename or path} cannot be read: {error.strerror}"
        return Folder(name, path, problem=problem, is_unreadable=True)
    except UnicodeDecodeError:
        problem = f"{os.path.join(path, CONFIG)}:1: this is not UTF-8"
        return Folder(name, path, problem=problem, is_unreadable=True)
    problem = "" if names else f"{path} has no folder of a version, such as {os.path.join(path, '1')}"
    return Folder(name, path, config, problem, versions=names)


def model_file(folder: str, names: Collection[str], filename: str) -> str:
    """The path of a version's model.  A folder of that name has the file of the same name in it, as Triton
    has it for models of several files.

    Args:
        folder: of the version.
        names: what is in it.
        filename: ``default_model_filename``; empty: ``model.onnx``, or ``model.ort`` if only that is there.
    """
    chosen = filename or (ORT_MODEL if ORT_MODEL in names and MODEL not in names else MODEL)
    path = os.path.join(folder, chosen)
    return os.path.join(path, MODEL) if os.path.isdir(path) else path


def _config(path: str) -> str | None:
    try:
        return small_files.read(path, MOST_CONFIG).decode()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


def _folders(path: str) -> list[str]:
    with os.scandir(path) as entries:
        return [entry.name for entry, _ in zip(entries, range(_MOST_NAMES), strict=False) if entry.is_dir()]


def _names(path: str) -> tuple[str, ...]:
    with os.scandir(path) as entries:
        return tuple(sorted(entry.name for entry, _ in zip(entries, range(_MOST_NAMES), strict=False)))
