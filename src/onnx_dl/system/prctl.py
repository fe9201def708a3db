"""What a process of ours says of itself to the kernel."""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15


def die_with_parent(parent: int | None = None) -> None:
    """SIGKILL to this process when its parent ends; at once if that was ``parent`` and has ended already.

    The signal comes when the parent's spawning *thread* ends, so parents spawn from their main thread.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent not in (None, os.getppid()):
        os._exit(0)


def name_process(name: str) -> None:
    """As which tools show it; the first 15 bytes."""
    _prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()[:15]))


def _prctl(option: int, argument: object) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, argument, 0, 0, 0)
