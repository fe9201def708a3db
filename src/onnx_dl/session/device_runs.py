"""Runs with memory on a GPU.

A model in a worker process gets handles of its allocations; where that is not possible, the driver copies,
and inputs and results travel like all others.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import numpy as np

from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.types import Value
from onnx_dl.ort import device_ortvalues
from onnx_dl.ort.ortvalues import Parts
from onnx_dl.session.bound_outputs import BoundOutput
from onnx_dl.system import cuda_driver
from onnx_dl.system.cuda_driver import CudaDriver
from onnx_dl.tensors import device_values
from onnx_dl.tensors.call_plans import DEVICE_RUNS
from onnx_dl.tensors.device_exports import Export, Exporter
from onnx_dl.tensors.device_values import BY_HANDLE, CUDA, DeviceTensor, UnopenedTensor
from onnx_dl.tensors.foreign_tables import TooManyMemories

Call = Callable[[list[Value], list[Value]], list[Value]]
"""Runs with ``[name, value]`` of each input and ``[name, device, number, place]`` of each output; returns a
result for each, or text: why the worker cannot open memory on a device."""

BoundCall = Callable[..., str | None]
"""Runs with a number and, unless the worker knows it, ``[name, handle]`` of each input and of each output;
returns None, or text if there was no run: empty if the number is not known."""

_numbers: Final = itertools.count(DEVICE_RUNS.start)
_warned: Final[set[int]] = set()
"""Ids of the process, a forked child's or its parent's, that has warned."""


class _Kept(NamedTuple):
    """The last run, if all that it has is on devices, and its worker has bound it."""

    driver: CudaDriver
    number: int
    places: dict[int, list[tuple[int, int]]]
    """Addresses by device, each with the driver's number of its allocation: as long as that is the same, the
    handle that the worker has is the right one."""


class DeviceRuns:
    """Runs of one binding with memory on a GPU."""

    def __init__(self, spec: ModelSpec) -> None:
        self._is_local = not spec.isolation
        """True if the model is in this process, and an address is all that it needs."""
        # Its worker could write to what it has open.
        self._refusal = "a sandboxed model gets copies only" if spec.sandbox else ""
        """Reason for which there are no handles; empty: there are."""
        self._exporter = Exporter(takes_parts=True)
        self._bound: object = None
        """Names and handles of the run that has :attr:`_number`."""
        self._number = 0
        self._is_known = False
        """True if the worker may know the number still."""
        self._kept: _Kept | None = None

    @staticmethod
    def still(
        runs: DeviceRuns | None, inputs: Iterable[Value], outputs: Iterable[BoundOutput]
    ) -> DeviceRuns | None:
        """``runs`` if something is bound on a device; handles that nothing needs are forgotten."""
        if any(type(value) is DeviceTensor for value in inputs):
            return runs
        return (
            runs if any(output.device != "cpu" or output.tensor is not None for output in outputs) else None
        )

    def are_needed(self, inputs: Iterable[Value], outputs: Iterable[BoundOutput]) -> bool:
        """True if a run has memory on a GPU.  Results that are to be there come to the host first, unless
        this process uses CUDA already, or the model is in it."""
        if any(type(value) is DeviceTensor for value in inputs):
            return True
        asked = [output for output in outputs if output.is_on_device]
        if any(output.tensor is not None for output in asked):
            return True
        return bool(asked) and (self._is_local or cuda_driver.loaded() is not None)

    def forget(self) -> None:
        """Forgets the last run, because something else is bound now."""
        self._kept = None

    def again(self, repeat: Callable[[int], bool]) -> bool:
        """Makes the last run again, which nothing has changed since.  False: it was not made.

        ``repeat``: makes the run of a number; false if it did not.  Raises what that raises.
        """
        if (kept := self._kept) is None or cuda_driver.loaded() is not kept.driver:
            return False
        for device, known in kept.places.items():
            if not kept.driver.is_settled(device, known):
                return False
        self._is_known = repeat(kept.number)
        return self._is_known

    def run(
        self, call: Call, inputs: list[Value], outputs: list[Value], bound_run: BoundCall | None
    ) -> list[Value]:
        """Returns a result per output; None for one that is written where it is bound.

        ``bound_run`` makes a run that may be named by a number later; None: this one may not.

        Raises:
            ValueError: the CUDA driver no longer knows memory that is bound.
            DriverError: it cannot copy.
            Exception: what the call raises.
        """
        if self._is_local:
            return call(inputs, outputs)
        self._kept = None
        self._synchronize(inputs, outputs)
        self._exporter.next_run()
        try:
            if bound_run is not None and self._run_bound(bound_run, inputs, outputs):
                return [None] * len(outputs)
            self._bound = None
            given = [[name, self._sent(value)] for name, value in inputs]
            results: list[Value] | str = call(given, [self._asked(*output) for output in outputs])
        except TooManyMemories:  # nothing was sent
            results = "they lie in too many parts of expandable segments"
        if isinstance(results, str):  # the model did not run
            self._refuse(results)
            return self.run(call, inputs, outputs, None)
        found = [self._value(result) if type(result) is UnopenedTensor else result for result in results]
        return [
            _put(place, result) if type(place) is DeviceTensor else result
            for (*_, place), result in zip(outputs, found, strict=True)
        ]

    def _value(self, result: UnopenedTensor) -> Value:
        """The value of a result that this process cannot open; later runs are asked for values."""
        self._refuse(result.reason)
        return result.value

    def _refuse(self, reason: str) -> None:
        self._refusal = reason
        _warn_once(reason)

    def _run_bound(self, run: BoundCall, inputs: list[Value], outputs: list[Value]) -> bool:
        """Makes a run with everything on devices.  False: it is none, or a tensor has no handle."""
        names = [name for name, *_ in (*inputs, *outputs)]
        places = [place for *_, place in (*inputs, *outputs)]
        if self._refusal or len(set(names)) < len(names) or not all(map(_has_handle, places)):
            return False
        found = [self._exporter.handle(tensor) for tensor in places]
        handles = [handle for handle in found if not isinstance(handle, UnopenedTensor)]
        if len(handles) < len(found):
            return False
        key = list(zip(names, handles, strict=True)), len(inputs)
        if not (self._is_known and key == self._bound and run(self._number) is None):
            if key != self._bound:
                self._bound, self._number = key, next(_numbers)
            bound = [[name, handle.parts()] for name, handle in key[0]]
            if run(self._number, bound[: len(inputs)], bound[len(inputs) :]) is not None:
                return False
        self._is_known = True
        if all(handle.handle.buffer for handle in handles):  # parts have none: they are looked at each time
            self._keep(places, handles)
        return True

    def _keep(self, tensors: list[DeviceTensor], handles: list[Export]) -> None:
        if (driver := cuda_driver.loaded()) is not None:
            self._kept = kept = _Kept(driver, self._number, {})
            for tensor, handle in zip(tensors, handles, strict=True):
                kept.places.setdefault(tensor.device_id, []).append((tensor.address, handle.handle.buffer))

    def _synchronize(self, inputs: list[Value], outputs: list[Value]) -> None:
        """Waits until all that the application has begun on the devices is done: no stream of another process
        waits for its streams."""
        if (driver := cuda_driver.loaded()) is not None:
            tensors = [place for *_, place in (*inputs, *outputs) if type(place) is DeviceTensor]
            for device in {tensor.device_id for tensor in tensors}:
                driver.synchronize(device)

    def _handle(self, tensor: DeviceTensor) -> Parts | None:
        if not tensor.nbytes or self._refusal:
            return None
        found = self._exporter.handle(tensor)
        if isinstance(found, UnopenedTensor):
            _warn_once(found.reason)
            return None
        return found.parts()

    def _sent(self, value: Value) -> Value:
        if type(value) is not DeviceTensor:
            return value
        copied = [value.element_type, list(value.shape)]
        return self._handle(value) or Parts("dense", [*copied, device_values.to_host(value)])

    def _asked(self, name: str, device: str, number: int, place: Value) -> list[Value]:
        """Asks for a result.  One that the run allocates, and that cannot stay on the GPU, comes to the host,
        and is moved when the application asks for it."""
        if type(place) is DeviceTensor:
            handle = self._handle(place)
            return [name, "cpu", 0, handle or [place.element_type, list(place.shape)]]
        if device != CUDA:
            return [name, device, number, place]
        stays = place is None and not self._refusal and device_ortvalues.can_allocate(number)
        return [name, device, number, BY_HANDLE] if stays else [name, "cpu", 0, place]


def perform(
    runs: DeviceRuns | None,
    call: Call,
    inputs: list[Value],
    outputs: list[Value],
    bound_call: BoundCall | None,
) -> list[Value]:
    """Runs; see :meth:`DeviceRuns.run`.  ``runs`` is None where nothing is bound on a device."""
    return call(inputs, outputs) if runs is None else runs.run(call, inputs, outputs, bound_call)


def _has_handle(place: Value) -> bool:
    return type(place) is DeviceTensor and place.nbytes > 0


def _put(place: DeviceTensor, result: Value) -> Value:
    """Writes a result that came by value to the device; returns one that is not of this place."""
    if not isinstance(result, np.ndarray):
        return result
    device_values.to_device(place, result.reshape(-1).view(np.uint8))
    return None


def _warn_once(reason: str) -> None:
    """Warns that memory on a GPU is copied through main memory; once in each process."""
    if os.getpid() in _warned:
        return
    _warned.add(os.getpid())
    warnings.warn(
        f"Tensors on the GPU are copied through main memory, because {reason}. "
        "The results are the same; calls take longer.",
        RuntimeWarning,
        stacklevel=2,
    )
