"""Kernel attributes of a process (prctl): parent death signal and name."""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15


def die_with_parent(parent: int | None = None) -> None:
    """Has the kernel kill this process when its parent ends; exits at once if ``parent`` has ended already.

    The signal comes when the *thread* that started this process ends, so parents use their main thread.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent not in (None, os.getppid()):
        os._exit(0)


def name_process(name: str) -> None:
    """Sets the name that ps and top show; only the first 15 bytes count."""
    _prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()[:15]))


def _prctl(option: int, argument: object) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0)
