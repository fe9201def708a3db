"""Reads files of users and other programs, replaces files that other processes read, and writes to pipes and
terminals that nobody may read.

Files may have any content: the number of bytes read is limited, and a FIFO or a terminal blocks nobody.
Writes go to a thread of their own, so that a stopped reader blocks nothing else: a supervisor's own lines
(:mod:`onnx_dl.supervisor.outlet`), in an application those of its workers
(:mod:`onnx_dl.client.worker_output`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import select
import stat
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

import msgspec

from onnx_dl import linux_only
from onnx_dl.concurrency import waits
from onnx_dl.system import owned_descriptors

_T = TypeVar("_T")

_FLAGS: Final = linux_only.flags(os, "O_RDONLY", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY")
MOST_UNWRITTEN: Final = 1 << 20
"""Bytes that may wait to be written; more is dropped, and reported."""


def opened(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file to read.

    Raises:
        OSError: it does not exist, is not a regular file, or cannot be read; ``strerror`` says which.
    """
    try:
        # Checked before it is opened, because opening a device may have effects.
        _check_regular(os.stat(path))
        # It may have been replaced since; without O_NONBLOCK, opening a FIFO would block.
        fd = os.open(path, _FLAGS)
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
    """The first ``most`` bytes of a regular file, or fewer.  Raises OSError, as :func:`opened` does."""
    with opened(path) as file:
        return file.read(most)


def read(path: str | os.PathLike[str], most: int) -> bytes:
    """A whole regular file.  Raises OSError, as :func:`opened` does, also for more than ``most`` bytes."""
    data = head(path, most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most} bytes")
    return data


def replace(path: Path, data: bytes) -> None:
    """Writes a file that only this user may read, atomically: readers see the old content or all of the new.

    Whatever is there is replaced and not written to: writing to a FIFO would block.  Raises OSError.
    """
    unfinished = path.with_name(f".{path.name}-{secrets.token_hex(8)}")  # not by tempfile: it costs 0.7 MB
    fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(data)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def decoded(data: bytes | msgspec.Raw, kind: type[_T]) -> _T | None:
    """JSON decoded as this type; None: it is not valid."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError):  # invalid UTF-8 is a ValueError
        return None


def _check_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no file")


def dropped(nbytes: int) -> bytes:
    """The line that reports dropped bytes."""
    return f"onnx-dl: {nbytes} bytes were not written, because nothing reads this\n".encode()


def write(fd: int, data: bytes) -> None:
    """Writes all bytes, or stops if the reader is gone.

    Writes nothing to a descriptor of onnx-dl: the program may have closed the one that had this number.
    """
    with contextlib.suppress(OSError, ValueError):
        while data and not owned_descriptors.is_ours(fd):
            try:
                data = data[os.write(fd, data) :]
            except BlockingIOError:  # made non-blocking by the program, or by another that shares it
                waits.ready(fd, select.POLLOUT, None)
