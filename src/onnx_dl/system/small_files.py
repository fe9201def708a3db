"""Reads files of users and other programs, whose content may be anything.

Limits the number of bytes, and never blocks, as reading from a FIFO or a terminal would.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO, TypeVar

import msgspec

_T = TypeVar("_T")


def opened(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file to read.

    Raises:
        OSError: it does not exist, is not a regular file, or cannot be read; ``strerror`` says which.
    """
    try:
        # Checked before it is opened, because opening a device may have effects.
        _check_regular(os.stat(path))
        # It may have been replaced since; without O_NONBLOCK, opening a FIFO would block.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except ValueError as error:  # the path has a NUL
        raise FileNotFoundError(errno.ENOENT, str(error), os.fspath(path)) from None
    file = open(fd, "rb")  # noqa: SIM115 - the caller closes it
    try:
        _check_regular(os.fstat(fd))
    except OSError:
        file.close()
        raise
    return file


def head(path: str | os.PathLike[str], most: int) -> bytes:
    """The first ``most`` bytes of a regular file, or fewer.

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
    """JSON decoded as this type; None: it is not valid."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError):  # invalid UTF-8 is a ValueError
        return None


def _check_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no file")
