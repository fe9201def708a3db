"""Reads files that a user, or another program, may have put anything into.

The one way in which a long-lived process of ours reads such a file: never more than it says, and never from
what one would wait for, such as a FIFO or a terminal.  What the content means is the caller's.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO, TypeVar

import msgspec

_T = TypeVar("_T")


def opened(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file, to be read.

    Raises:
        OSError: there is none, it is no regular file, or it cannot be read; ``strerror`` says which.
    """
    try:
        # Before it is opened: to open a device may already do something.
        _check_regular(os.stat(path))
        # Something else may have come in its place since; without O_NONBLOCK, to open a FIFO would wait.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except ValueError as error:  # the path has a NUL
        raise FileNotFoundError(errno.ENOENT, str(error), os.fspath(path)) from None
    file = open(fd, "rb")  # noqa: SIM115 - is the caller's to close
    try:
        _check_regular(os.fstat(fd))
    except OSError:
        file.close()
        raise
    return file


def head(path: str | os.PathLike[str], most: int) -> bytes:
    """The first bytes of a regular file, ``most`` of them at most.

    Raises:
        OSError: as for :func:`opened`.
    """
    with opened(path) as file:
        return file.read(most)


def read(path: str | os.PathLike[str], most: int) -> bytes:
    """A whole regular file of ``most`` bytes or fewer.

    Raises:
        OSError: as for :func:`head`, or it is larger.
    """
    data = head(path, most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes")
    return data


def decoded(data: bytes | msgspec.Raw, kind: type[_T]) -> _T | None:
    """JSON of this kind; None: it is something else, in whatever way."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError):  # text has errors of its own, a ValueError
        return None


def _check_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no file")
