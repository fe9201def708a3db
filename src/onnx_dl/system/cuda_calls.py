"""Functions of CUDA's driver: their types, and the errors that they return."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Final

from onnx_dl.system.cuda_types import Access, DriverError, IpcHandle, Uuid

Function = Callable[..., int]
"""A function of the driver, which returns a code: 0 where it did what it was asked."""

_NOT_FOUND: Final = 500
"""CUDA_ERROR_NOT_FOUND."""

_TYPES: Final = {
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetUuid_v2": (POINTER(Uuid), c_int),
    "cuDevicePrimaryCtxGetState": (c_int, POINTER(c_uint), POINTER(c_int)),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuCtxSynchronize": (),
    "cuStreamSynchronize": (c_void_p,),
    "cuPointerGetAttribute": (c_void_p, c_int, c_uint64),
    "cuPointerGetAttributes": (c_uint, POINTER(c_int), POINTER(c_void_p), c_uint64),
    "cuMemGetAddressRange_v2": (POINTER(c_uint64), POINTER(c_size_t), c_uint64),
    "cuIpcGetMemHandle": (POINTER(IpcHandle), c_uint64),
    "cuIpcOpenMemHandle_v2": (POINTER(c_uint64), IpcHandle, c_uint),
    "cuIpcCloseMemHandle": (c_uint64,),
    "cuMemRetainAllocationHandle": (POINTER(c_uint64), c_void_p),
    "cuMemExportToShareableHandle": (c_void_p, c_uint64, c_int, c_uint64),
    "cuMemImportFromShareableHandle": (POINTER(c_uint64), c_void_p, c_int),
    "cuMemRelease": (c_uint64,),
    "cuMemAddressReserve": (POINTER(c_uint64), c_size_t, c_size_t, c_uint64, c_uint64),
    "cuMemAddressFree": (c_uint64, c_size_t),
    "cuMemMap": (c_uint64, c_size_t, c_size_t, c_uint64, c_uint64),
    "cuMemUnmap": (c_uint64, c_size_t),
    "cuMemSetAccess": (c_uint64, c_size_t, POINTER(Access), c_size_t),
    "cuMemcpyDtoH_v2": (c_void_p, c_uint64, c_size_t),
    "cuMemcpyHtoD_v2": (c_uint64, c_void_p, c_size_t),
    "cuMemcpyDtoD_v2": (c_uint64, c_uint64, c_size_t),
    "cuMemHostRegister_v2": (c_void_p, c_size_t, c_uint),
    "cuMemHostUnregister": (c_void_p,),
}
"""The functions that are called, with the types of their arguments (CUdeviceptr and handles: 64 bits)."""


def _not_found(*_: object) -> int:
    return _NOT_FOUND


class Calls:
    """The driver's functions; each raises DriverError."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions: dict[str, Function] = {}
        for name, types in _TYPES.items():
            if (function := getattr(library, name, None)) is not None:
                function.argtypes, function.restype = types, c_int
                self._functions[name] = function

    def __call__(self, name: str, *arguments: object) -> None:
        function = self._functions.get(name)
        if code := _NOT_FOUND if function is None else function(*arguments):
            raise self.error(code, name)

    def plain(self, name: str) -> Function:
        """The function itself, which returns its code."""
        return self._functions.get(name, _not_found)

    def error(self, code: int, function: str) -> DriverError:
        name = c_char_p()
        self._functions["cuGetErrorName"](code, byref(name))
        return DriverError(code, function, (name.value or b"unknown").decode())
