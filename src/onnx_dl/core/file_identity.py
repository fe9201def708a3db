"""The files that a model was read from, and whether they are still the same.

A worker looks at each before and after it has read it and reports what was there.  Whoever is to use that
worker, or what is in the load cache, looks again, under the path by which the model would look: a link that
was set to another file is another file.  Looks only, and never raises because of a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import msgspec

Identity = tuple[int, int, int, int]


class ReadFile(msgspec.Struct, frozen=True, array_like=True):
    """One file.  ``name``: where it is looked for, beside the model or absolute; empty: the model's own.

    ``identity``: device, inode, bytes and mtime in ns of what was there; None: nothing was.
    """

    name: str
    identity: tuple[int, int, int, int] | None


Where = Callable[[str], str]
"""The path at which a file of this name is looked for."""


def look(path: str) -> Identity | None:
    """What is there now, links followed: device, inode, bytes, mtime in ns.  None: nothing that is seen."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def look_at(where: Where, names: Iterable[str]) -> list[ReadFile]:
    """Each of these files as it is now."""
    return [ReadFile(name, look(where(name))) for name in names]


def changed(where: Where, read: Iterable[ReadFile]) -> str | None:
    """The path of the first of these files that is not what was read; None: all are."""
    return next((where(file.name) for file in read if look(where(file.name)) != file.identity), None)
