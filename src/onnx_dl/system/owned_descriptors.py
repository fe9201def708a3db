"""Descriptors with one owner each, that closes them once and only while they are still the same files.

A program may close every descriptor that it has (``os.closerange``, daemons) and open files of its own, which
then have our numbers.  So a number is checked before it is used, by two marks: the file's identity
(``st_dev``, ``st_ino``), and the signal of ``F_SETSIG``, a number that the kernel keeps with an open file and
that nobody else uses; nothing ever sends it.  Reading that takes a quarter of a microsecond.  All eventfds
have one identity, so only the signal tells them apart.

The moment between the check and the use is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import weakref
from typing import ClassVar, Final

from onnx_dl.concurrency import primitives
from onnx_dl.linux_only import linux_fcntl, register_at_fork

_SET_MARK: Final = 10
_GET_MARK: Final = 11
"""F_SETSIG and F_GETSIG of Linux; not every build of Python has names for them."""
_MARKS: Final = itertools.cycle(range(35, 65))
"""Signals that neither libc nor Python uses, in turn, because a new file may get an old number of ours."""
_NONE: Final = -1

_get: Final = linux_fcntl


class Descriptor:
    """An open file, closed at the end of this object."""

    __slots__ = ("__weakref__", "_identity", "_mark", "_numbers", "_pid", "_was_lost")

    def __init__(self, fd: int) -> None:
        """Takes over ``fd``; raises OSError if that is not open."""
        self._numbers: list[int] = []  # of one, or of none: pop() takes it out in one step
        self._identity = _identity(fd)
        self._pid = os.getpid()
        self._was_lost = False
        self._mark = _marked(fd)
        self._numbers.append(fd)
        self._living[id(self)] = weakref.ref(self)

    @property
    def number(self) -> int:
        """The descriptor; -1: it was closed or taken."""
        numbers = self._numbers
        return numbers[0] if numbers else -1

    def holds(self) -> bool:
        """True if the number is still that of this file, by a quick check."""
        try:
            if _get(self._numbers[0], _GET_MARK) == self._mark:
                return True
        except (IndexError, OSError):
            pass
        return self._mark == _NONE and self._is_at(self.number)

    def _is_at(self, number: int) -> bool:
        try:
            marked = self._mark == _NONE or _get(number, _GET_MARK) == self._mark
            return marked and _identity(number) == self._identity
        except OSError:
            return False

    @property
    def is_lost(self) -> bool:
        """True if it was not closed by its owner: the program closed it, or this is a forked child."""
        return self._was_lost or (bool(self._numbers) and not self.holds())

    def duplicate(self) -> int | None:
        """A duplicate, for the caller to close; None: this is closed.  Raises OSError: no number is free."""
        if not self.holds():
            return None
        try:
            fd = os.dup(self.number)
        except OSError as error:
            if error.errno == errno.EBADF:  # another thread closed it since the check
                return None
            raise
        if _identity(fd) == self._identity:  # checked now: nobody else can close this one
            return fd
        primitives.close(fd)
        return None

    def take(self) -> int | None:
        """Takes the number out in one step, for the caller to close; None: it is gone, or no longer ours."""
        try:
            number = self._numbers.pop()
        except IndexError:
            return None
        if os.getpid() == self._pid and self._is_at(number):
            return number
        self._was_lost = True
        return None

    def close(self) -> None:
        """May be called twice, and from any thread."""
        if (number := self.take()) is not None:
            primitives.close(number)

    def close_in_child(self) -> None:
        """Closes it in a forked child, at once: later the number may be another file's."""
        self._pid = os.getpid()
        self.close()
        self._was_lost = True

    def __del__(self) -> None:
        self._living.pop(id(self), None)
        if hasattr(self, "_mark"):
            self.close()

    _living: ClassVar[dict[int, weakref.ref[Descriptor]]] = {}


def are_held(first: Descriptor, second: Descriptor) -> bool:
    """True if both numbers are still those of their files: :meth:`Descriptor.holds` of both in one step."""
    try:
        if (
            _get(first._numbers[0], _GET_MARK) == first._mark
            and _get(second._numbers[0], _GET_MARK) == second._mark
        ):
            return True
    except (IndexError, OSError):  # it is closed, or there are no marks here
        pass
    return first.holds() and second.holds()


def _identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def _marked(fd: int) -> int:
    """The file's mark, set if it has none; another process of ours checks its own mark, too."""
    with contextlib.suppress(OSError):  # a sandbox may forbid it: then the identity alone is checked
        if not (mark := _get(fd, _GET_MARK)):
            mark = next(_MARKS)
            _get(fd, _SET_MARK, mark)
        return mark
    return _NONE


def is_ours(fd: int) -> bool:
    """True if this number is now that of a descriptor of ours."""
    owners = [owner for ref in list(Descriptor._living.values()) if (owner := ref()) is not None]
    return any(owner.number == fd and owner.holds() for owner in owners)


def keep_for_ever(thing: object) -> None:
    """Prevents every finalization, also at the interpreter's end."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _after_fork() -> None:
    """Closes inherited descriptors: they would hide the parent's death from others, and keep memory."""
    for ref in list(Descriptor._living.values()):
        if (descriptor := ref()) is not None:
            descriptor.close_in_child()


register_at_fork(after_in_child=_after_fork)
