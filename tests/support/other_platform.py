"""Makes this process look like one on macOS or Windows, before it imports onnx_dl.

Leaves out what CPython documents as missing there.  The platform's own libraries cannot be had here: their
Python modules and those of the standard library are imported first, as on a platform for which they are
built.  ``/proc`` and ``/sys`` do not exist, except for psutil, which reads other sources there.
"""

from __future__ import annotations

import asyncio
import builtins
import concurrent.futures
import ctypes
import email.parser
import errno
import fcntl
import hashlib
import importlib.metadata
import io
import logging
import mmap
import multiprocessing
import os
import platform
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

import msgspec
import numpy
import numpy.testing
import onnxruntime
import prometheus_client
import psutil
import trio
import zmq

LOADED: Final = (
    asyncio, concurrent.futures, email.parser, hashlib, importlib.metadata, logging, msgspec, multiprocessing,
    numpy, onnxruntime, psutil, shutil, subprocess, tempfile, trio, prometheus_client, zmq,
)  # fmt: skip
"""Made for one platform by themselves."""

_NOT_ON_MACOS: Final = {
    os: """
        memfd_create eventfd eventfd_read eventfd_write pidfd_open pipe2 posix_fallocate posix_fadvise
        sched_getaffinity sched_setaffinity sched_getparam sched_setparam sched_param sched_getscheduler
        sched_setscheduler sched_rr_get_interval waitid getresuid setresuid copy_file_range splice unshare
        setns getxattr setxattr listxattr getrandom O_DIRECT O_TMPFILE O_PATH O_NOATIME P_PIDFD P_ALL P_PID
        P_PGID WEXITED WNOWAIT SCHED_IDLE SCHED_BATCH SCHED_RESET_ON_FORK MFD_* EFD_*
    """,
    select: "epoll EPOLL*",
    socket: "MSG_NOSIGNAL MSG_CMSG_CLOEXEC SO_PEERCRED SOCK_CLOEXEC SOCK_NONBLOCK AF_NETLINK AF_VSOCK",
    fcntl: "F_SETSIG F_GETSIG F_ADD_SEALS F_GET_SEALS F_SEAL_* F_NOTIFY F_OFD_*",
    mmap: "MAP_POPULATE MADV_DONTFORK MADV_HUGEPAGE",
    signal: "pidfd_send_signal sigtimedwait sigwaitinfo SIGRT* SIGPOLL SIGPWR SIGSTKFLT SIGCLD",
    time: "CLOCK_BOOTTIME",
}
_NOT_ON_WINDOWS: Final = {
    os: """
        fork forkpty register_at_fork getuid geteuid getgid getegid getgroups setuid setgid pread pwrite
        preadv pwritev readv writev posix_spawn posix_spawnp kill_pg killpg setsid getsid getpgid setpgid
        getpgrp getpriority setpriority PRIO_* wait wait3 wait4 WNOHANG WEXITSTATUS WIFEXITED WIFSIGNALED
        WTERMSIG O_CLOEXEC O_NONBLOCK O_NOCTTY O_DIRECTORY O_NOFOLLOW O_SYNC uname sysconf confstr statvfs
        fstatvfs mkfifo mknod fchmod chown fchown lchown chroot fchdir getloadavg nice set_blocking
        get_blocking openpty ttyname ctermid sync fdatasync lockf sendfile sched_yield SCHED_*
    """,
    select: "poll POLL* PIPE_BUF",
    socket: "AF_UNIX send_fds recv_fds CMSG_SPACE CMSG_LEN SCM_* MSG_DONTWAIT SOCK_SEQPACKET",
    signal: """
        SIGHUP SIGKILL SIGCHLD SIGPIPE SIGXFSZ SIGXCPU SIGTTOU SIGTTIN SIGUSR* SIGALRM SIGSTOP SIGTSTP SIGCONT
        SIGQUIT pthread_sigmask pthread_kill sigwait sigpending SIG_BLOCK SIG_SETMASK SIG_UNBLOCK setitimer
        getitimer alarm pause siginterrupt
    """,
    mmap: "PROT_* MAP_* MADV_*",
    time: "clock_gettime clock_gettime_ns CLOCK_* pthread_getcpuclockid",
}
_MODULES_NOT_ON_WINDOWS: Final = (
    "fcntl", "resource", "termios", "pwd", "grp", "pty", "tty", "syslog", "posix", "readline", "curses",
)  # fmt: skip
_ONLY_IN_GLIBC: Final = {
    "prctl", "malloc_trim", "mallopt", "mremap", "unshare", "sched_getcpu", "pthread_spin_unlock",
    "inotify_init1", "inotify_add_watch", "inotify_rm_watch", "syscall", "memfd_create",
}  # fmt: skip


def pretend(name: str) -> None:
    """``name``: "darwin" or "win32"."""
    for module, names in _NOT_ON_MACOS.items():
        _remove(module, names)
    if name == "win32":
        for module, names in _NOT_ON_WINDOWS.items():
            _remove(module, names)
        for module_name in _MODULES_NOT_ON_WINDOWS:
            sys.modules[module_name] = None  # type: ignore[assignment]
        # What these are in the standard library of Windows.
        selectors.DefaultSelector = selectors.SelectSelector  # type: ignore[misc,assignment]
        socket.socketpair = _socketpair  # type: ignore[assignment]
    tempfile._O_TMPFILE_WORKS = False  # type: ignore[attr-defined]
    _replace_libc(is_windows=name == "win32")
    _hide("/proc", "/sys")
    platform.machine = lambda: "arm64"
    sys.platform = name


def _remove(module: ModuleType, names: str) -> None:
    for pattern in names.split():
        for name in [name for name in vars(module) if name == pattern or _fits(name, pattern)]:
            delattr(module, name)


def _fits(name: str, pattern: str) -> bool:
    return pattern.endswith("*") and name.startswith(pattern[:-1])


def _replace_libc(*, is_windows: bool) -> None:
    for kind in ("CDLL", "PyDLL"):
        real: Any = getattr(ctypes, kind)

        class Library(real):  # type: ignore[misc]
            def __init__(self, name: str | None, *args: Any, **kwargs: Any) -> None:
                if name is None and is_windows:
                    raise TypeError("bad argument type for built-in operation")
                super().__init__(name, *args, **kwargs)

            def __getattr__(self, name: str) -> Any:
                if name in _ONLY_IN_GLIBC:
                    raise AttributeError(f"dlsym: symbol not found: {name}")
                return super().__getattr__(name)

        setattr(ctypes, kind, Library)


def _hide(*roots: str) -> None:
    def hidden(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            text = path if isinstance(path, str) else str(path) if isinstance(path, os.PathLike) else ""
            reader = sys._getframe(1).f_globals.get("__name__", "")
            if any(text == root or text.startswith(f"{root}/") for root in roots) and not reader.startswith(
                "psutil"
            ):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), text)
            return function(path, *args, **kwargs)

        return call

    for name in ("stat", "lstat", "open", "listdir", "readlink", "scandir"):
        setattr(os, name, hidden(getattr(os, name)))
    builtins.open = io.open = hidden(io.open)  # type: ignore[assignment]


def _socketpair(*_: object) -> tuple[socket.socket, socket.socket]:
    """Two connected sockets over TCP, as Windows has them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        return one, listener.accept()[0]
