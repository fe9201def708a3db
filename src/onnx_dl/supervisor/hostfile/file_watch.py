"""Reports changes of one file's content, by inotify: without a thread, and without polling.

docs/architecture.md says why no library does this.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from onnx_dl import linux_only
from onnx_dl.supervisor.boundary import report
from onnx_dl.system import small_files

_libc: Final = linux_only.libc()
# From <sys/inotify.h>.  Writing counts only when the file is closed: a half-written file is not read.
_CLOSE_WRITE: Final = 0x008
_MOVED_TO: Final = 0x080
_CREATE: Final = 0x100
_DELETE_SELF: Final = 0x400
_MOVE_SELF: Final = 0x800
_MASK: Final = _CLOSE_WRITE | _MOVED_TO | _CREATE | _DELETE_SELF | _MOVE_SELF
_OVERFLOW: Final = -1
"""Stands for a watch: the kernel dropped events because its queue was full."""
_HEADER: Final = struct.Struct("iIII")
_CHUNK: Final = 1 << 16
_MOST_LINKS: Final = 40
"""Symbolic links in one path, as many as the kernel follows."""
_TRIES: Final = 100
_MOST_BYTES: Final = (1 << 20) + 1
"""Bytes that are compared: one more than a valid file may have."""


class _Folder(NamedTuple):
    path: str
    names: set[str]
    """Entries in it that decide which file is meant."""


class FileWatch:
    """Watches the folders on the way to one file.

    So it notices a file renamed over it, and a symbolic link on the way that is pointed elsewhere, as in a
    mounted ConfigMap.  Make it before the file is first read: then no change is missed in between.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Watches the file; if the system refuses inotify, says so on stderr and watches nothing."""
        self._path = os.path.abspath(path)
        self._folders: dict[int, _Folder] = {}
        """Folders by watch."""
        self._fd: int | None = None
        try:
            self._fd = _checked(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
            self._watch(self._fd)
        except OSError as error:
            self._give_up(error)
        self._content = self._read()

    def fileno(self) -> int | None:
        """Descriptor that is readable when :meth:`changed` is to be called; None: nothing is watched."""
        return self._fd

    def changed(self, *, anyway: bool = False) -> bool:
        """True if the content differs from the last one that was read; a missing file has not changed.

        ``anyway``: compare even if there was no event; for a caller that reads the file on request, too.
        """
        has_event = self._fd is None or self._take_events(self._fd)
        content = self._read() if has_event or anyway else None
        if content is None or content == self._content:
            return False
        self._content = content
        return True

    def close(self) -> None:
        """Stops watching.  May be called twice."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _read(self) -> bytes | None:
        try:
            return small_files.head(self._path, _MOST_BYTES)
        except OSError:
            return None

    def _take_events(self, fd: int) -> bool:
        """Reads all events; true: one may concern the file.  Then other folders may have to be watched."""
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
        if folder is None or not name:  # an event without a name is about the folder itself
            return folder is not None or watch == _OVERFLOW
        return name in folder.names and not (mask & _CREATE and _is_new(os.path.join(folder.path, name)))

    def _watch(self, fd: int) -> None:
        """Watches the folders on the way; repeats until the way was the same before and after."""
        watched: list[tuple[str, str]] | None = None
        for _ in range(_TRIES):
            entries = list(_entries_on_the_way(self._path))
            if entries == watched:
                return
            watched = entries if self._add(fd, entries) else None
        raise OSError(errno.ELOOP, "its folders keep changing")

    def _add(self, fd: int, entries: list[tuple[str, str]]) -> bool:
        folders: dict[int, _Folder] = {}
        for path, name in entries:
            try:
                watch = _checked(_libc.inotify_add_watch(fd, os.fsencode(path), _MASK))
            except (FileNotFoundError, NotADirectoryError):  # it was removed in this moment
                return False
            folders.setdefault(watch, _Folder(path, set())).names.add(name)
        for watch in self._folders.keys() - folders.keys():
            _libc.inotify_rm_watch(fd, watch)  # fails if the folder is gone, and its watch with it
        self._folders = folders
        return True

    def _give_up(self, error: OSError) -> None:
        self.close()
        report(
            f"changes of {self._path} are not noticed: {error.strerror}. "
            "Send SIGHUP to make the host read it."
        )


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _events(fd: int) -> Iterator[tuple[int, int, str]]:
    """All events that wait: watch, mask, name within the folder."""
    with contextlib.suppress(BlockingIOError):
        while True:
            data = os.read(fd, _CHUNK)
            at = 0
            while at < len(data):
                watch, mask, _, size = _HEADER.unpack_from(data, at)
                at += _HEADER.size + size
                yield watch, mask, os.fsdecode(data[at - size : at].rstrip(b"\0"))


def _is_new(path: str) -> bool:
    """True if a created entry is a file that is still to be written; closing it is an event of its own."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def _entries_on_the_way(path: str) -> Iterator[tuple[str, str]]:
    """Folder and name of each symbolic link on the way to a file, then of the file or first missing entry."""
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
        elif rest and os.path.isdir(step):  # a folder in place of the file may be replaced again
            at = step
        else:
            yield at, name
            return
