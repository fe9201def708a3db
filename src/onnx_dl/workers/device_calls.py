"""Runs of one caller whose inputs and outputs all lie on a GPU: bound once, and then named by a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from onnx_dl.protocol.lane import Forgotten
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

    def call(self, number: int, inputs: _Bound, outputs: _Bound) -> None:
        """Binds a run, which has this number from now on, makes it and replies: None, or why it was not made.
        Raises what the engine raises."""
        devices = self._devices
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
        self._make(number, run)
        self._lane.reply(None)

    def repeat(self, number: int) -> None:
        """Makes a run again and replies: Forgotten if it is not known, or something that it uses was closed.
        Raises what the engine raises."""
        users, run = self._devices.uses.get(number), self._runs.get(number)
        if users is None or run is None:
            self._runs.pop(number, None)
            self._lane.send(Forgotten())
            return
        self._devices.begin_with(users)
        self._make(number, run)
        self._lane.send_same()

    def _make(self, number: int, run: BoundRun) -> None:
        token = self._token
        token.attach(run.cancel)
        try:
            run.run()
        finally:
            token.detach()
            if token.is_cancelled:  # it would end the next run, too
                self._runs.pop(number, None)
            self._devices.synchronize()

    def clear(self) -> None:
        """Forgets all runs."""
        self._runs.clear()
