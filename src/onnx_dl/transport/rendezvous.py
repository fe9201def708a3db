"""Where the processes of one user find a shared host: a record, a lock and a log of each in one folder.

There is one host for each name and protocol version, so that programs of two versions of onnx-dl do not shut
each other out: the files of the host ``NAME`` that speaks protocol 5 are ``NAME@5.json``, ``NAME@5.lock`` and
``NAME@5.log``.  Versions before 5 had no number there.

The record says at which address the host listens and with which secret it is spoken to.  The host holds the
lock for as long as it lives, so that there is never more than one, and who holds it can be asked without
touching it.  The sockets themselves have abstract names, which have no limit of length that a path could
exceed, and of which nothing is left.  Who starts a host is :mod:`onnx_dl.client.launcher`'s; which hosts run is
:mod:`onnx_dl.transport.running_hosts`'s; what a host does is the supervisor's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import struct
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Final

import msgspec

import onnx_dl
from onnx_dl.errors import ConfigError, PlatformError
from onnx_dl.protocol.codec import PROTOCOL_VERSION
from onnx_dl.system import small_files

USUAL: Final = "default"
"""The name of the host that a user has one of."""

_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_FLOCK: Final = "hhqqi4x"
"""Linux's ``struct flock``: type, whence, start, length, process id."""
_HOST: Final = 0
"""The byte of the lock file that the host holds.  Versions before 5 hold the whole file, this byte too."""
_NEXT: Final = 1
"""The byte that a process holds which waits to be the host."""
_LARGEST: Final = 16 << 10
"""Bytes of a record; what is larger is none."""

_Word = Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{1,90}\Z")]
"""What can be in an address (a socket's name is shorter than 108 bytes) or in a secret."""


def uptime() -> float:
    """Seconds since the system was started: a clock that all processes share and that nobody sets."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """How a host is reached, and what it is."""

    address: _Word
    secret: _Word
    pid: int
    kept: bool = False
    """Somebody looks after it, a service manager perhaps: where it is gone, it will be there again."""
    protocol: int | None = None
    """The version of the protocol that it speaks; None: one before 5."""
    package: Annotated[str, msgspec.Meta(max_length=100)] = ""
    """The version of onnx-dl."""
    started: Annotated[float, msgspec.Meta(ge=0, le=1e10)] | None = None
    """When, by :func:`uptime`."""


def checked_name(name: str) -> str:
    """The name of a shared host.

    Raises:
        ValueError: (as :class:`~onnx_dl.errors.ConfigError`) it is none.
    """
    if not _NAME.fullmatch(name) or name.startswith("."):
        raise ConfigError(
            f"{name!r} is no name of a host; use letters, digits, '-', '_' and '.', at most 64 of them."
        )
    return name


class Place:
    """What the shared host of one name and protocol version has in the folder."""

    def __init__(
        self,
        name: str,
        environ: Mapping[str, str] = os.environ,
        protocol: int | None = PROTOCOL_VERSION,
        folder: Path | None = None,
    ) -> None:
        """``protocol``: None is any version before 5.  ``folder``: None: the one of this user.

        Raises:
            ValueError: (as :class:`~onnx_dl.errors.ConfigError`) it is no name.
            PlatformError: there is no folder that is the user's alone.
        """
        self.name = checked_name(name)
        self.protocol = protocol
        self.folder = folder or runtime_folder(environ)
        stem = name if protocol is None else f"{name}@{protocol}"
        self._record = self.folder / f"{stem}.json"
        self._lock = self.folder / f"{stem}.lock"
        self.log = self.folder / f"{stem}.log"
        """What a host that runs in the background writes to its stderr."""
        self.published: Record | None = None
        """What this process wrote of itself."""
        self._held = -1
        """The descriptor of the lock, which must stay open: see :meth:`holder`."""

    # --- for others ---------------------------------------------------------------------------------------

    def holder(self) -> int | None:
        """The process id of the host; None: there is none.

        Not for the host itself: with the descriptor that this closes, a process lets go of all its locks of
        the file (POSIX says so).

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

    def record(self) -> Record | None:
        """What the host wrote of itself; None: nothing yet, or nothing of use."""
        data = _content(self._record)
        record = None if data is None else small_files.decoded(data, Record)
        # By hand, or by a copy, anything may stand in a file of any name.
        return record if record is not None and record.protocol == self.protocol else None

    def published_at(self) -> float | None:
        """When the record was written, by :func:`uptime`, as far as the clock was not set since."""
        with contextlib.suppress(OSError):
            return uptime() - (time.time() - self._record.stat().st_mtime)
        return None

    # --- for the host -------------------------------------------------------------------------------------

    def claim(self) -> bool:
        """From now on this process is the host; false: another is.

        The lock is one that ends with the process and that no child inherits (fcntl, not flock).

        Raises:
            OSError: the lock file cannot be opened, or the folder's file system has no locks.
        """
        fd = self._open_lock(os.O_RDWR | os.O_CREAT)
        if not _take(fd, _HOST):
            return False
        self._held = fd
        return True

    def line_up(self) -> bool:
        """This process is to be the next host, see :meth:`await_turn`; false: another is to be it.

        The host learns of it (:meth:`awaited_by`).
        """
        fd = self._open_lock(os.O_RDWR | os.O_CREAT)
        if not _take(fd, _NEXT):
            return False
        self._held = fd
        return True

    def await_turn(self) -> None:
        """Returns when this process, which has lined up, is the host.

        The kernel gives the lock to who waits for it, so that whoever tries only is not faster.
        """
        fcntl.lockf(self._held, fcntl.LOCK_EX, 1, _HOST)
        fcntl.lockf(self._held, fcntl.LOCK_UN, 1, _NEXT)

    def awaited_by(self) -> int | None:
        """The process id of who is to be the next host.  Only for the host."""
        return _locked_by(self._held, _NEXT)

    def publish(self, address: str, secret: str, *, kept: bool) -> None:
        """Lets clients find this process.

        Raises:
            PlatformError: the record cannot be written.
        """
        self.published = Record(
            address=address,
            secret=secret,
            pid=os.getpid(),
            kept=kept,
            protocol=self.protocol,
            package=onnx_dl.__version__,
            started=uptime(),
        )
        try:
            _replace(self._record, msgspec.json.encode(self.published))
        except OSError as error:
            raise _of_no_use(self._record, error) from error

    def withdraw(self) -> None:
        """From now on there was never such a host."""
        with contextlib.suppress(OSError):
            self._record.unlink()

    def _open_lock(self, flags: int) -> int:
        try:
            return os.open(self._lock, flags | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise _of_no_use(self._lock, error) from error


def _of_no_use(path: Path, error: OSError) -> PlatformError:
    return PlatformError(
        f"A shared host needs the file {path}, which cannot be used ({error.strerror}). Remove it, or set "
        "ONNX_DL_RUNTIME_DIR to another folder with mode 0700."
    )


def _take(fd: int, byte: int) -> bool:
    """Whether this process has that byte of a lock file now; if not, ``fd`` is closed."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except OSError as error:
        os.close(fd)
        if isinstance(error, BlockingIOError | PermissionError):  # either says that another has it
            return False
        raise
    return True


def _locked_by(fd: int, byte: int) -> int | None:
    """The process that has that byte of a lock file."""
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else int(pid)


def _content(path: Path) -> bytes | None:
    """Of a file of moderate size; None of anything else.  Does not wait, as reading from a FIFO would."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                data = os.read(fd, _LARGEST + 1)
                return data if len(data) <= _LARGEST else None
        finally:
            os.close(fd)
    return None


def _replace(path: Path, data: bytes) -> None:
    """Writes a file so that whoever reads it sees all of it or nothing."""
    fd, name = tempfile.mkstemp(dir=path.parent)
    try:
        with open(fd, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


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
