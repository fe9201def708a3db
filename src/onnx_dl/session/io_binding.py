"""IOBinding across processes: inputs are read, and results written, where the application bound them.

Has ``onnxruntime.IOBinding``'s methods.  Addresses are this process's: every run copies the inputs' memory to
the worker and the results to where they are bound, so the application may change bound memory between runs.
As in-process, memory that a run allocated for an output is bound to it from then on.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import DTypeLike

from onnx_dl.core.types import Array, Feed, OrtObject, Value
from onnx_dl.errors import OnnxDLError
from onnx_dl.ort import onnx_builder, ortvalues
from onnx_dl.session.inputs import check_owner
from onnx_dl.session.introspection import SessionProxy

_C: Final = "onnxruntime.capi.onnxruntime_pybind11_state"
_PLAIN: Final = frozenset("biufc")
_NO_TEXT: Final = "Only binding non-string Tensors is currently supported"
_TEXT: Final = 8
"""Number of text in onnx's TensorProto.DataType."""
_ElementType = DTypeLike | int
"""A numpy type, or a number of onnx's TensorProto.DataType."""


class _Output:
    """Destination of one output.  ``value``: a native OrtValue that holds it, if there is one yet."""

    def __init__(self, device: str, number: int, value: OrtObject = None, owner: object = None) -> None:
        """``owner``: the Python object of a bound OrtValue, which may hold the array whose memory it uses."""
        self.device = device
        self.number = number
        self.value = value
        self.owner = owner
        self.array = None if value is None else ortvalues.as_array(value, owner)


class IOBinding:
    """``onnxruntime.IOBinding`` for a proxy.  Arrays are numpy's, values are ``OrtValue``."""

    def __init__(self, proxy: SessionProxy) -> None:
        self._proxy = proxy
        self._session = proxy._sess
        self._inputs: Feed = {}
        self._outputs: dict[str, _Output] = {}

    @property
    def _iobinding(self) -> IOBinding:
        """onnxruntime's native binding, which callers hand to the native session."""
        return self

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """``isinstance(binding, onnxruntime.IOBinding)`` holds."""
        onnxruntime = sys.modules.get("onnxruntime")
        return getattr(onnxruntime, "IOBinding", None) or IOBinding

    # --- inputs -------------------------------------------------------------------------------------------

    def bind_cpu_input(self, name: str, arr_on_cpu: Value) -> None:
        """Binds an array, whose memory is read at every run.

        Raises:
            RuntimeError: there is no such input, or it takes no tensors of numbers, in onnxruntime's words.
        """
        array = arr_on_cpu
        known = any(node.name == name and node.type != "tensor(string)" for node in self._proxy.get_inputs())
        if not (known and type(array) is np.ndarray and array.dtype.kind in _PLAIN):
            self._proxy._invoke("check_binding", name, array)
        if isinstance(array, np.ndarray) and not array.flags.c_contiguous:
            array = np.ascontiguousarray(array)  # onnxruntime copies such an array now, too
        self._inputs[name] = array

    def bind_input(
        self,
        name: str,
        device_type: str,
        device_id: int,
        element_type: _ElementType,
        shape: Sequence[int],
        buffer_ptr: int,
    ) -> None:
        """Binds memory at an address, which is read at every run, as a tensor of this type and shape.

        Raises:
            RuntimeError: there is no such input, or the memory is said to hold text, in onnxruntime's words.
        """
        _check_device(device_type, device_id)
        if _is_text(element_type):
            raise RuntimeError(_NO_TEXT)
        value = self._value_at(device_type, device_id, element_type, shape, buffer_ptr)
        self._check_input(name)
        self._inputs[name] = self._live(value, None)

    def bind_ortvalue_input(self, name: str, ortvalue: OrtObject) -> None:
        """Binds an OrtValue, which is read at every run."""
        self._check_owner(ortvalue)
        self._check_input(name)
        self._inputs[name] = self._live(ortvalue._ortvalue, ortvalue)

    @staticmethod
    def _live(value: OrtObject, owner: object) -> Value:
        """A native OrtValue as an array in the same memory, if numpy has an array type for it."""
        array = ortvalues.as_array(value, owner)
        return value if array is None else array

    def _check_owner(self, ortvalue: OrtObject) -> None:
        if type(ortvalue).__name__ == "OrtValue" and not hasattr(ortvalue, "_session"):
            return  # before onnxruntime 1.30
        if ortvalue._session is not None:
            check_owner(ortvalue, self._session, "bound to")

    def _check_input(self, name: str) -> None:
        nodes = (*self._proxy.get_inputs(), *self._proxy.get_overridable_initializers())
        if name not in {node.name for node in nodes}:
            raise RuntimeError(f"Error when binding input: Failed to find input name in the mapping: {name}")

    def synchronize_inputs(self) -> None:
        """Does nothing: inputs are copied when a run begins."""

    def clear_binding_inputs(self) -> None:
        self._inputs.clear()

    # --- outputs ------------------------------------------------------------------------------------------

    def bind_output(
        self,
        name: str,
        device_type: str = "cpu",
        device_id: int = 0,
        element_type: _ElementType | None = None,
        shape: Sequence[int] | None = None,
        buffer_ptr: int | None = None,
    ) -> None:
        """Binds an output to memory at an address; without an address, the run allocates memory for it.

        Raises:
            ValueError: an address without element type or shape.
            RuntimeError: (onnxruntime's text) with an address, there is no such output, or it is text.
        """
        if buffer_ptr is None:
            _check_device(device_type, device_id)
            self._outputs[name] = _Output(device_type, device_id)
            return
        if element_type is None or shape is None:
            raise ValueError(
                "`element_type` and `shape` are to be provided if pre-allocated memory is provided"
            )
        value = self._value_at(device_type, device_id, element_type, shape, buffer_ptr)
        kind = self._type_of(name)
        if kind is None:
            raise RuntimeError(f"Failed to find NodeArg with name: {name} in the def list")
        if kind == "tensor(string)":
            raise RuntimeError(_NO_TEXT)
        self._outputs[name] = _Output(device_type, device_id, value)

    def _type_of(self, name: str) -> str | None:
        """The type of an output; None: there is none of this name."""
        return next((node.type for node in self._proxy.get_outputs() if node.name == name), None)

    def bind_ortvalue_output(self, name: str, ortvalue: OrtObject) -> None:
        """Binds an output to an OrtValue's memory."""
        self._check_owner(ortvalue)
        self._outputs[name] = _Output("cpu", 0, ortvalue._ortvalue, ortvalue)

    def synchronize_outputs(self) -> None:
        """Does nothing: results are there when a run ends."""

    def clear_binding_outputs(self) -> None:
        self._outputs.clear()

    def get_outputs(self) -> list[OrtObject]:
        """The outputs of the last run as ``onnxruntime.OrtValue``, in the order in which they were bound.

        Before the first run, those that a run allocates have no value.
        """
        onnxruntime = importlib.import_module("onnxruntime")
        return [onnxruntime.OrtValue(value) for value in self._results()]

    def get_outputs_as_ortvaluevector(self) -> OrtObject:
        """The outputs of the last run as an ``OrtValueVector``."""
        vector = vector_class()()
        for value in self._results():
            vector.push_back(value)
        return vector

    def copy_outputs_to_cpu(self) -> list[Value]:
        """The outputs of the last run as arrays of their own (lists and dicts for sequences and maps).

        Raises:
            RuntimeError: there was no run yet; onnxruntime itself crashes then.
        """
        if any(output.value is None for output in self._outputs.values()):
            raise RuntimeError("This IOBinding has no outputs yet: run_with_iobinding() comes first.")
        return [_python(value) for value in self._results()]

    def _results(self) -> list[OrtObject]:
        return [
            onnx_builder.nothing() if output.value is None else output.value
            for output in self._outputs.values()
        ]

    # --- a run --------------------------------------------------------------------------------------------

    def _value_at(
        self,
        device_type: str,
        device_id: int,
        element_type: _ElementType,
        shape: Sequence[int],
        address: int,
    ) -> OrtObject:
        """A native OrtValue over memory of this process.  For text, a new one, which no run may write to, as
        in onnxruntime."""
        onnxruntime = importlib.import_module("onnxruntime")
        _check_device(device_type, device_id)
        if _is_text(element_type):
            return onnx_builder.text(np.full(list(shape), "", object))
        number, nbytes = _element(onnxruntime, element_type, shape)
        lies_there = ortvalues.bytes_at(address, nbytes)
        return ortvalues.put_together("dense", [number, list(shape), lies_there], copy=False)

    def run_plainly(self, run: Callable[[list[str], Feed], list[Array]]) -> bool:
        """Runs the way of ``run()``, which is faster.  False if that did not do: :meth:`run` then raises what
        is wrong in the words of a binding."""
        if not self._is_plain():
            return False
        try:
            results = run(list(self._outputs), self._inputs)
        except OnnxDLError:
            raise  # not onnxruntime's: the other way would raise the same
        except Exception:
            return False
        if not all(map(_fits, self._outputs.values(), results)):
            return False
        for output, result in zip(self._outputs.values(), results, strict=True):
            if output.array is None:
                output.value = ortvalues.from_array(result)
                output.array = ortvalues.as_array(output.value, output.value)
            else:
                output.array[...] = result
        return True

    def _is_plain(self) -> bool:
        """True if only tensors of numbers are bound, and no output is also an input."""
        nodes = (*self._proxy.get_inputs(), *self._proxy.get_overridable_initializers())
        taken = {node.name: node.type for node in nodes}
        given = {node.name: node.type for node in self._proxy.get_outputs()}
        return bool(
            self._outputs
            and all(type(value) is np.ndarray for value in self._inputs.values())
            and all(taken.get(name) in ortvalues.NUMERIC for name in self._inputs)
            and all(given.get(name) in ortvalues.NUMERIC and name not in taken for name in self._outputs)
        )

    def _place(self, name: str, value: OrtObject) -> list[object] | None:
        """See :func:`place_of`.  The run refuses text where the model has none."""
        if value is not None and value.is_tensor() and value.element_type() == _TEXT:
            return None if self._type_of(name) == "tensor(string)" else [_TEXT, list(value.shape())]
        return place_of(value)

    def run(self, call: Callable[[list[Value], list[Value]], list[Value]]) -> None:
        """Runs with any kind of value.  ``call`` takes inputs and outputs; it returns a result per output."""
        inputs = [[name, value] for name, value in self._inputs.items()]
        outputs: list[Value] = [
            [name, output.device, output.number, self._place(name, output.value)]
            for name, output in self._outputs.items()
        ]
        for (name, device, number, place), result in zip(outputs, call(inputs, outputs), strict=True):
            if place is not None and isinstance(result, np.ndarray):
                _write(self._outputs[name].value, result)
            else:
                self._outputs[name] = _Output(device, number, result, result)


def _is_text(element_type: _ElementType) -> bool:
    """True if onnxruntime takes this for text, as it does numpy's types of text, bytes and objects."""
    if isinstance(element_type, int) and not isinstance(element_type, type):
        return element_type == _TEXT
    try:
        return np.dtype(element_type).kind in "OSU"
    except TypeError:
        return False


def _fits(output: _Output, result: Value) -> bool:
    """True if the result fits the bound memory.  An output without a value takes any."""
    if type(result) is not np.ndarray:
        return False
    if output.array is None:
        return output.value is None
    return bool(output.array.shape == result.shape and output.array.dtype == result.dtype)


def _check_device(device_type: str, device_id: int) -> None:
    importlib.import_module("onnxruntime").OrtDevice.make(device_type, device_id)


def _element(onnxruntime: OrtObject, element_type: _ElementType, shape: Sequence[int]) -> tuple[int, int]:
    """The number of an element type in onnx, and the size in bytes of a tensor of that shape."""
    if isinstance(element_type, int) and not isinstance(element_type, type):
        one = onnxruntime.OrtValue.ortvalue_from_shape_and_type([2], element_type)
        half = one.tensor_size_in_bytes()
        return element_type, (math.prod(shape) * half + 1) // 2
    one = onnxruntime.OrtValue.ortvalue_from_shape_and_type([1], element_type)
    return one.element_type(), math.prod(shape) * one.tensor_size_in_bytes()


def vector_class() -> OrtObject:
    """onnxruntime's OrtValueVector."""
    return importlib.import_module(_C).OrtValueVector


def take_results(given: list[OrtObject], results: list[Value]) -> list[Value]:
    """Writes results to the native OrtValues that were given for them; returns those that are left."""
    for value, result in zip(given, results, strict=False):
        _write(value, result)
    return results[len(given) :]


def _write(value: OrtObject, result: Array) -> None:
    if result.nbytes:
        ctypes.memmove(value.data_ptr(), result.ctypes.data, result.nbytes)


def place_of(value: OrtObject) -> list[object] | None:
    """Element type and shape of the memory that a result is written to; None: it is allocated."""
    if value is None or not value.has_value() or not value.is_tensor() or value.element_type() == _TEXT:
        return None
    return [value.element_type(), list(value.shape())]


def _python(value: OrtObject) -> Value:
    parts = ortvalues.take_apart(value)
    if parts is None or parts.kind == "absent":
        return None
    if parts.kind == "dense":
        return value.numpy().copy()
    return parts.items[-1] if parts.kind in ("text", "sequence", "maps") else value.as_sparse_tensor()
