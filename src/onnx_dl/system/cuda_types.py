"""Types of what CUDA's driver (:mod:`onnx_dl.system.cuda_driver`) takes and returns."""

from __future__ import annotations

import ctypes
from ctypes import c_int
from typing import NamedTuple


class DriverError(Exception):
    """A call that the driver refused: ``code`` and ``function``."""

    def __init__(self, code: int, function: str, name: str) -> None:
        """``name``: what the driver calls the code."""
        super().__init__(f"{function} failed: {name} ({code})")
        self.code = code
        self.function = function


class DevicePointer(NamedTuple):
    """An address on a device, with what the driver knows of it."""

    device: int
    buffer: int
    """Unique for each allocation of this process, also where a later one has the same address."""
    base: int
    size: int
    """Bytes of the allocation from ``base``; 0: the driver does not tell, and ``base`` is the address."""


class Uuid(ctypes.Structure):
    _fields_ = [("data", ctypes.c_ubyte * 16)]


class IpcHandle(ctypes.Structure):
    _fields_ = [("data", ctypes.c_ubyte * 64)]


class Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location_type", c_int), ("location_id", c_int), ("flags", c_int)]
