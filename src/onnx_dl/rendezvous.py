"""Where the processes of one user find a shared host: for each host a record, a lock and a log in one folder.

The record says at which address the host listens and with which secret it is spoken to; the lock is held by
the host for as long as it lives, so that there is never more than one of a name, and who holds it can be
asked without touching it.  The sockets themselves have abstract names, which no path is too long for and of
which nothing is left.  Who starts a host is :mod:`onnx_dl.starting`; what it does is the supervisor's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from onnx_dl.errors import ConfigError, PlatformError

USUAL: Final = "default"
"""The name of the host that a user has one of."""

_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_FLOCK: Final = "hhqqi4x"
"""Linux's ``struct flock``: type, whence, start, length, process id."""


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """How a host is reached."""

    address: str
    secret: str
    pid: int
    kept: bool = False
    """Somebody looks after it, a service manager perhaps: where it is gone, it will be there again."""


class Place:
    """What a shared host of this name has in the folder."""

    def __init__(self, name: str, environ: Mapping[str, str] = os.environ) -> None:
        """
        Raises:
            ValueError: (as :class:`~onnx_dl.errors.ConfigError`) it is no name.
            PlatformError: there is no folder that is the user's alone.
        """
        if not _NAME.fullmatch(name) or name.startswith("."):
            raise ConfigError(
                f"{name!r} is no name of a host; use letters, digits, '-', '_' and '.', at most 64 of them."
            )
        self.name = name
        folder = runtime_folder(environ)
        self._record = folder / f"{name}.json"
        self._lock = folder / f"{name}.lock"
        self.log = folder / f"{name}.log"
        """What a host that runs in the background writes to its stderr."""

    # --- for clients --------------------------------------------------------------------------------------

    def holder(self) -> int | None:
        """The process id of the host of this name; None: there is none."""
        try:
            fd = os.open(self._lock, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, asked))
        finally:
            os.close(fd)
        return None if kind == fcntl.F_UNLCK else int(pid)

    def record(self) -> Record | None:
        """What the host wrote of itself; None: nothing yet, or nothing of use."""
        try:
            return msgspec.json.decode(self._record.read_bytes(), type=Record)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    # --- for the host -------------------------------------------------------------------------------------

    def claim(self) -> bool:
        """From now on this process is the host of this name; false: another is.

        The lock is one that ends with the process and that no child inherits (fcntl, not flock).
        """
        fd = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if isinstance(error, BlockingIOError | PermissionError):  # either says that another has it
                return False
            raise
        return True

    def publish(self, address: str, secret: str, *, kept: bool) -> None:
        """Lets clients find this process."""
        record = Record(address=address, secret=secret, pid=os.getpid(), kept=kept)
        fd, name = tempfile.mkstemp(dir=self._record.parent)
        with open(fd, "wb") as file:
            file.write(msgspec.json.encode(record))
        os.replace(name, self._record)

    def withdraw(self) -> None:
        """From now on there was never a host of this name."""
        with contextlib.suppress(OSError):
            self._record.unlink()


def runtime_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """A folder of this user alone, made if need be: ``ONNX_DL_RUNTIME_DIR``, or else ``onnx-dl`` in the
    user's runtime folder, or else one in a folder for temporary files.

    Raises:
        PlatformError: there is none, or it is open to others.
    """
    refused = []
    for path in _candidates(environ):
        try:
            return _private(path)
        except OSError as error:
            refused.append(f"{path}: {error.strerror}")
    raise PlatformError(
        f"A shared host needs a folder of this user alone ({'; '.join(refused)}). "
        "Set ONNX_DL_RUNTIME_DIR to one with mode 0700."
    )


def _candidates(environ: Mapping[str, str]) -> Iterator[Path]:
    if given := environ.get("ONNX_DL_RUNTIME_DIR"):
        yield Path(given)
        return
    # cron and su have no XDG_RUNTIME_DIR, but shall find what a login started.
    for folder in (environ.get("XDG_RUNTIME_DIR"), f"/run/user/{os.getuid()}"):
        # su may leave it that of another user, who would then be shut out of what root made there.
        if folder and os.path.isdir(folder) and os.stat(folder).st_uid == os.getuid():
            yield Path(folder) / "onnx-dl"
    for folder in (environ.get("TMPDIR"), "/tmp", "/var/tmp", "/dev/shm"):
        if folder:
            yield Path(folder) / f"onnx-dl-{os.getuid()}"


def _private(path: Path) -> Path:
    if not path.is_absolute():  # it would be another one for each process, and for the host in any case
        raise FileNotFoundError(0, "is not an absolute path")
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()  # not what a link of somebody else's points to
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(0, "is not a folder of this user")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(0, "is open to other users (chmod 700 closes it)")
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(0, "cannot be written to")
    return path
