"""A filter of system calls (seccomp): all threads of this process lose them, for ever.

https://docs.kernel.org/userspace-api/seccomp_filter.html.  Own code: the bindings on PyPI need libseccomp,
or are a few months old, and the filter is sixty lines.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Mapping
from typing import Final

from onnx_dl.errors import SandboxUnavailable
from onnx_dl.workers.sandbox import syscalls

_SECCOMP_SET_MODE_FILTER: Final = 1
_SECCOMP_GET_ACTION_AVAIL: Final = 2
_TSYNC: Final = 1
_NUMBER: Final = {"x86_64": 317, "aarch64": 277}
"""Numbers of the system call seccomp()."""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW: Final = 0x7FFF0000
_FAIL: Final = 0x00050000
_AT_NUMBER, _AT_ARCH = 0, 4

_CLONE_THREAD: Final = 0x10000
_O_TRUNC: Final = os.O_TRUNC
_OWNERS: Final = (8, 15)
"""fcntl: F_SETOWN, F_SETOWN_EX: have the kernel send a signal to any process of this user."""
_CONTROLS: Final = (0x5412, 0x541C, 0x541D, 0x8901, 0x8902, 0x40086602, 0x401C5820)
"""ioctl: TIOCSTI, TIOCLINUX and TIOCCONS type into a terminal; FIOSETOWN and SIOCSPGRP are as F_SETOWN;
FS_IOC_SETFLAGS and FS_IOC_FSSETXATTR change a file that is open for reading."""

_NOT_DUMPABLE: Final = (4,)
"""prctl: PR_SET_DUMPABLE has /proc hide the process's memory from the supervisor, which limits it."""

Instruction = tuple[int, int, int, int]
"""Operation, instructions to skip if true and if false, operand."""


def _fail(number: int) -> Instruction:
    return _RETURN, 0, 0, _FAIL | number


def _argument(index: int) -> Instruction:
    """Loads the low half of an argument: the kernel reads these arguments as 32-bit numbers."""
    return _LOAD, 0, 0, 16 + 8 * index


_ALLOWED: Final[Instruction] = (_RETURN, 0, 0, _ALLOW)
_REFUSED: Final = _fail(errno.EPERM)


def _only(index: int, values: tuple[int, ...]) -> list[Instruction]:
    """Allows a call with one of these values as argument."""
    tests = [step for value in values for step in ((_EQUAL, 0, 1, value), _ALLOWED)]
    return [_argument(index), *tests, _REFUSED]


def _not(index: int, values: tuple[int, ...]) -> list[Instruction]:
    """Refuses a call with one of these values as argument."""
    tests = [step for value in values for step in ((_EQUAL, 0, 1, value), _REFUSED)]
    return [_argument(index), *tests, _ALLOWED]


def program(machine: syscalls.Machine, pid: int, policy: int, *, truncation: bool) -> list[Instruction]:
    """Returns the filter for the process ``pid``.

    Args:
        policy: its scheduling policy, which threads may set again, as those of libzmq do.
        truncation: refuse to open files with O_TRUNC, for kernels where Landlock does not.
    """
    truncating = (_ANY_BIT, 0, 1, _O_TRUNC)
    rules: Mapping[str, list[Instruction]] = {
        "clone": [_argument(0), (_ANY_BIT, 0, 1, _CLONE_THREAD), _ALLOWED, _REFUSED],
        "kill": _only(0, (pid,)),
        "tgkill": _only(0, (pid,)),
        "rt_sigqueueinfo": _only(0, (pid,)),
        "rt_tgsigqueueinfo": _only(0, (pid,)),
        "prlimit64": _only(0, (0, pid)),
        "fcntl": _not(1, _OWNERS),
        "ioctl": _not(1, _CONTROLS),
        "prctl": _not(0, _NOT_DUMPABLE),
        "sched_setscheduler": _only(1, (policy,)),
        "open": [_argument(1), truncating, _REFUSED, _ALLOWED] if truncation else [],
        "openat": [_argument(2), truncating, _REFUSED, _ALLOWED] if truncation else [],
    }
    steps: list[Instruction] = [
        (_LOAD, 0, 0, _AT_ARCH),
        (_EQUAL, 1, 0, machine.arch),
        _fail(errno.ENOSYS),
        (_LOAD, 0, 0, _AT_NUMBER),
        (_AT_LEAST, 0, 1, syscalls.NEWEST + 1),  # with the x32 calls
        _fail(errno.ENOSYS),
    ]
    for number in syscalls.forbidden(machine.column).values():
        steps += [(_EQUAL, 0, 1, number), _REFUSED]
    for number in syscalls.unknown(machine.column).values():
        steps += [(_EQUAL, 0, 1, number), _fail(errno.ENOSYS)]
    for name, number in syscalls.checked(machine.column).items():
        if rule := rules[name]:
            steps += [(_EQUAL, 0, len(rule), number), *rule]
    return [*steps, _ALLOWED]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def complaint() -> str:
    """Returns why :func:`install` would fail, without doing anything; empty: it would not."""
    name = os.uname().machine
    if syscalls.machine() is None:
        return f"no table of system calls for {name}"
    libc = ctypes.CDLL(None, use_errno=True)
    action = ctypes.c_uint32(_FAIL)
    if libc.syscall(
        ctypes.c_long(_NUMBER[name]),
        ctypes.c_long(_SECCOMP_GET_ACTION_AVAIL),
        ctypes.c_long(0),
        ctypes.byref(action),
    ):
        return os.strerror(ctypes.get_errno())
    return ""


def install(*, truncation: bool) -> None:
    """Installs the filter in all threads of this process.  It must have no_new_privs.

    Raises:
        SandboxUnavailable: the kernel refuses it, or has no table of calls here.
    """
    machine = syscalls.machine()
    name = os.uname().machine
    if machine is None:
        raise SandboxUnavailable(f"sandbox=True knows the system calls of x86-64 and aarch64, not of {name}.")
    steps = program(machine, os.getpid(), os.sched_getscheduler(0), truncation=truncation)
    packed = b"".join(struct.pack("HBBI", *step) for step in steps)
    given = _Program(len(steps), packed)
    libc = ctypes.CDLL(None, use_errno=True)
    # A number greater than 0 is the id of a thread that has another filter.
    found = libc.syscall(
        ctypes.c_long(_NUMBER[name]),
        ctypes.c_long(_SECCOMP_SET_MODE_FILTER),
        ctypes.c_long(_TSYNC),
        ctypes.byref(given),
    )
    if found:
        why = os.strerror(ctypes.get_errno()) if found < 0 else f"thread {found} has another filter"
        raise SandboxUnavailable(
            f"sandbox=True needs seccomp filters, which the kernel refuses here ({why}). It needs "
            "CONFIG_SECCOMP_FILTER; a container's own profile must allow the call seccomp()."
        )
