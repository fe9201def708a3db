"""Methods of an ``onnxruntime.InferenceSession`` beside ``run()``, by name, with arguments that travel."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import onnxruntime

from onnx_dl.ort import onnx_builder, ortvalues
from onnx_dl.workers.cancellation import Halt

_C: Final = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")

_TEXT: Final = 8
"""onnx's number of it."""

Run = Callable[[Callable[[Any], Any], dict[str, Any] | None, Halt], Any]
"""Runs a function with an ``onnxruntime.RunOptions`` that says what the plain one does."""


class Calls:
    """The methods that a proxy may call; nothing else of the session can be reached."""

    def __init__(self, session: Any, run: Run) -> None:
        self._session = session
        self._run = run
        self._forwarded = (
            "end_profiling",
            "get_tuning_results",
            "release_captured_graph",
            "set_ep_dynamic_options",
        )

    def __call__(self, method: str, args: list[Any], halt: Halt) -> Any:
        """Raises AttributeError if there is no such method, else what onnxruntime raises."""
        if method in self._forwarded:
            return getattr(self._session, method)(*args)
        if method in _WITH_OPTIONS:
            *rest, options = args
            call = _WITH_OPTIONS[method]
            return self._run(lambda ro: call(self._session, *rest, ro), options, halt)
        if method in _OTHERS:
            return _OTHERS[method](self._session, *args)
        raise AttributeError(f"{method} is not a method of InferenceSession that a proxy has")


def _run_with_ort_values(session: Any, outputs: list[str] | None, feed: dict[str, Any], options: Any) -> Any:
    return session.run_with_ort_values(outputs, feed, options)


def _run_with_ortvaluevector(
    session: Any,
    names: Sequence[str],
    feeds: list[Any],
    fetch_names: Sequence[str],
    places: list[Any],
    n: int,
    options: Any,
) -> Any:
    """``places``: element type and shape of the values that the caller's vector holds already; ``n``: the
    length of the list of devices, which is the CPU for all."""
    vector, fetches = _C.OrtValueVector(), _C.OrtValueVector()
    for value in feeds:
        vector.push_back(value)
    given = [_value_at(place) for place in places]
    for value in given:
        fetches.push_back(value)
    devices = [onnxruntime.OrtDevice.make("cpu", 0)._get_c_device()] * n
    session.run_with_ortvaluevector(options, names, vector, fetch_names, fetches, devices)
    return [ortvalues.memory_of(value) for value in given] + list(fetches)[len(given) :]


def _value_at(place: list[Any]) -> Any:
    element_type, shape = place
    if element_type == _TEXT:  # bound where the model has no text, which onnxruntime shall refuse
        return onnx_builder.text(np.full(shape, "", object))
    return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, element_type)._get_c_value()


def _run_with_iobinding(session: Any, inputs: list[Any], outputs: list[Any], options: Any) -> Any:
    """``inputs``: name and array or OrtValue; ``outputs``: name, device, and element type and shape where
    the memory is the caller's.  Returns bytes for these, and native OrtValues for others, and for outputs
    that are inputs, too: onnxruntime does not write these to where they are bound."""
    binding = session.io_binding()
    for name, value in inputs:
        if hasattr(value, "element_type"):
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue(value))
        else:
            binding.bind_cpu_input(name, value)
    given: dict[str, Any] = {}
    for name, device, number, place in outputs:
        if place is None:
            binding.bind_output(name, device, number)
        else:
            given[name] = _value_at(place)
            binding.bind_ortvalue_output(name, onnxruntime.OrtValue(given[name]))
    session.run_with_iobinding(binding, options)
    found = binding.get_outputs_as_ortvaluevector()
    passed_on = {name for name, _ in inputs}
    return [
        ortvalues.memory_of(given[name]) if name in given and name not in passed_on else found[index]
        for index, (name, *_) in enumerate(outputs)
    ]


def _check_binding(session: Any, name: str, value: Any) -> None:
    """Raises what binding this input would raise."""
    session.io_binding().bind_cpu_input(name, value)


def _check_ortvalue(session: Any, shape: list[int], kind: Any, device: str, number: int, vendor: int) -> None:
    """Raises what making this OrtValue would raise."""
    element_type = kind if isinstance(kind, int) else np.dtype(kind).type
    session.create_ortvalue_from_shape_and_type(shape, element_type, device, number, vendor)


def _get_provider_graph_assignment_info(session: Any) -> list[Any]:
    found = session.get_provider_graph_assignment_info()
    return [
        [part.ep_name, [[node.name, node.domain, node.op_type] for node in part.get_nodes()]]
        for part in found
    ]


def _set_tuning_results(session: Any, results: list[Any], error_on_invalid: bool) -> None:
    session.set_tuning_results(results, error_on_invalid=error_on_invalid)


_WITH_OPTIONS: Final[dict[str, Callable[..., Any]]] = {
    "run_with_ort_values": _run_with_ort_values,
    "run_with_ortvaluevector": _run_with_ortvaluevector,
    "run_with_iobinding": _run_with_iobinding,
}
_OTHERS: Final[dict[str, Callable[..., Any]]] = {
    "check_binding": _check_binding,
    "check_ortvalue": _check_ortvalue,
    "get_provider_graph_assignment_info": _get_provider_graph_assignment_info,
    "set_tuning_results": _set_tuning_results,
}
