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

    def call(self, number: int, inputs: _Bound | None = None, outputs: _Bound = ()) -> None:
        """Makes a run and replies: None, or text if it was not made, which is empty if the number is unknown.

        ``inputs`` and ``outputs``: of a new number.  Raises what the engine raises.
        """
        devices = self._devices
        run = self._known(number) if inputs is None else None
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
        self._make(number, run)
        self._lane.reply(None)

    def repeat(self, number: int) -> None:
        """Makes a run again that a number alone asks for, and replies; Forgotten if it is not known.  Raises
        what the engine raises."""
        if (run := self._known(number)) is None:
            self._lane.send(Forgotten())
            return
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

    def _known(self, number: int) -> BoundRun | None:
        """Returns a bound run if all that it uses is open."""
        users, run = self._devices.uses.get(number), self._runs.get(number)
        if users is None or run is None:
            self._runs.pop(number, None)
            return None
        self._devices.begin_with(users)
        return run

    def clear(self) -> None:
        """Forgets all runs."""
        self._runs.clear()
