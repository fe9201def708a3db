"""Landlock: this thread loses access to files, except for those that are named here, for ever.

https://docs.kernel.org/userspace-api/landlock.html.  Own code: the bindings on PyPI are before their first
stable release, and the three calls are few lines.  The kernel restricts the calling thread and those that it
starts later, so this comes before the first other thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import struct
from collections.abc import Iterable
from typing import Final

from onnx_dl import linux_only
from onnx_dl.errors import SandboxUnavailable

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
"""The numbers are the same on all processors."""
_PATH_BENEATH: Final = 1
_VERSION: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38

_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_TRUNCATE, _IOCTL_DEV = 1 << 14, 1 << 15
_FILE_RIGHTS: Final = {1: (1 << 13) - 1, 2: 1 << 13, 3: _TRUNCATE, 5: _IOCTL_DEV}
"""Rights on files that each version of Landlock controls in addition."""
_TCP: Final = 0b11
"""Version 4: bind and connect."""
_SIGNALS: Final = 0b10
"""Version 6: signals to processes outside.  The right to connect to abstract sockets outside stays: the
worker connects to the supervisor after this, and seccomp takes it away."""
TRUNCATION_SINCE: Final = 3

_libc: Final = linux_only.libc()


def _call(number: int, *arguments: object) -> int:
    found: int = _libc.syscall(
        ctypes.c_long(number), *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments)
    )
    return found


def version() -> int:
    """Returns the version of Landlock; 0: this kernel has none, or it is switched off."""
    return max(0, _call(_CREATE_RULESET, 0, 0, _VERSION))


def missing() -> SandboxUnavailable:
    """The error where there is no Landlock."""
    return SandboxUnavailable(
        "sandbox=True needs Landlock, which this kernel does not offer: Linux 5.13 or newer with "
        '"landlock" in its list of security modules (the kernel parameter lsm=), and a container whose '
        "profile allows the landlock_ calls. Without it, load the model without sandbox, or elsewhere."
    )


def no_new_privileges() -> None:
    """Has no program that this process executes gain privileges.  Landlock and seccomp require it."""
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise SandboxUnavailable(
            f"sandbox=True needs no_new_privs, which the kernel refuses: {os.strerror(ctypes.get_errno())}."
        )


def restrict(readable: Iterable[str], devices: Iterable[str]) -> None:
    """Restricts this thread to reading these files and folders, and to using these devices.

    Paths that do not exist are left out.  Links count as what they lead to.

    Raises:
        SandboxUnavailable: this kernel has no Landlock.
        OSError: it refuses a rule.
    """
    if not (known := version()):
        raise missing()
    handled = sum(rights for since, rights in _FILE_RIGHTS.items() if since <= known)
    attributes = struct.pack("QQQ", handled, _TCP if known >= 4 else 0, _SIGNALS if known >= 6 else 0)
    size = 8 if known < 4 else 16 if known < 6 else 24
    ruleset = _checked(_call(_CREATE_RULESET, ctypes.c_char_p(attributes), size, 0))
    try:
        for path in readable:
            _allow(ruleset, path, _READ_FILE | _READ_DIR)
        for path in devices:
            using = _READ_FILE | _READ_DIR | _WRITE_FILE | _TRUNCATE | _IOCTL_DEV
            _allow(ruleset, path, using & handled)
        _checked(_call(_RESTRICT_SELF, ruleset, 0))
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                rights &= ~_READ_DIR
            beneath = struct.pack("=Qi", rights, fd)
            _checked(_call(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.c_char_p(beneath), 0))
        finally:
            os.close(fd)


def _checked(found: int) -> int:
    if found < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return found
