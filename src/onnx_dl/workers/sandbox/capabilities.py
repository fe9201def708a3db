"""Capabilities of root: a sandboxed worker of root keeps only what it takes to read the user's files."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final

from onnx_dl.errors import SandboxUnavailable

_VERSION_3: Final = 0x20080522
_CAPGET: Final = {"x86_64": 125, "aarch64": 90}
_KEPT: Final = 1 << 1 | 1 << 2
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: files of other users.  Landlock still applies."""


def drop() -> None:
    """Gives up all other capabilities of this thread; call it before there are others.

    Raises:
        SandboxUnavailable: the kernel refuses, or this kind of processor is not known.
    """
    number = _CAPGET.get(os.uname().machine)
    if number is None:
        raise SandboxUnavailable(f"sandbox=True does not know processors of the kind {os.uname().machine}.")
    libc = ctypes.CDLL(None, use_errno=True)
    header = ctypes.create_string_buffer(struct.pack("Ii", _VERSION_3, 0))
    data = ctypes.create_string_buffer(24)
    if not libc.syscall(ctypes.c_long(number), header, data):
        kept = [value & _KEPT for value in struct.unpack("6I", data.raw)]
        kept[3:] = [0, 0, 0]  # the upper half has none of them
        changed = ctypes.create_string_buffer(struct.pack("6I", *kept))
        if not libc.syscall(ctypes.c_long(number + 1), header, changed):
            return
    raise SandboxUnavailable(
        f"sandbox=True cannot give up capabilities here: {os.strerror(ctypes.get_errno())}."
    )
