"""Checks that this system can run onnx-dl."""

from __future__ import annotations

import os
import sys

from onnx_dl.concurrency import waits
from onnx_dl.errors import PlatformError


def is_platform() -> bool:
    """Returns whether onnx-dl can run on this operating system."""
    return sys.platform == "linux" and hasattr(os, "memfd_create") and hasattr(os, "pidfd_open")


def check_platform() -> None:
    """Raises :class:`~onnx_dl.errors.PlatformError` where onnx-dl cannot run."""
    if not is_platform():
        raise PlatformError(
            "onnx-dl needs Linux 5.3 or newer (memfd, pidfd, abstract Unix sockets); "
            f"this is {sys.platform}. Use onnxruntime.InferenceSession here."
        )
    if (why := waits.refusal()) is not None:
        raise PlatformError(why)
