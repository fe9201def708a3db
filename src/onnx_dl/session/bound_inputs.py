"""Time at which a bound input is read, as in onnxruntime: it depends on where the model's session has it.

An input that the session has on the CPU is read at each run.  One that it has on a GPU is copied to there
when it is bound: what its memory has later is not seen before it is bound again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from onnx_dl.core.types import Array, OrtObject, Value
from onnx_dl.ort import ortvalues
from onnx_dl.tensors.device_values import DeviceTensor

_DEVICES: Final = frozenset(
    ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")
)
_CPU: Final = "CPUExecutionProvider"
_HOST: Final = "Cpu"
"""Name of the host's memory in onnxruntime."""

Empty = Callable[[tuple[int, ...], np.dtype[np.generic]], Array]


def reads_when_bound(
    name: str,
    inputs: Sequence[str],
    memory_infos: Sequence[Sequence[object]],
    providers: Sequence[str],
) -> bool:
    """Tells whether a session copies this input when it is bound.

    Args:
        inputs: names of all inputs.
        memory_infos: name of the memory and more for each of these; empty: this onnxruntime does not tell.
            It is not told of overridable initializers either.
        providers: in use.
    """
    if _DEVICES.isdisjoint(providers):  # others may have memory of the host under another name
        return False
    if name in inputs and len(memory_infos) == len(inputs):
        return memory_infos[inputs.index(name)][0] != _HOST
    return True


class InputCopies:
    """Copies of inputs that were read when they were bound."""

    def __init__(self, is_read: Callable[[str], bool], empty: Empty) -> None:
        """
        Args:
            is_read: tells of an input whether it is read when it is bound.
            empty: makes the arrays; those of shared memory are not copied again at each run.
        """
        self._is_read = is_read
        self._empty = empty
        self._copies: dict[str, Array] = {}

    def read(self, name: str, value: Value) -> Value:
        """Returns the value that later runs get for an input that is bound to ``value``: that, or a copy.

        The memory of the copy before is used again: its runs have ended.
        """
        if type(value) is DeviceTensor:
            return value
        if isinstance(value, np.ndarray) and not value.flags.c_contiguous:
            return np.ascontiguousarray(value)  # onnxruntime copies such an array now, on the CPU, too
        if not self._is_read(name):
            return value
        if not isinstance(value, np.ndarray):
            return _copy(value)
        copy = self._copies.get(name)
        if copy is None or (copy.shape, copy.dtype) != (value.shape, value.dtype):
            copy = self._copies[name] = self._empty(value.shape, value.dtype)
        copy[...] = value
        return copy

    def clear(self) -> None:
        """Forgets all copies."""
        self._copies.clear()


def _copy(value: OrtObject) -> OrtObject:
    """Returns a copy of a native OrtValue.  Others than dense tensors are not copied to a device."""
    parts = ortvalues.take_apart(value)
    if parts is None or parts.kind != "dense":
        return value
    element_type, shape, data, *_ = parts.items  # and the device, which need not be the host
    return ortvalues.put_together(parts.kind, [element_type, shape, data], copy=True)


def copies_for(proxy: OrtObject) -> InputCopies:
    """Returns the copies of one binding to a session's proxy."""

    def is_read(name: str) -> bool:
        described = proxy._metadata.read()
        if described.providers == [_CPU]:  # nearly always, and this is asked for each input
            return False
        names = [node.name for node in described.inputs]
        infos = described.details.get("input_memory_infos", ())
        return reads_when_bound(name, names, infos, described.providers)

    return InputCopies(is_read, proxy.empty)
