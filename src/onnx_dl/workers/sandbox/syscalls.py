"""System calls that a sandboxed process may not make, with their numbers.

The numbers are those of the kernel's asm/unistd_64.h (x86-64) and asm-generic/unistd.h (aarch64).
"""

from __future__ import annotations

import platform
from typing import Final, NamedTuple


class Machine(NamedTuple):
    """A kind of processor: its AUDIT_ARCH value, and its column in the tables here."""

    arch: int
    column: int


MACHINES: Final = {"x86_64": Machine(0xC000003E, 0), "aarch64": Machine(0xC00000B7, 1)}
NEWEST: Final = 462
"""The latest number that was looked at (mseal, Linux 6.10).  Later calls are refused as unknown."""

# A name, its number on x86-64, its number on aarch64; -: there is none.
_FORBIDDEN: Final = """
# network, and sockets of other programs
socket 41 198, socketpair 53 199, connect 42 203, bind 49 200, listen 50 201
# other programs, and other processes
execve 59 221, execveat 322 281, fork 57 -, vfork 58 -, ptrace 101 117, process_vm_readv 310 270
process_vm_writev 311 271, kcmp 312 272, pidfd_open 434 434, pidfd_getfd 438 438
pidfd_send_signal 424 424, tkill 200 130, process_madvise 440 440, process_mrelease 448 448
migrate_pages 256 238, move_pages 279 239, setpriority 141 140, ioprio_set 251 30
sched_setparam 142 118, sched_setattr 314 274
# files: Landlock does not cover modes, owners, times and attributes
chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, chown 92 -, fchown 93 55, lchown 94 -
fchownat 260 54, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14
lremovexattr 198 15, fremovexattr 199 16, utime 132 -, utimes 235 -, utimensat 280 88, futimesat 261 -
truncate 76 45, creat 85 -, mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -, unlinkat 263 35
rename 82 -, renameat 264 38, renameat2 316 276, link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36
mknod 133 -, mknodat 259 33, inotify_init 253 -, inotify_init1 294 26, inotify_add_watch 254 27
fanotify_init 300 262, fanotify_mark 301 263, name_to_handle_at 303 264, open_by_handle_at 304 265
# memory and messages that processes share by number or name
shmget 29 194, shmat 30 196, shmctl 31 195, shmdt 67 197, msgget 68 186, msgsnd 69 189, msgrcv 70 188
msgctl 71 187, semget 64 190, semop 65 193, semtimedop 220 192, semctl 66 191, mq_open 240 180
mq_unlink 241 181
# mounts and namespaces
mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, unshare 272 97, setns 308 268
open_tree 428 428, move_mount 429 429, fsopen 430 430, fsconfig 431 431, fsmount 432 432, fspick 433 433
mount_setattr 442 442, statmount 457 457, listmount 458 458
# large parts of the kernel that models do not need
bpf 321 280, perf_event_open 298 241, userfaultfd 323 282, add_key 248 217, request_key 249 218
keyctl 250 219, personality 135 92, modify_ldt 154 -, iopl 172 -, ioperm 173 -
# the machine, for a worker of root
init_module 175 105, finit_module 313 273, delete_module 176 106, kexec_load 246 104
kexec_file_load 320 294, reboot 169 142, swapon 167 224, swapoff 168 225, syslog 103 116, acct 163 89
quotactl 179 60, quotactl_fd 443 443, settimeofday 164 170, clock_settime 227 112, adjtimex 159 171
clock_adjtime 305 266, sethostname 170 161, setdomainname 171 162, vhangup 153 58
setuid 105 146, setgid 106 144, setreuid 113 145, setregid 114 143, setresuid 117 147, setresgid 119 149
setgroups 116 159, setfsuid 122 151, setfsgid 123 152
"""
_UNKNOWN: Final = """
# Their arguments lie in memory, where a filter cannot see them.  Callers use the older calls instead.
clone3 435 435, openat2 437 437, io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427
"""
_CHECKED: Final = """
clone 56 220, kill 62 129, tgkill 234 131, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240
prlimit64 302 261, fcntl 72 25, ioctl 16 29, open 2 -, openat 257 56, sched_setscheduler 144 119
prctl 157 167
"""


def machine() -> Machine | None:
    """Returns the kind of this processor; None: it has no table here."""
    return MACHINES.get(platform.machine())


def _numbers(table: str, column: int) -> dict[str, int]:
    """Reads a table; calls that this kind of processor does not have are left out."""
    lines = [line for line in table.strip().splitlines() if not line.startswith("#")]
    entries = [entry.split() for line in lines for entry in line.split(",")]
    return {name: int(numbers[column]) for name, *numbers in entries if numbers[column] != "-"}


def forbidden(column: int) -> dict[str, int]:
    """Returns the calls that fail with EPERM, by name."""
    return _numbers(_FORBIDDEN, column)


def unknown(column: int) -> dict[str, int]:
    """Returns the calls that fail with ENOSYS, by name."""
    return _numbers(_UNKNOWN, column)


def checked(column: int) -> dict[str, int]:
    """Returns the calls that depend on their arguments, by name."""
    return _numbers(_CHECKED, column)
