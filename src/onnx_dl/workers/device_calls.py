"""Runs of one caller whose inputs and outputs all lie on a GPU: bound once, and then named by a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from onnx_dl.tensors.device_values import DeviceTensor, UnopenedTensor
from onnx_dl.transport.worker_lane import WorkerLane
from onnx_dl.workers.device_memory import LaneDevices
from onnx_dl.workers.engines import base
from onnx_dl.workers.engines.base import Backend, BoundRun, CancelToken

_MOST: Final = 16
"""Runs that are kept bound for one caller."""

_Bound = Sequence[tuple[str, DeviceTensor | UnopenedTensor]]


class DeviceCalls:
    """The bound runs of one caller, by its numbers."""

    def __init__(self, lane: WorkerLane, backend: Backend, token: CancelToken, devices: LaneDevices) -> None:
        self._lane = lane
        self._backend = backend
        self._token = token
        self._devices = devices
        self._runs: dict[int, BoundRun] = {}

    def call(self, number: int, inputs: _Bound | None = None, outputs: _Bound = ()) -> None:
        """Makes a run and replies: None, or text if it was not made, which is empty if the number is unknown.

        ``inputs`` and ``outputs``: of a new number.  Raises what the engine raises.
        """
        devices = self._devices
        run = self._again(number) if inputs is None else None
        if inputs is not None:
            for _, tensor in (*inputs, *outputs):
                if isinstance(tensor, UnopenedTensor):
                    self._lane.reply(tensor.reason)
                    return
            users = devices.present()
            devices.begin()
            run = base.bind_devices(self._backend, inputs, outputs)
            if len(self._runs) >= _MOST:
                self._runs.clear()
                devices.uses.clear()
            self._runs[number] = run
            devices.uses[number] = users
        if run is None:
            self._lane.reply("")
            return
        self._token.attach(run.cancel)
        try:
            run.run()
        finally:
            self._token.detach()
            if self._token.is_cancelled:  # it would end the next run, too
                self._runs.pop(number, None)
            devices.synchronize()
        self._lane.reply(None)

    def _again(self, number: int) -> BoundRun | None:
        """Returns a bound run if all that it uses is open."""
        users = self._devices.uses.get(number)
        if users is None or number not in self._runs:
            self._runs.pop(number, None)
            return None
        self._devices.name(users)
        self._devices.begin()
        return self._runs[number]

    def clear(self) -> None:
        """Forgets all runs."""
        self._runs.clear()
