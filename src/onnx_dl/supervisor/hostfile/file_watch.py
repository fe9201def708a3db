"""Says when a file's content has changed: inotify, without a thread and without looking again and again.

What the content means is not known here.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
import sys
from collections.abc import Iterator
from typing import Final, NamedTuple

from onnx_dl.system import small_files

_libc: Final = ctypes.CDLL(None, use_errno=True)
# From <sys/inotify.h>.  Of a file that is written only the end counts: what is half written is not looked at.
_CLOSE_WRITE: Final = 0x008
_MOVED_TO: Final = 0x080
_CREATE: Final = 0x100
_DELETE_SELF: Final = 0x400
_MOVE_SELF: Final = 0x800
_MASK: Final = _CLOSE_WRITE | _MOVED_TO | _CREATE | _DELETE_SELF | _MOVE_SELF
_LOST: Final = -1
"""In place of a watch: the kernel had more events than it keeps."""
_HEADER: Final = struct.Struct("iIII")
_CHUNK: Final = 1 << 16
_MOST_LINKS: Final = 40
"""As many as the kernel follows."""
_TRIES: Final = 100
_MOST_BYTES: Final = (1 << 20) + 1
"""That are compared: one more than a file may have that is of any use."""


class _Folder(NamedTuple):
    path: str
    names: set[str]
    """What in it decides which file is meant."""


class FileWatch:
    """One file, through its folder: a file that is renamed over it is seen, too.  So is a symbolic link on
    the way to it that is pointed elsewhere, as in a mounted ConfigMap.

    Make it before the file is first read: then no change is missed in between.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Where the system grants no inotify, stderr says so, and nothing is watched."""
        self._path = os.path.abspath(path)
        self._folders: dict[int, _Folder] = {}
        self._fd: int | None = None
        try:
            self._fd = _checked(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
            self._watch(self._fd)
        except OSError as error:
            self._give_up(error)
        self._content = self._read()

    def fileno(self) -> int | None:
        """Readable when :meth:`changed` is to be asked; None, from now on or already: nothing is watched."""
        return self._fd

    def changed(self, *, anyway: bool = False) -> bool:
        """Whether the content differs from what was last found.

        A file that is gone or cannot be read has not changed: it is compared when it is back.

        ``anyway``: look even if there was no event; for whoever reads the file on request, too.
        """
        told = self._fd is None or self._heed(self._fd)
        content = self._read() if told or anyway else None
        if content is None or content == self._content:
            return False
        self._content = content
        return True

    def close(self) -> None:
        """Watches no more.  May be called twice."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _read(self) -> bytes | None:
        try:
            return small_files.head(self._path, _MOST_BYTES)
        except OSError:
            return None

    def _heed(self, fd: int) -> bool:
        """Takes in all events; whether any may be about the file.  After such a one others may count."""
        concerned = False
        try:
            while any(self._concerns(*event) for event in list(_events(fd))):
                concerned = True
                self._watch(fd)
        except OSError as error:
            self._give_up(error)
        return concerned

    def _concerns(self, watch: int, mask: int, name: str) -> bool:
        folder = self._folders.get(watch)
        if folder is None or not name:  # without a name it is about the folder itself
            return folder is not None or watch == _LOST
        return name in folder.names and not (mask & _CREATE and _is_begun(os.path.join(folder.path, name)))

    def _watch(self, fd: int) -> None:
        """Watches where it counts.  Looks once more afterwards, because it may count elsewhere meanwhile."""
        watched: list[tuple[str, str]] | None = None
        for _ in range(_TRIES):
            places = list(_places(self._path))
            if places == watched:
                return
            watched = places if self._add(fd, places) else None
        raise OSError(errno.ELOOP, "its folders keep changing")

    def _add(self, fd: int, places: list[tuple[str, str]]) -> bool:
        folders: dict[int, _Folder] = {}
        for path, name in places:
            try:
                watch = _checked(_libc.inotify_add_watch(fd, os.fsencode(path), _MASK))
            except (FileNotFoundError, NotADirectoryError):  # it was there a moment ago
                return False
            folders.setdefault(watch, _Folder(path, set())).names.add(name)
        for watch in self._folders.keys() - folders.keys():
            _libc.inotify_rm_watch(fd, watch)  # fails if the folder is gone, and the watch with it
        self._folders = folders
        return True

    def _give_up(self, error: OSError) -> None:
        self.close()
        print(
            f"onnx-dl: changes of {self._path} go unnoticed: {error.strerror}. Send SIGHUP to have it read.",
            file=sys.stderr,
            flush=True,
        )


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _events(fd: int) -> Iterator[tuple[int, int, str]]:
    """All that wait: watch, mask, name within the folder."""
    with contextlib.suppress(BlockingIOError):
        while True:
            data = os.read(fd, _CHUNK)
            at = 0
            while at < len(data):
                watch, mask, _, size = _HEADER.unpack_from(data, at)
                at += _HEADER.size + size
                yield watch, mask, os.fsdecode(data[at - size : at].rstrip(b"\0"))


def _is_begun(path: str) -> bool:
    """Whether a file that was just made is still to be written; the end of that is an event of its own."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def _places(path: str) -> Iterator[tuple[str, str]]:
    """Folder and name of each symbolic link on the way to a file, and at last of the file itself, or of the
    first thing on the way that is not there."""
    rest = path.split("/")[::-1]
    at, links = "/", 0
    while rest:
        name = rest.pop()
        step = os.path.normpath(os.path.join(at, name))
        if links < _MOST_LINKS and os.path.islink(step):
            yield at, name
            links += 1
            target = os.readlink(step)
            rest += target.split("/")[::-1]
            at = "/" if target.startswith("/") else at
        elif rest and os.path.isdir(step):  # a folder in place of the file may go again
            at = step
        else:
            yield at, name
            return
