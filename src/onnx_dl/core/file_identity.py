"""Identities of the files that a model was read from, to notice changes.

A worker records each file's identity before and after it reads it.  Before that worker, or an entry of the
load cache, is used again, the files are compared, by the path that the model would open: a link that points
to another file is a change.  No function here raises because of a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import msgspec

Identity = tuple[int, int, int, int]


class ReadFile(msgspec.Struct, frozen=True, array_like=True):
    """One file.  ``name``: relative to the model's folder, or absolute; empty: the model itself.

    ``identity``: device, inode, bytes and mtime in ns; None: there was no file.
    """

    name: str
    identity: tuple[int, int, int, int] | None


Where = Callable[[str], str]
"""Maps the name of a file to its path."""


def look(path: str) -> Identity | None:
    """The identity of the file at this path, after links; None: there is none, or it cannot be seen."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def look_at(where: Where, names: Iterable[str]) -> list[ReadFile]:
    """The present identities of these files."""
    return [ReadFile(name, look(where(name))) for name in names]


def changed(where: Where, read: Iterable[ReadFile]) -> str | None:
    """The path of the first file that has changed since; None: none has."""
    return next((where(file.name) for file in read if look(where(file.name)) != file.identity), None)
