"""Files that are read again when they change, without a thread: whoever asks looks, once a second at most."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar

_T = TypeVar("_T")
_Signature = tuple[tuple[int, int, int, int, int] | None, ...]

LOOK_EVERY: Final = 1.0
"""Seconds between two looks."""
_SETTLED_NS: Final = 100_000_000
"""A file that changed less long ago may change again without another time stamp: clocks of files tick."""


class FileError(ValueError):
    """A file that cannot be used.  The text begins with its path."""


class Followed(Generic[_T]):
    """Value read from one or more files, and read again when one of them changes.

    Symbolic links are followed at each look, so a mounted Secret of Kubernetes, whose link ``..data`` is
    pointed elsewhere, is noticed.  Files that become invalid, or vanish, leave the last valid value; this is
    told once for each state of the files.  Thread-safe; one caller looks, the others use what is known.
    """

    def __init__(
        self,
        paths: tuple[str, ...],
        read: Callable[[], _T],
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Reads the files.

        ``read``: reads and checks them; raises FileError.  ``tell``: prints one line.

        Raises:
            FileError: they are not valid.
        """
        self._paths = paths
        self._read = read
        self._tell = tell
        self._clock = clock
        self._lock = threading.Lock()
        self._told = ""
        seen = self._signature()
        self._value = read()
        self._seen = self._known(seen)
        self._look_at = clock() + LOOK_EVERY

    def current(self) -> _T:
        """The value.  Never raises for what the files are."""
        if self._clock() >= self._look_at and self._lock.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._look_at = self._clock() + LOOK_EVERY
                self._lock.release()
        return self._value

    def _look(self) -> None:
        found = self._signature()
        if found == self._seen:
            return
        try:
            self._value = self._read()
            self._told = ""
        except FileError as error:
            if str(error) != self._told:  # an unsettled file is read more than once
                self._told = str(error)
                self._tell(f"{error} What was read before stays in use.")
        self._seen = self._known(found)

    def _known(self, before: _Signature) -> _Signature | None:
        """State of the files that were read; None if they may have changed meanwhile: read them again."""
        after = self._signature()
        newest = max((file[4] for file in after if file is not None), default=0)
        return after if after == before and newest < time.time_ns() - _SETTLED_NS else None

    def _signature(self) -> _Signature:
        return tuple(_file(path) for path in self._paths)


def _file(path: str) -> tuple[int, int, int, int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
