"""Titles of our processes: what ps, htop and top show, such as ``onnx-dl: worker asr.onnx``."""

from __future__ import annotations

import contextlib
import os
from typing import Final

_KEEP_ENVIRONMENT: Final = "SPT_NOENV"
"""Variable of setproctitle: a title may be as long as the arguments were, and leaves the environment's memory
alone.  ``/proc/PID/environ`` stays readable; with our arguments, there is room for several hundred bytes."""


def set_title(title: str) -> None:
    """Sets the title of this process, and the name of this thread to its first 15 bytes.

    Call it in the main thread.  Without the library, or without space for the title, the old title stays: the
    program does not need it.
    """
    if not os.environ:  # the library looks for the arguments before the first variable
        return
    given = os.environ.get(_KEEP_ENVIRONMENT)
    os.environ[_KEEP_ENVIRONMENT] = "1"
    try:
        with contextlib.suppress(Exception):
            import setproctitle

            setproctitle.setproctitle(f"onnx-dl: {title}")
    finally:
        if given is None:
            del os.environ[_KEEP_ENVIRONMENT]
        else:
            os.environ[_KEEP_ENVIRONMENT] = given
