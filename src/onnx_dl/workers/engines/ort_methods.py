"""Methods of an ``onnxruntime.InferenceSession`` beside ``run()``, as a proxy calls them by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import OrtValue, OrtValueVector

from onnx_dl.errors import UnsupportedValueError
from onnx_dl.ort import onnx_builder, ortvalues
from onnx_dl.tensors.device_values import BY_HANDLE, CUDA, DeviceTensor, UnopenedTensor
from onnx_dl.workers.engines import ort_bindings
from onnx_dl.workers.engines.base import Array, CancelToken, DeviceResults, Feed, Options

_FORWARDED: Final = "end_profiling get_tuning_results release_captured_graph set_ep_dynamic_options".split()

_SIZES: Final = {16: 2, 17: 1, 18: 1, 19: 1, 20: 1, 24: 1}
"""Bytes of an item, by element type that numpy lacks: bfloat16, and the kinds of float8."""
_PACKED: Final = frozenset(f"tensor({name})" for name in "uint4 int4 float4e2m1 uint2 int2".split())
"""Types of which several items share a byte."""

RunWithOptions = Callable[[Callable[[onnxruntime.RunOptions], object], Options, CancelToken], object]
"""Calls a function with an ``onnxruntime.RunOptions`` made of the plain one."""
_Place = tuple[int, list[int]]
"""Element type and shape of an OrtValue."""
_Input = tuple[str, Array | OrtValue | DeviceTensor | UnopenedTensor]
_Output = tuple[str, str, int, _Place | DeviceTensor | UnopenedTensor | str | None]
"""Name, device, its number, and the place if the memory is the caller's; :data:`BY_HANDLE`: the run allocates
it on that device, where it stays."""


_WEBGPU: Final = "WebGpuExecutionProvider"


class SessionMethods:
    """The methods that a proxy may call; it can reach nothing else of the session."""

    def __init__(
        self, session: onnxruntime.InferenceSession, run: RunWithOptions, cuda_device: int | None = None
    ) -> None:
        """``cuda_device``: number of the GPU that the session uses by CUDA's provider."""
        self._session = session
        self._run = run
        self._cuda_device = cuda_device

    def __call__(self, method: str, args: list[object], token: CancelToken) -> object:
        """Calls a method; raises AttributeError if there is no such method."""
        if method in _FORWARDED:
            return getattr(self._session, method)(*args)
        if method in _WITH_OPTIONS:
            *rest, options = args
            call = _WITH_OPTIONS[method]
            plain = options if isinstance(options, dict) else None
            if (
                plain is None
                and method == "run_with_iobinding"
                and _WEBGPU not in self._session.get_providers()
            ):
                call = SessionMethods._run_natively
            return self._run(lambda run_options: call(self, *rest, run_options), plain, token)
        if method in _OTHERS:
            return _OTHERS[method](self, *args)
        raise AttributeError(f"{method} is not a method of InferenceSession that a proxy has")

    def _run_with_ort_values(
        self, outputs: list[str] | None, feed: Feed, options: onnxruntime.RunOptions
    ) -> object:
        return self._session.run_with_ort_values(outputs, feed, options)

    def _run_with_ortvaluevector(
        self,
        names: Sequence[str],
        feeds: Sequence[OrtValue],
        fetch_names: Sequence[str],
        places: Sequence[_Place],
        n: int,
        options: onnxruntime.RunOptions,
    ) -> list[object]:
        """``places``: of values in the caller's vector; ``n``: length of the list of devices, all CPU."""
        vector, fetches = OrtValueVector(), OrtValueVector()
        for value in feeds:
            vector.push_back(value)
        given = [_make_value(place) for place in places]
        for value in given:
            fetches.push_back(value)
        devices = [onnxruntime.OrtDevice.make("cpu", 0)._get_c_device()] * n
        self._session.run_with_ortvaluevector(options, names, vector, fetch_names, fetches, devices)
        return [ortvalues.memory_of(value) for value in given] + list(fetches)[len(given) :]

    def _run_with_iobinding(
        self, inputs: Sequence[_Input], outputs: Sequence[_Output], options: onnxruntime.RunOptions
    ) -> list[object] | str:
        return self._run_bound(
            inputs, outputs, lambda binding: self._session.run_with_iobinding(binding, options)
        )

    def _run_natively(
        self, inputs: Sequence[_Input], outputs: Sequence[_Output], options: onnxruntime.RunOptions
    ) -> list[object] | str:
        """Runs without what the Python method adds for WebGPU.  That asks RunOptions for an entry; if there
        is none, as in options that are not the caller's, it costs 28 µs."""
        return self._run_bound(
            inputs,
            outputs,
            lambda binding: self._session._sess.run_with_iobinding(binding._iobinding, options),
        )

    def _run_bound(
        self,
        inputs: Sequence[_Input],
        outputs: Sequence[_Output],
        run: Callable[[onnxruntime.IOBinding], object],
    ) -> list[object] | str:
        """Returns bytes for outputs whose memory is the caller's, None for those on a device, and native
        OrtValues for others, also for outputs that are inputs: onnxruntime does not write these to where they
        are bound.  Text: why memory on a device cannot be opened; the model did not run."""
        places = [value for _, value in inputs] + [place for *_, place in outputs]
        for place in places:
            if type(place) is UnopenedTensor:
                return place.reason
        binding = self._session.io_binding()
        for name, value in inputs:
            if isinstance(value, DeviceTensor):
                binding.bind_input(name, *value.where)
            elif hasattr(value, "element_type"):
                binding.bind_ortvalue_input(name, onnxruntime.OrtValue(value))
            else:
                binding.bind_cpu_input(name, value)
        given: dict[str, OrtValue] = {}
        for name, device, number, place in outputs:
            if place is None or isinstance(place, str):
                binding.bind_output(name, device, number)
            elif isinstance(place, DeviceTensor):
                binding.bind_output(name, *place.where)
            elif not isinstance(place, UnopenedTensor):
                given[name] = _make_value(place)
                binding.bind_ortvalue_output(name, onnxruntime.OrtValue(given[name]))
        if self._cuda_device is not None and any(not isinstance(v, DeviceTensor) for _, v in inputs):
            ort_bindings.await_copies(self._cuda_device)
        run(binding)
        found = binding.get_outputs_as_ortvaluevector()
        passed_on = {name for name, _ in inputs}
        results = [
            _result(place, given.get(name), found[index]) if name not in passed_on else found[index]
            for index, (name, _, _, place) in enumerate(outputs)
        ]
        return DeviceResults(results) if BY_HANDLE in [place for *_, place in outputs] else results

    def _run_with_types(
        self,
        outputs: list[str],
        feed: Sequence[tuple[str, Array, int]],
        options: onnxruntime.RunOptions,
    ) -> list[object]:
        """Runs with arrays of element types that numpy lacks, such as bfloat16.

        Each input has the number of ONNX's element type, whose items have the size of the array's; 0: the
        dtype tells it.  Such results are arrays of unsigned integers.

        Raises:
            UnsupportedValueError: an output has items of less than a byte.  The model did not run.
        """
        for node in self._session.get_outputs():
            if node.name in outputs and node.type in _PACKED:
                raise UnsupportedValueError(
                    f"Output {node.name!r} is a {node.type}: several items share a byte, and an array cannot "
                    "hold that. Do not ask for it, or add a Cast to the model."
                )
        binding = self._session.io_binding()
        for name, array, element_type in feed:
            if element_type:
                value = OrtValue.ortvalue_from_numpy_with_onnx_type(array, element_type)
                binding.bind_ortvalue_input(name, onnxruntime.OrtValue(value))
            elif array.dtype.hasobject:
                binding.bind_ortvalue_input(name, onnxruntime.OrtValue(onnx_builder.text(array)))
            else:
                binding.bind_cpu_input(name, array)
        for name in outputs:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding, options)
        return [_array_of(value) for value in binding.get_outputs_as_ortvaluevector()]

    def _check_binding(self, name: str, value: Array) -> None:
        """Raises the error that binding this input raises."""
        self._session.io_binding().bind_cpu_input(name, value)

    def _check_ortvalue(
        self, shape: list[int], kind: int | str, device: str, number: int, vendor: int
    ) -> None:
        """Raises the error that making this OrtValue raises."""
        element_type = kind if isinstance(kind, int) else np.dtype(kind).type
        self._session.create_ortvalue_from_shape_and_type(shape, element_type, device, number, vendor)

    def _get_provider_graph_assignment_info(self) -> list[list[object]]:
        found = self._session.get_provider_graph_assignment_info()
        return [
            [part.ep_name, [[node.name, node.domain, node.op_type] for node in part.get_nodes()]]
            for part in found
        ]

    def _set_tuning_results(self, results: list[object], error_on_invalid: bool) -> None:
        self._session.set_tuning_results(results, error_on_invalid=error_on_invalid)


_WITH_OPTIONS: Final[Mapping[str, Callable[..., object]]] = {
    "run_with_ort_values": SessionMethods._run_with_ort_values,
    "run_with_ortvaluevector": SessionMethods._run_with_ortvaluevector,
    "run_with_iobinding": SessionMethods._run_with_iobinding,
    "run_with_types": SessionMethods._run_with_types,
}
_OTHERS: Final[Mapping[str, Callable[..., object]]] = {
    "check_binding": SessionMethods._check_binding,
    "check_ortvalue": SessionMethods._check_ortvalue,
    "get_provider_graph_assignment_info": SessionMethods._get_provider_graph_assignment_info,
    "set_tuning_results": SessionMethods._set_tuning_results,
}


def _result(place: object, given: OrtValue | None, found: OrtValue) -> object:
    if given is not None:
        return ortvalues.memory_of(given)
    if isinstance(place, DeviceTensor):
        return None
    if place == BY_HANDLE and found.is_tensor() and found.device_name().lower() == CUDA:
        where = (CUDA, 0, found.data_ptr(), found)
        return DeviceTensor(found.element_type(), tuple(found.shape()), *where)
    return found


def _array_of(value: OrtValue) -> object:
    """Returns a dense tensor as an array, of a type that numpy lacks as unsigned integers of its size."""
    if (found := ortvalues.as_array(value, value)) is not None:
        return found
    if not value.is_tensor() or value.element_type() == onnx_builder.STRING:
        return np.asarray(value.numpy(), object)
    if (size := _SIZES.get(value.element_type())) is None:
        raise UnsupportedValueError(f"A {value.data_type()} cannot be an array.")
    return ortvalues.memory_of(value).view(f"u{size}").reshape(value.shape())


def _make_value(place: _Place) -> OrtValue:
    element_type, shape = place
    if (
        element_type == onnx_builder.STRING
    ):  # bound for an output that is no text: onnxruntime has to refuse it
        return onnx_builder.text(np.full(shape, "", object))
    return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, element_type)._get_c_value()
