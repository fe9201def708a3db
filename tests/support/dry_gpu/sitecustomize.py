"""Has sessions say that they use CUDA, in each process.  Used with ``PYTHONPATH``.

As on a GPU, what lies on the host is copied when it is bound, and memory of a device is the stand-in's.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pynvml  # the one beside this; the supervisor takes what is imported
from onnxruntime.capi.onnxruntime_pybind11_state import OrtDevice, SessionIOBinding

from onnx_dl.ort import device_ortvalues
from tests.support.cuda_sessions import sitecustomize as sessions

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
Session, Binding, Value = onnxruntime.InferenceSession, sessions.Binding, sessions.Value
make_session, run_with_ort_values = Session.__init__, Session.run_with_ort_values
native_input, native_clear = sessions.bind_input, SessionIOBinding.clear_binding_inputs
native_output, clear_binding_outputs = SessionIOBinding.bind_output, Binding.clear_binding_outputs
bind_ortvalue_input, bind_ortvalue_output = Binding.bind_ortvalue_input, Binding.bind_ortvalue_output
from_numpy, update, to_numpy = Value.ortvalue_from_numpy.__func__, Value.update_inplace, Value.numpy
NUMPY = {1: "f4", 2: "u1", 3: "i1", 6: "i4", 7: "i8", 9: "?", 10: "f2", 11: "f8"}
copies: Any = weakref.WeakKeyDictionary()
"""What a native binding has copied, by name."""
NEW = object()
ON_HOST = "tensor(int64)"
"""Type of inputs that sessions have on the host here: shapes."""
HOST = sessions.cpu


def init(self: Any, model: Any, options: Any = None, providers: Any = None, *more: Any, **named: Any) -> None:
    given = list(more[0]) if more and more[0] else [{}] * len(providers or ())
    self.asked = {}
    for each, of in zip(providers or (), given, strict=True):
        name, of = (each, of) if isinstance(each, str) else each
        self.asked[name] = {key: str(value) for key, value in of.items()}
    if CUDA in self.asked:
        make_session(self, model, options, [CPU], **named)
    else:  # without a driver
        sessions.make_session(self, model, options, providers, *more, **named)


def get_providers(self: Any) -> list[str]:
    return [CUDA, CPU] if CUDA in self.asked else [CPU]


def get_provider_options(self: Any) -> dict[str, dict[str, str]]:
    return {CUDA: {"device_id": "0"} | self.asked[CUDA], CPU: {}} if CUDA in self.asked else {CPU: {}}


def get_input_memory_infos(self: Any) -> list[Any]:
    allocator, kind = SimpleNamespace(name="ORT_ARENA_ALLOCATOR"), SimpleNamespace(name="DEFAULT")
    there = [CUDA in self.asked and node.type != ON_HOST for node in self.get_inputs()]
    names = ["Cuda" if each else "Cpu" for each in there]
    return [
        SimpleNamespace(name=name, allocator_type=allocator, device_id=0, mem_type=kind) for name in names
    ]


def numpy_type(kind: Any) -> np.dtype[Any]:
    """numpy's type for one of numpy's, or a number of onnx's."""
    return np.dtype(NUMPY[kind] if isinstance(kind, int) else kind)


def view(kind: Any, shape: Any, address: int) -> int:
    found = sessions.driver().library.fake_view(address, math.prod(shape) * numpy_type(kind).itemsize)
    assert found, "a session was bound to memory that is not there"
    return int(found)


# --- bindings ----------------------------------------------------------------------------------------------


def copy_input(self: Any, name: str, *where: Any) -> None:
    """The native method: an array, or device, type, shape and address."""
    if len(where) == 1 and where[0].dtype == np.int64:
        native_input(self, name, *where)
        return
    if len(where) == 1:
        copy = np.array(where[0], order="C")
    else:
        device, kind, shape, at = where
        if device.device_type() == OrtDevice.cuda():
            native_input(self, name, HOST, kind, shape, view(kind, shape, at))
            return
        copy = np.empty(shape, numpy_type(kind))
        ctypes.memmove(copy.ctypes.data, at, copy.nbytes)
    copies.setdefault(self, {})[name] = copy
    native_input(self, name, HOST, copy.dtype.type, copy.shape, copy.ctypes.data)


def clear_inputs(self: Any) -> None:
    copies.pop(self, None)
    native_clear(self)


def bind_output(
    self: Any,
    name: str,
    device: str = "cpu",
    number: int = 0,
    kind: Any = None,
    shape: Any = None,
    at: Any = None,
) -> None:
    if device == "cuda" and at is not None:
        native_output(self._iobinding, name, HOST, kind, shape, view(kind, shape, at))
    else:
        sessions.bind_output(self, name, "cpu", 0, kind, shape, at)
    places = vars(self).setdefault("places", {})
    places[name] = (at if at is not None else NEW) if device == "cuda" else None


def is_there(value: Any) -> bool:
    return bool(value.device_name() == "cuda")


def where(value: Any) -> tuple[Any, ...]:
    return "cuda", 0, value.element_type(), value.shape(), value.data_ptr()


def bind_value_input(self: Any, name: str, value: Any) -> None:
    vars(self).setdefault("owners", {})[name] = value
    if is_there(value):
        self.bind_input(name, *where(value))
    else:
        copy_input(self._iobinding, name, value.numpy())


def bind_value_output(self: Any, name: str, value: Any) -> None:
    vars(self).setdefault("owners", {})[name, "y"] = value
    if is_there(value):
        self.bind_output(name, *where(value))
    else:
        bind_ortvalue_output(self, name, value)
        vars(self).setdefault("places", {})[name] = None


def clear_outputs(self: Any) -> None:
    vars(self).pop("places", None)
    clear_binding_outputs(self)


def native_outputs(self: Any) -> list[Any]:
    """As onnxruntime, a result that a run has allocated stays where it is."""
    found, places = list(sessions.get_outputs(self)), vars(self).get("places", {})
    for index, (name, place) in enumerate(places.items()):
        value = found[index]
        if place is NEW:
            place = places[name] = sessions.on_device(value.element_type(), value.shape(), 0)
        if isinstance(place, int):
            found[index] = device_ortvalues.over(value.element_type(), value.shape(), 0, place, None)
        elif place is not None:
            found[index] = place
            if place.data_ptr():
                sessions.driver().write(place.data_ptr(), value.numpy().tobytes())
    return found


def outputs(self: Any) -> list[Any]:
    return [Value(each) for each in native_outputs(self)]


def copy_outputs(self: Any) -> list[Any]:
    return [value.numpy() for value in outputs(self)]


# --- OrtValues ---------------------------------------------------------------------------------------------


def make_from_numpy(cls: Any, array: Any, device: str = "cpu", number: int = 0, *more: Any) -> Any:
    if device != "cuda":
        return from_numpy(cls, array, device, number, *more)
    made = cls.ortvalue_from_shape_and_type(list(array.shape), from_numpy(cls, array).element_type(), "cuda")
    made.update_inplace(array)
    return made


def update_there(self: Any, array: Any) -> None:
    if is_there(self):
        sessions.driver().write(self.data_ptr(), np.ascontiguousarray(array).tobytes())
    else:
        update(self, array)


def numpy_there(self: Any) -> Any:
    if not is_there(self):
        return to_numpy(self)
    kind = numpy_type(self.element_type())
    data = sessions.driver().read(self.data_ptr(), self.tensor_size_in_bytes()) if self.data_ptr() else b""
    return np.frombuffer(data, kind).reshape(self.shape()).copy()


def run_with_values(self: Any, names: Any, feeds: Any, *more: Any) -> Any:
    fed = {name: from_numpy(Value, value.numpy()) for name, value in feeds.items()}
    return run_with_ort_values(self, names, fed, *more)


Session.__init__, Session.run_with_ort_values = init, run_with_values
Session.get_providers, Session.get_provider_options = get_providers, get_provider_options
Session.get_input_memory_infos = get_input_memory_infos
SessionIOBinding.bind_input, SessionIOBinding.clear_binding_inputs = copy_input, clear_inputs
Binding.bind_output, Binding.clear_binding_outputs = bind_output, clear_outputs
Binding.get_outputs_as_ortvaluevector = native_outputs
Binding.bind_ortvalue_input, Binding.bind_ortvalue_output = bind_value_input, bind_value_output
Binding.get_outputs, Binding.copy_outputs_to_cpu = outputs, copy_outputs
Value.ortvalue_from_numpy = classmethod(make_from_numpy)
Value.update_inplace, Value.numpy = update_there, numpy_there
onnxruntime.get_available_providers = lambda: [CUDA, CPU]
onnxruntime.preload_dlls = lambda *_, **__: None
assert pynvml.IS_STAND_IN
