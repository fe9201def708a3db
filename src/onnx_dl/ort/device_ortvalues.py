"""OrtValues in the memory of a GPU: those that use memory that is there, and new ones.

onnxruntime takes memory at an address only as a DLPack capsule, which needs no CUDA provider.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from onnx_dl.ort.onnx_builder import NATIVE

if TYPE_CHECKING:
    from onnxruntime.capi.onnxruntime_pybind11_state import OrtValue

_ON_CUDA: Final = 2
"""DLPack's kDLCUDA."""
_BOOL: Final = 9
_TYPES: Final = {
    1: (2, 32), 2: (1, 8), 3: (0, 8), 4: (1, 16), 5: (0, 16), 6: (0, 32), 7: (0, 64), _BOOL: (1, 8),
    10: (2, 16), 11: (2, 64), 12: (1, 32), 13: (1, 64), 16: (4, 16),
}  # fmt: skip
"""DLPack's code and bits of a type, by number of onnx's TensorProto.DataType."""


class _DlTensor(ctypes.Structure):
    """DLPack's DLTensor."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


_DELETER: Final = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _DlManagedTensor(ctypes.Structure):
    """DLPack's DLManagedTensor."""

    _fields_ = [
        ("tensor", _DlTensor),
        ("context", ctypes.c_void_p),
        ("deleter", _DELETER),
    ]


_kept: Final[dict[int, tuple[object, ...]]] = {}
"""Memory that an OrtValue uses, until onnxruntime says that it is gone."""


def _forget(address: int, kept: dict[int, tuple[object, ...]] = _kept) -> None:
    """Called by onnxruntime at the end of an OrtValue, perhaps while the interpreter ends."""
    kept.pop(address, None)


_delete: Final = _DELETER(_forget)
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_delete))  # OrtValues outlive this module


def over(
    element_type: int, shape: Sequence[int], device: int, address: int, owner: object
) -> OrtValue | None:
    """Makes a native OrtValue of the memory at an address on a GPU; None: onnxruntime cannot.

    ``owner`` lives as long as the OrtValue.
    """
    make = getattr(importlib.import_module(NATIVE).OrtValue, "from_dlpack", None)
    if make is None or element_type not in _TYPES:
        return None
    code, bits = _TYPES[element_type]
    sizes = (ctypes.c_int64 * max(len(shape), 1))(*shape)
    tensor = _DlTensor(address, _ON_CUDA, device, len(shape), code, bits, 1, sizes, None, 0)
    managed = _DlManagedTensor(tensor, None, _delete)
    place = ctypes.addressof(managed)
    _kept[place] = (managed, sizes, owner)
    made: OrtValue = make(_capsule(place), element_type == _BOOL)
    return made


def _capsule(place: int) -> Any:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(place, b"dltensor", None)


def allocated(element_type: int, shape: Sequence[int], device: int) -> OrtValue:
    """Makes a native OrtValue with new memory on a GPU.  Raises RuntimeError if onnxruntime cannot."""
    onnxruntime = importlib.import_module("onnxruntime")
    made = onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), element_type, "cuda", device)
    native: OrtValue = made._get_c_value()
    return native


@functools.cache
def can_allocate(device: int) -> bool:
    """Tells whether onnxruntime has memory of a GPU for OrtValues of this process."""
    try:
        allocated(1, [1], device)
    except Exception:  # no CUDA provider, or no such GPU: its errors are of several classes
        return False
    return True


def moved(value: OrtValue, device: int) -> OrtValue | None:
    """Makes a copy on a GPU of a dense OrtValue on the CPU; None: onnxruntime cannot."""
    onnxruntime = importlib.import_module("onnxruntime")
    with contextlib.suppress(Exception):  # as above; and numpy lacks some types
        native: OrtValue = onnxruntime.OrtValue.ortvalue_from_numpy(
            value.numpy(), "cuda", device
        )._get_c_value()
        return native
    return None
