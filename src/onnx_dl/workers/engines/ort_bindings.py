"""Runs of a session whose inputs and results have fixed places in memory, by execution provider.

A session on the CPU reads an input where it is bound, at each run.  One on a GPU copies it to the device when
it is *bound*: a later run computes with that copy, whatever the memory has by then.  So its inputs are bound
again at each run.  Both write results to where they are bound.  On the CPU, a result of another shape is an
error; from a device, onnxruntime copies any result that has as many elements.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import onnxruntime

from onnx_dl.system import cuda_driver
from onnx_dl.system.cuda_types import DriverError
from onnx_dl.tensors.device_values import DeviceTensor
from onnx_dl.workers.engines import cuda_graphs
from onnx_dl.workers.engines.base import Array, BoundRun

_CPU: Final = "CPUExecutionProvider"
_CUDA: Final = "CUDAExecutionProvider"
_OFF: Final = ("0", "", "false")

Shape = Sequence[int | str | None]
ProviderOptions = Mapping[str, Mapping[str, str]]


class BindingRule(NamedTuple):
    """Way in which calls of a session are bound."""

    device: int | None
    """Number of the GPU that inputs and results are copied to and from: inputs are bound again at each run,
    and the shapes of results have to be known.  None: the session is on the CPU."""


def rule_of(providers: Sequence[str], options: ProviderOptions) -> BindingRule | None:
    """Returns the rule of a session with these providers in use; None: its calls are not bound.

    Not tried with other providers.  A CUDA graph is captured with the addresses of a run, which its caller
    has to give again.
    """
    if list(providers) == [_CPU]:
        return BindingRule(None)
    has_graph = options.get(_CUDA, {}).get("enable_cuda_graph", "0").lower() not in _OFF
    device = cuda_device(providers, options)
    if list(providers) == [_CUDA, _CPU] and not has_graph and device is not None:
        return BindingRule(device)
    return None


def are_certain(
    declared: Mapping[str, Shape], inputs: Mapping[str, Array], results: Mapping[str, Array]
) -> bool:
    """Tells whether the shapes of the inputs decide those of the results, as the model declares them by name.

    Sizes without a name tell nothing, and a shape that is not known looks like that of a scalar.
    """
    sizes: dict[int | str | None, int] = {}
    for name, array in inputs.items():
        sizes |= zip(declared[name], array.shape, strict=False)
    sizes.pop(None, None)
    return all(
        tuple(size if isinstance(size, int) else sizes.get(size) for size in declared[name]) == array.shape
        for name, array in results.items()
    )


def cuda_device(providers: Sequence[str], options: ProviderOptions) -> int | None:
    """Returns the number of the device that a session uses by CUDA's provider; None: it does not use that."""
    if _CUDA not in providers:
        return None
    number = options.get(_CUDA, {}).get("device_id", "0")
    return int(number) if number.isdecimal() else None


def bound_run(
    session: onnxruntime.InferenceSession,
    rule: BindingRule,
    inputs: Mapping[str, Array],
    results: Mapping[str, Array],
    options: onnxruntime.RunOptions,
) -> Callable[[], object]:
    """Returns a function that runs the session from ``inputs`` to ``results``, in their places.  These have
    to outlive it.

    Raises:
        Exception: onnxruntime's.
    """
    binding = session.io_binding()
    for name, array in results.items():
        binding.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    # Not the Python method: with RunOptions it asks for an entry that is not there, which costs 28 µs.
    run = functools.partial(session._sess.run_with_iobinding, binding._iobinding, options)
    if rule.device is not None:
        return _binding_again(binding._iobinding, inputs, run, rule.device)
    for name, array in inputs.items():
        binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    return run


def _binding_again(
    binding: onnxruntime.IOBinding, inputs: Mapping[str, Array], run: Callable[[], object], device: int
) -> Callable[[], object]:
    """Returns a run that binds its inputs before, and leaves no copy of them on the device."""
    # Not the Python method, which makes the device anew: 2 µs for each input.
    cpu = onnxruntime.OrtDevice.make("cpu", 0)._get_c_device()
    binds = [
        functools.partial(binding.bind_input, name, cpu, a.dtype.type, a.shape, a.ctypes.data)
        for name, a in inputs.items()
    ]
    clear = binding.clear_binding_inputs

    def run_again() -> None:
        try:
            for bind in binds:
                bind()
            await_copies(device)
            run()
        finally:  # else each prepared call would keep its inputs on the device
            clear()

    return run_again


def await_copies(device: int) -> None:
    """Waits until inputs that were bound are on the GPU.

    When an input is bound, onnxruntime has a stream copy it, which it takes from a pool and puts back at
    once, and does not wait.  The run that follows takes a stream from the pool, too.  If another call took
    one or put one back in between, the run is not ordered behind the copy, and would compute with what is not
    there yet.  A source that is pinned is copied while the run goes on.
    """
    if (driver := cuda_driver.loaded()) is not None:
        with contextlib.suppress(DriverError):  # of an earlier call; the run raises it
            driver.synchronize(device)


def on_devices(
    session: onnxruntime.InferenceSession,
    inputs: Sequence[tuple[str, DeviceTensor]],
    outputs: Sequence[tuple[str, DeviceTensor]],
    graph: int | None,
) -> BoundRun:
    """Returns a run of the session with tensors on devices.  ``graph``: number of its CUDA graph.

    Inputs are bound again each time: one that a node on the CPU takes is copied when it is bound.

    Raises:
        Exception: onnxruntime's.
    """
    binding = session.io_binding()
    for name, tensor in outputs:
        binding.bind_output(name, *tensor.where)
    native = binding._iobinding  # as above
    binds = [
        functools.partial(native.bind_input, name, _device(tensor), *tensor.where[2:])
        for name, tensor in inputs
    ]
    options = onnxruntime.RunOptions()
    if graph is not None:
        options.add_run_config_entry(cuda_graphs.OPTION, str(graph))
    run = functools.partial(session._sess.run_with_iobinding, native, options)

    def run_again() -> None:
        for bind in binds:
            bind()
        run()

    return BoundRun(run_again, functools.partial(setattr, options, "terminate", True))


def _device(tensor: DeviceTensor) -> object:
    return onnxruntime.OrtDevice.make(tensor.device_type, tensor.device_id)._get_c_device()
