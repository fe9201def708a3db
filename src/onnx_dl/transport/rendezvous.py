"""The files by which processes find a shared host: record, lock and log, in one folder of the user.

There is one host per name and protocol version, so that programs with two versions of onnx-dl do not block
each other.  The files of host ``NAME`` with protocol 5 are ``NAME@5.json``, ``NAME@5.lock`` and
``NAME@5.log``.  Protocols before 5 have no number in their file names.

The record has the host's address and secret.  The host holds the lock as long as it lives.  So there is never
more than one host, and its process id can be read from the lock without affecting it.  The sockets have
abstract names: these are not limited in length by a path, and leave no files behind.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Final

import msgspec

from onnx_dl.core.version import __version__
from onnx_dl.errors import ConfigError, PlatformError
from onnx_dl.linux_only import fcntl
from onnx_dl.protocol.codec import PROTOCOL_VERSION
from onnx_dl.system import resources, small_files

_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_FLOCK: Final = "hhqqi4x"
"""Linux's ``struct flock``: type, whence, start, length, process id."""
_HOST: Final = 0
"""Byte of the lock file that the host locks.  Protocols before 5 lock the whole file, with this byte."""
_NEXT: Final = 1
"""Byte of the lock file that is locked by the process that waits to be the next host."""
_LARGEST: Final = 16 << 10
"""Largest size of a record in bytes; a larger file is not a record."""

_Word = Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{1,90}\Z")]
"""Text of an address or a secret.  The name of a socket is shorter than 108 bytes."""


def uptime() -> float:
    """Seconds since the system was booted: a clock that all processes share and that cannot be set."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class HostRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Content of the JSON file of a host."""

    address: _Word
    secret: _Word
    pid: int
    managed: bool = msgspec.field(default=False, name="kept")
    """``onnx-dl supervise`` runs it, so a user or a service manager starts it again when it ends."""
    protocol: int | None = None
    """Its protocol version; None: one before 5."""
    package: Annotated[str, msgspec.Meta(max_length=100)] = ""
    """Its version of onnx-dl."""
    started: Annotated[float, msgspec.Meta(ge=0, le=1e10)] | None = None
    """Its start time, by :func:`uptime`."""


def checked_name(name: str) -> str:
    """Return the name of a shared host.  Raises ConfigError, a ValueError, if it is not valid."""
    if not _NAME.fullmatch(name) or name.startswith("."):
        raise ConfigError(
            f"{name!r} is not a host name; use letters, digits, '-', '_' and '.', at most 64 of them."
        )
    return name


class HostEntry:
    """The files of the shared host of one name and protocol version."""

    def __init__(
        self,
        name: str,
        environ: Mapping[str, str] = os.environ,
        protocol: int | None = PROTOCOL_VERSION,
        folder: Path | None = None,
    ) -> None:
        """``protocol``: None: any version before 5.  ``folder``: None: :func:`runtime_folder`.

        Raises:
            ConfigError: (a ValueError) the name is not valid.
            PlatformError: no folder belongs to this user alone.
        """
        self.name = checked_name(name)
        self.protocol = protocol
        self.folder = folder or runtime_folder(environ)
        stem = name if protocol is None else f"{name}@{protocol}"
        self._record = self.folder / f"{stem}.json"
        self._lock = self.folder / f"{stem}.lock"
        self.log = self.folder / f"{stem}.log"
        """Stderr of a host that runs in the background."""
        self.published: HostRecord | None = None
        """The record that this process wrote."""
        self._held = -1
        """Descriptor of the lock file.  It must stay open: see :meth:`holder`."""

    # --- for others ---------------------------------------------------------------------------------------

    def holder(self) -> int | None:
        """The process id of the host; None: no host runs.

        Must not be called by the host itself: when a process closes any descriptor of a file, POSIX releases
        all its locks of that file.

        Raises:
            PlatformError: the lock file cannot be opened.
        """
        try:
            fd = self._open_lock(os.O_RDWR)
        except FileNotFoundError:
            return None
        try:
            return _locked_by(fd, _HOST)
        finally:
            os.close(fd)

    def record(self) -> HostRecord | None:
        """The record of the host; None: there is none yet, or it is not valid."""
        try:
            record = small_files.decoded(small_files.read(self._record, _LARGEST), HostRecord)
        except OSError:
            return None
        # A file may have been copied or edited: its content may be that of another version.
        return record if record is not None and record.protocol == self.protocol else None

    def published_at(self) -> float | None:
        """Time of the record's file, by :func:`uptime`.  Wrong if the system clock was set since then."""
        with contextlib.suppress(OSError):
            return uptime() - (time.time() - self._record.stat().st_mtime)
        return None

    # --- for the host -------------------------------------------------------------------------------------

    def claim(self) -> bool:
        """Makes this process the host; false: another process is.

        The lock is of fcntl, not of flock: it ends with the process, and children do not inherit it.

        Raises:
            OSError: the lock file cannot be opened, or the folder's file system has no locks.
        """
        return self._claim(_HOST)

    def claim_next(self) -> bool:
        """Makes this process the next host, see :meth:`await_turn`; false: another process is.  The present
        host sees it in :meth:`next_pid`."""
        return self._claim(_NEXT)

    def _claim(self, byte: int) -> bool:
        """Locks this byte of the lock file; false: another process has locked it."""
        fd = self._open_lock(os.O_RDWR | os.O_CREAT)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError as error:
            os.close(fd)
            if isinstance(error, BlockingIOError | PermissionError):
                return False
            raise
        self._held = fd
        return True

    def await_turn(self) -> None:
        """Waits until this process, after :meth:`claim_next`, is the host.  The kernel gives the lock to a
        process that waits for it before one that only tries to take it."""
        fcntl.lockf(self._held, fcntl.LOCK_EX, 1, _HOST)
        fcntl.lockf(self._held, fcntl.LOCK_UN, 1, _NEXT)

    def next_pid(self) -> int | None:
        """The process that waits to be the next host.  Only for the host itself."""
        return _locked_by(self._held, _NEXT)

    def publish(self, address: str, secret: str, *, managed: bool) -> None:
        """Writes the record, by which clients find this process.  Raises PlatformError if it cannot."""
        self.published = HostRecord(
            address=address,
            secret=secret,
            pid=os.getpid(),
            managed=managed,
            protocol=self.protocol,
            package=__version__,
            started=uptime(),
        )
        try:
            small_files.replace(self._record, msgspec.json.encode(self.published))
        except OSError as error:
            raise _unusable(self._record, error) from error

    def withdraw(self) -> None:
        """Removes the record, so that clients do not wait for this host to come back."""
        with contextlib.suppress(OSError):
            self._record.unlink()

    def _open_lock(self, flags: int) -> int:
        try:
            return os.open(self._lock, flags | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _unusable(self._lock, error) from error


def _unusable(path: Path, error: OSError) -> PlatformError:
    return PlatformError(
        f"A shared host needs the file {path}, which cannot be used ({error.strerror}). Remove it, or set "
        "ONNX_DL_RUNTIME_DIR to another folder with mode 0700."
    )


def _locked_by(fd: int, byte: int) -> int | None:
    """The process that has locked this byte of a lock file."""
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else int(pid)


def runtime_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """A folder that only this user can open; made if it does not exist.

    It is ``ONNX_DL_RUNTIME_DIR`` if that is set, else ``onnx-dl`` in the user's runtime folder, else a folder
    for temporary files.

    Raises:
        PlatformError: there is none, other users can open it, or this system has no worker processes.
    """
    resources.check_platform()
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
    # cron and su have no XDG_RUNTIME_DIR, but must find the hosts that a login started.
    for folder in (environ.get("XDG_RUNTIME_DIR"), f"/run/user/{os.getuid()}"):
        # Under su it may be another user's: a folder that root makes there would lock that user out.
        if folder and os.path.isdir(folder) and os.stat(folder).st_uid == os.getuid():
            yield Path(folder) / "onnx-dl"
    for folder in (environ.get("TMPDIR"), "/tmp", "/var/tmp", "/dev/shm"):
        if folder:
            yield Path(folder) / f"onnx-dl-{os.getuid()}"


def _private(path: Path) -> Path:
    if not path.is_absolute():  # it would mean another folder for each process
        raise FileNotFoundError(0, "is not an absolute path")
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()  # lstat: do not follow a link that another user may have made
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(0, "is not a folder of this user")
    if stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(0, "is open to other users (chmod 700 closes it)")
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(0, "cannot be written to")
    return path
