"""IOBinding across processes: inputs are read, and results written, where the application bound them.

Has ``onnxruntime.IOBinding``'s methods.  Addresses are this process's: every run copies the inputs' memory to
the worker and the results to where they are bound, so the application may change bound memory between runs
(unless the session is on a GPU and copies inputs when they are bound: :mod:`onnx_dl.session.bound_inputs`).
As in-process, memory that a run allocated for an output is bound to it from then on.  Memory on a GPU is
never touched here: see :mod:`onnx_dl.session.device_memory`.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import DTypeLike

from onnx_dl.core.types import Array, Feed, OrtObject, Value
from onnx_dl.errors import OnnxDLError
from onnx_dl.ort import onnx_builder, ortvalues
from onnx_dl.session import bound_inputs, device_memory, device_runs
from onnx_dl.session.bound_outputs import BoundOutput, write
from onnx_dl.session.device_runs import BoundCall, Call, DeviceRuns
from onnx_dl.session.inputs import check_owner
from onnx_dl.session.introspection import SessionProxy
from onnx_dl.tensors import device_values
from onnx_dl.tensors.device_values import DeviceTensor

_C: Final = "onnxruntime.capi.onnxruntime_pybind11_state"
_PLAIN: Final = frozenset("biufc")
_NO_TEXT: Final = "Only binding non-string Tensors is currently supported"
_TEXT: Final = 8
"""Number of text in onnx's TensorProto.DataType."""
_ElementType = DTypeLike | int
"""A numpy type, or a number of onnx's TensorProto.DataType."""


class IOBinding:
    """``onnxruntime.IOBinding`` for a proxy.  Arrays are numpy's, values are ``OrtValue``."""

    def __init__(self, proxy: SessionProxy) -> None:
        self._proxy = proxy
        self._session = proxy._sess
        self._inputs: Feed = {}
        self._copies = bound_inputs.copies_for(proxy)
        self._outputs: dict[str, BoundOutput] = {}
        self._devices: DeviceRuns | None = None
        """Made when something that is not the host's is bound."""
        self._plain: bool | None = None
        """Answer of :meth:`_is_plain` for what is bound now; None: not asked yet."""

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
        """Binds an array, whose memory is read at every run, or now if the session has this input on a GPU.

        Raises:
            RuntimeError: there is no such input, or it takes no tensors of numbers, in onnxruntime's words.
        """
        known = any(node.name == name and node.type != "tensor(string)" for node in self._proxy.get_inputs())
        if not (known and type(arr_on_cpu) is np.ndarray and arr_on_cpu.dtype.kind in _PLAIN):
            self._proxy._invoke("check_binding", name, arr_on_cpu)
        self._bind_input(name, arr_on_cpu)

    def bind_input(
        self,
        name: str,
        device_type: str,
        device_id: int,
        element_type: _ElementType,
        shape: Sequence[int],
        buffer_ptr: int,
    ) -> None:
        """Binds memory at an address, which is read like an array, as a tensor of this type and shape.

        Raises:
            RuntimeError: there is no such input, or the memory is said to hold text, in onnxruntime's words.
        """
        _check_device(device_type, device_id)
        if _is_text(element_type):
            raise RuntimeError(_NO_TEXT)
        value = _value_at(device_type, device_id, element_type, shape, buffer_ptr)
        self._check_input(name)
        self._bind_input(name, value if type(value) is DeviceTensor else _live(value, None))

    def bind_ortvalue_input(self, name: str, ortvalue: OrtObject) -> None:
        """Binds an OrtValue, which is read like an array."""
        self._check_owner(ortvalue)
        self._check_input(name)
        self._bind_input(name, _live(ortvalue._ortvalue, ortvalue))

    def _bind_for_one_run(
        self, inputs: Feed, owners: Iterable[object], outputs: dict[str, BoundOutput]
    ) -> None:
        """Binds native OrtValues, which are read when the run begins, whatever the session's device."""
        for (name, value), owner in zip(inputs.items(), owners, strict=True):
            self._inputs[name] = live = _live(value, owner)
            self._changed(is_on_device=type(live) is DeviceTensor)
        for name, output in outputs.items():
            self._bind_output(name, output)

    def _bind_input(self, name: str, value: Value) -> None:
        self._inputs[name] = self._copies.read(name, value)
        self._changed(is_on_device=type(value) is DeviceTensor)

    def _changed(self, *, is_on_device: bool = False) -> None:
        """Notes that something else is bound."""
        self._plain = None
        if self._devices is not None:
            self._devices.forget()
        elif is_on_device:
            self._devices = DeviceRuns(self._proxy._handle.spec)

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
        self._copies.clear()
        self._devices = DeviceRuns.still(self._devices, (), self._outputs.values())
        self._changed()

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
            self._bind_output(name, BoundOutput(device_type, device_id))
            return
        if element_type is None or shape is None:
            raise ValueError(
                "`element_type` and `shape` are to be provided if pre-allocated memory is provided"
            )
        value = _value_at(device_type, device_id, element_type, shape, buffer_ptr)
        kind = self._type_of(name)
        if kind is None:
            raise RuntimeError(f"Failed to find NodeArg with name: {name} in the def list")
        if kind == "tensor(string)":
            raise RuntimeError(_NO_TEXT)
        self._bind_output(name, BoundOutput(device_type, device_id, value))

    def _bind_output(self, name: str, output: BoundOutput) -> None:
        self._outputs[name] = output
        self._changed(is_on_device=output.device != "cpu" or output.tensor is not None)

    def _type_of(self, name: str) -> str | None:
        """The type of an output; None: there is none of this name."""
        return next((node.type for node in self._proxy.get_outputs() if node.name == name), None)

    def bind_ortvalue_output(self, name: str, ortvalue: OrtObject) -> None:
        """Binds an output to an OrtValue's memory.  Raises ValueError if that is on a device that is neither
        the host nor a GPU of CUDA."""
        self._check_owner(ortvalue)
        device_memory.check_writable(ortvalue._ortvalue)
        self._bind_output(name, BoundOutput("cpu", 0, ortvalue._ortvalue, ortvalue))

    def synchronize_outputs(self) -> None:
        """Does nothing: results are there when a run ends."""

    def clear_binding_outputs(self) -> None:
        self._outputs.clear()
        self._devices = DeviceRuns.still(self._devices, self._inputs.values(), ())
        self._changed()

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
        if not all(output.is_there for output in self._outputs.values()):
            raise RuntimeError("This IOBinding has no outputs yet: run_with_iobinding() comes first.")
        return [output.to_python() for output in self._outputs.values()]

    def _results(self) -> list[OrtObject]:
        return [output.native() for output in self._outputs.values()]

    # --- a run --------------------------------------------------------------------------------------------

    def run_again(self, repeat: Callable[[int], bool]) -> bool:
        """Runs as the last time, with all on devices.  False: it did not."""
        return self._devices is not None and self._devices.again(repeat)

    def run_plainly(self, run: Callable[[list[str], Feed], list[Array]]) -> bool:
        """Runs the way of ``run()``, which is faster.  False if that did not do: :meth:`run` then raises what
        is wrong in the words of a binding."""
        devices = self._devices
        if devices is not None and devices.are_needed(self._inputs.values(), self._outputs.values()):
            return False
        if self._plain is None:
            self._plain = self._is_plain()
        if not self._plain:
            return False
        try:
            results = run(list(self._outputs), self._inputs)
        except OnnxDLError:
            raise  # not onnxruntime's: the other way would raise the same
        except Exception:
            return False
        if not all(map(BoundOutput.fits, self._outputs.values(), results)):
            return False
        for output, result in zip(self._outputs.values(), results, strict=True):
            output.put(result)
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

    def run(self, call: Call, bound_call: BoundCall | None) -> None:
        """Runs with any kind of value.  ``call`` takes inputs and outputs; it returns a result per output."""
        inputs: list[Value] = [[name, value] for name, value in self._inputs.items()]
        outputs: list[Value] = [
            [name, output.device, output.number, output.place(functools.partial(self._type_of, name))]
            for name, output in self._outputs.items()
        ]
        results = device_runs.perform(self._devices, call, inputs, outputs, bound_call)
        for (name, *_, place), result in zip(outputs, results, strict=True):
            output = self._outputs[name]
            if isinstance(place, list) and isinstance(result, np.ndarray):
                write(output.value, result)
            elif result is not None:
                self._outputs[name] = BoundOutput(output.device, output.number, result, result)


def _live(value: OrtObject, owner: object) -> Value:
    """A native OrtValue as an array in the same memory, if numpy has an array type for it, or as a tensor on
    a GPU."""
    if (array := ortvalues.as_array(value, owner)) is not None:
        return array
    tensor = device_memory.tensor_of(value, owner)
    return value if tensor is None else tensor


def _value_at(
    device_type: str,
    device_id: int,
    element_type: _ElementType,
    shape: Sequence[int],
    address: int,
) -> OrtObject:
    """A native OrtValue over memory of this process, or a tensor on a GPU.  For text, a new OrtValue,
    which no run may write to, as in onnxruntime."""
    onnxruntime = importlib.import_module("onnxruntime")
    _check_device(device_type, device_id)
    if _is_text(element_type):
        return onnx_builder.text(np.full(list(shape), "", object))
    number, nbytes = _element(onnxruntime, element_type, shape)
    if device_type.lower() != "cpu":
        return device_memory.tensor_at(device_type, device_id, number, shape, address)
    device_values.check_host(address)
    lies_there = ortvalues.bytes_at(address, nbytes)
    return ortvalues.put_together("dense", [number, list(shape), lies_there], copy=False)


def _is_text(element_type: _ElementType) -> bool:
    """True if onnxruntime takes this for text, as it does numpy's types of text, bytes and objects."""
    if isinstance(element_type, int) and not isinstance(element_type, type):
        return element_type == _TEXT
    try:
        return np.dtype(element_type).kind in "OSU"
    except TypeError:
        return False


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
