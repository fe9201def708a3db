"""Opens the shared memory that a client names by its key: a file in the system's folder for it.

A key is text of a client.  It may name anything, so that a file is opened only if it cannot be more than
shared memory of this server's own user: no link, no device or pipe (to open or read one may wait), no file in
another folder, and no file that is mounted from another file system.
"""

from __future__ import annotations

import os
import stat
from typing import Final

from onnx_dl.server.v2.failures import RequestFailure, invalid

FOLDER: Final = "/dev/shm"
"""POSIX names of shared memory are names of files in this folder (shm_overview(7))."""
_LONGEST: Final = 255
"""Bytes of a name (NAME_MAX)."""
_FLAGS: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def name_of(key: str) -> str:
    """The name of the file for a key such as ``/name`` or ``name``.  Pure.

    Raises:
        RequestFailure: 400: it names no file in the folder.
    """
    name = key.removeprefix("/")
    if (
        name in ("", ".", "..")
        or "/" in name
        or "\0" in name
        or len(name.encode(errors="replace")) > _LONGEST
    ):
        raise invalid(
            f"invalid shm key {key[:_LONGEST]!r}: it is no name of POSIX shared memory, like '/name'"
        )
    return name


def open_key(key: str, nbytes: int, folder: str = FOLDER) -> int:
    """Opens shared memory for reading and writing; returns the descriptor, which the caller closes.

    Args:
        nbytes: the size that it must have at least.

    Raises:
        RequestFailure: 400: there is none of that size, or it is not this user's.
    """
    path = f"{folder}/{name_of(key)}"
    try:
        fd = os.open(path, _FLAGS)
    except (OSError, ValueError) as error:  # ValueError: surrogates in the name
        raise _refused(key, getattr(error, "strerror", None) or "it is no name") from None
    try:
        _check(key, os.fstat(fd), os.stat(folder).st_dev, nbytes)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check(key: str, found: os.stat_result, device: int, nbytes: int) -> None:
    if not stat.S_ISREG(found.st_mode) or found.st_dev != device:
        raise _refused(key, "it is not a file of shared memory")
    if found.st_uid != os.geteuid():
        raise _refused(key, "it belongs to another user")
    if found.st_size < nbytes:
        raise invalid(f"Invalid shared memory region: {key!r}: it has {found.st_size} bytes, not {nbytes}")


def _refused(key: str, reason: str) -> RequestFailure:
    return invalid(f"Unable to open shared memory region: {key!r}: {reason}")
