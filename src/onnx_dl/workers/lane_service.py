"""Answers the requests of one caller, in the thread of its lane."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from onnx_dl.errors import OnnxDLError, ProtocolError, SharedMemoryError
from onnx_dl.protocol import failures
from onnx_dl.protocol import lane as m
from onnx_dl.tensors.call_plans import DEVICE_RUNS
from onnx_dl.tensors.device_values import BOUND_RUN
from onnx_dl.transport.worker_lane import WorkerLane
from onnx_dl.workers.device_calls import DeviceCalls
from onnx_dl.workers.device_memory import LaneDevices
from onnx_dl.workers.engine_trims import EngineTrims
from onnx_dl.workers.engines import base as backends
from onnx_dl.workers.engines.base import Backend, CancelToken, DeviceResults
from onnx_dl.workers.gate import Gate
from onnx_dl.workers.limits import RecycleLimits, Watchdog
from onnx_dl.workers.pinned_blocks import LanePins, PinnedBlocks
from onnx_dl.workers.placed_calls import PlacedCalls
from onnx_dl.workers.prepared_calls import PreparedCall, PreparedCalls

_Handlers = Mapping[object, Callable[[Any], object]]
"""Handlers by type of request, and of runs that are bound to devices."""


class Upkeep(NamedTuple):
    """State of a worker's memory and runs that all lanes share."""

    limits: RecycleLimits | None
    watchdog: Watchdog | None
    trims: EngineTrims
    pinned: PinnedBlocks
    turn: AbstractContextManager[object] | None = None
    """Held by each use of a model, one at a time; None: they need not take turns."""


class LaneService:
    """Answers the requests of one lane."""

    def __init__(
        self,
        lane: WorkerLane,
        gate: Gate,
        backend: Backend,
        tokens: dict[int, CancelToken],
        upkeep: Upkeep,
    ) -> None:
        """``tokens``: of all lanes, by the native id of the lane's thread."""
        self._lane = lane
        self._limits, self._watchdog, self._trims, pinned, self._turn = upkeep
        self._gate = gate
        self._backend = backend
        self._tokens = tokens
        self._token = tokens[threading.get_native_id()] = CancelToken()
        device = backends.cuda_device(backend)
        self._pins = None if device is None else LanePins(pinned, device, lane.mappings)
        self._prepared = PreparedCalls(lane, backend, self._token, self._pins)
        self._placed = PlacedCalls(lane, backend, self._token)
        keeps_open = backends.captures_graphs(backend)
        self._devices = LaneDevices(keeps_open=keeps_open, turn=self._turn, part=lane.memories.part)
        lane.take_devices(self._devices.open)
        self._bound = DeviceCalls(lane, backend, self._token, self._devices)
        self._holds = 0

    def run(self) -> None:
        """Answers requests until the caller is gone."""
        # Tables of this frame: in the object, its bound methods would keep it, and its memory, in a cycle.
        uses: _Handlers = {
            int: self._prepared.replay_number,
            BOUND_RUN: self._bound.repeat,
            m.Replay: self._prepared.replay,
            m.Call: self._call,
            m.PlacedCall: self._placed.call if self._pins is None else self._place,
            m.Invoke: self._invoke,
            m.Touch: self._acknowledge,
        }
        others: _Handlers = {
            m.Terminate: self._terminate,
            m.Hold: self._hold,
            m.Unhold: self._unhold,
            m.Trim: self._trim,
            m.Taken: self._refuse_taken,
        }
        if self._turn is not None:
            uses = {kind: functools.partial(self._use_in_turn, handler) for kind, handler in uses.items()}
        lane, token = self._lane, self._token
        while True:
            try:
                request = lane.receive()
            except (OnnxDLError, OSError) as error:  # a lane that is broken ends with the next receive()
                self._fail(error)
                continue
            if request is None:
                return
            token.number = lane.request
            kind: object = type(request)
            if kind is m.Replay and request.plan >= DEVICE_RUNS.start:  # a number, over ZeroMQ
                request, kind = request.plan, int
            if kind is not int:  # a number brings no news of memories
                self._placed.drop_unmapped()
                if self._devices.is_used and kind is not m.Invoke:
                    self._devices.begin()
            elif request >= DEVICE_RUNS.start:
                kind = BOUND_RUN
            if (handler := uses.get(kind)) is not None:
                self._use_model(handler, request)
            elif (handler := others.get(kind)) is not None:
                handler(request)

    def release(self) -> None:
        """Ends the session() blocks of a caller that is gone, and gives its memory on devices back."""
        self._devices.close()
        while self._holds:
            self._end_hold()

    def _use_model(self, handler: Callable[[Any], object], request: object) -> None:
        """Answers a request unless the worker drains; the reply is sent before the gate's count goes down."""
        if not self._gate.enter():
            self._lane.send(m.Draining())
            return
        if self._watchdog is not None:
            self._watchdog.call_begins()
        began = time.monotonic()
        try:
            handler(request)
            if self._devices.lent:
                self._await_taken()
        except Exception as error:  # errors of the engine are the caller's to handle
            self._fail(error)
        finally:
            is_run = type(request) is not m.Touch
            if is_run and self._limits is not None and self._limits.are_reached():
                self._gate.retire()
            now = time.monotonic()
            self._gate.leave(now, now - began if is_run else None)

    def _use_in_turn(self, handler: Callable[[Any], object], request: object) -> None:
        assert self._turn is not None
        with self._turn:
            handler(request)

    def _fail(self, error: Exception) -> None:
        if self._lane.is_answered:  # the reply was sent, but the call could not be kept for replays
            self._lane.give_up()
            return
        try:
            self._lane.send(m.CallFailed(failure=failures.describe(error)))
        except (TypeError, ValueError, OverflowError):  # an attribute of it cannot be encoded; its text can
            self._lane.send(m.CallFailed(failure=failures.describe(RuntimeError(ascii(error)))))
        except SharedMemoryError as no_memory:  # its text is too long for a packet
            self._lane.send(m.CallFailed(failure=failures.describe(no_memory)))

    def _call(self, call: m.Call) -> None:
        self._prepared.drop_unmapped()
        feed: dict[str, object] = {_name(name): self._lane.unpack(value) for name, value in call.feed}
        outputs = self._lane.unpack(call.outputs)
        prepared = None if call.plan is None else PreparedCall(call, outputs, feed)
        if call.background:
            results = self._backend.run_async(
                outputs, feed, call.options, self._token, lambda: self._lane.send(m.Started())
            )
        else:
            results = self._backend.run(outputs, feed, call.options, self._token)
        self._lane.reply(results, keep=call.keep)
        if call.plan is not None and prepared is not None:
            self._prepared.remember(call.plan, prepared)
        if self._pins is not None:
            self._pins.fed(call.feed)
            self._pins.used((), [self._lane.arena.current_scratch])

    def _place(self, call: m.PlacedCall) -> None:
        self._placed.call(call)
        if self._pins is not None:  # mapped memories are never pinned: their makers may truncate them
            self._pins.fed(call.feed)
            self._pins.used((), self._placed.blocks())

    def _invoke(self, request: m.Invoke) -> None:
        devices = self._devices
        args = [self._lane.unpack(arg) for arg in request.args]
        if request.method == BOUND_RUN:
            self._bound.call(*args)
            return
        if devices.is_used:
            devices.begin()
        try:
            result = self._backend.invoke(request.method, args, self._token)
        finally:
            if devices.is_used:  # also a run that failed may still write
                devices.synchronize()
        self._lane.reply(devices.lend(result) if type(result) is DeviceResults else result)

    def _await_taken(self) -> None:
        """Keeps the lent results until their caller has them.  The call is in flight meanwhile: a worker that
        ended would take them along, and the model would have to run again."""
        request = self._lane.receive()
        if request is None:
            self._lane.give_up()  # the caller is gone; nothing tells that a second time
            return
        self._token.number = self._lane.request
        if type(request) is not m.Taken:
            raise ProtocolError("A caller sent a request instead of saying that it has its results.")
        self._lane.reply(self._devices.take_back(request.by_value))

    def _refuse_taken(self, _: m.Taken) -> None:
        self._fail(ProtocolError("Nothing was lent."))

    def _acknowledge(self, _: object) -> None:
        self._lane.reply(None)

    def _terminate(self, request: m.Terminate) -> None:
        if (token := self._tokens.get(request.thread)) is not None:
            token.cancel(request.request)
        self._lane.reply(None)

    def _hold(self, _: m.Hold) -> None:
        if not self._gate.hold():
            self._lane.send(m.Draining())
            return
        self._holds += 1
        self._lane.reply(None)

    def _unhold(self, _: m.Unhold) -> None:
        self._end_hold()
        self._lane.reply(None)

    def _end_hold(self) -> None:
        self._holds -= 1
        self._gate.unhold(time.monotonic())

    def _trim(self, _: m.Trim) -> None:
        self._prepared.clear()
        self._bound.clear()
        self._placed.trim()
        self._lane.arena.trim()
        self._lane.reply(None)
        self._trims.ask(self._backend, time.monotonic())  # after the reply, because it takes a while


def _name(name: object) -> Any:
    """Restores a name in a feed: msgpack turned a tuple, which onnxruntime has to refuse, into a list."""
    return tuple(map(_name, name)) if isinstance(name, list) else name
