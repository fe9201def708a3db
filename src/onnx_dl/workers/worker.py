"""A worker process: loads one model, serves lanes, drains and exits.

The main thread talks to the supervisor and accepts lanes.  Each lane has a thread of its own, which receives,
runs and replies without handing anything over.  Whether a call may begin and when the worker may end is
decided by :mod:`onnx_dl.workers.gate`; the model runs behind :mod:`onnx_dl.workers.engines.base`.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import threading
import time
from typing import Final, NoReturn

import msgspec
import zmq

from onnx_dl.concurrency import spawning
from onnx_dl.core.spec import ModelSpec, blob_tag
from onnx_dl.core.text import file_name
from onnx_dl.errors import ProcessesExhausted, SandboxUnavailable
from onnx_dl.protocol import codec, control, failures, template
from onnx_dl.protocol.lane import CallFailed
from onnx_dl.system import thread_attributes
from onnx_dl.system.heap import trim_heap
from onnx_dl.system.process_title import set_title
from onnx_dl.transport import sockets, zeromq
from onnx_dl.transport.gauges import Gauges
from onnx_dl.transport.handshakes import Handshakes
from onnx_dl.transport.sockets import Channel, Waker, fresh_address
from onnx_dl.transport.worker_lane import WorkerLane
from onnx_dl.workers import standby, warmup
from onnx_dl.workers.engine_trims import EngineTrims
from onnx_dl.workers.engines import base as backends
from onnx_dl.workers.engines.base import Backend, CancelToken, NotInCache
from onnx_dl.workers.gate import Gate
from onnx_dl.workers.lane_service import LaneService, Upkeep
from onnx_dl.workers.limits import AnonymousMemory, RecycleLimits, Watchdog
from onnx_dl.workers.load_cache.rules import SaveOrder
from onnx_dl.workers.pinned_blocks import PinnedBlocks
from onnx_dl.workers.sandbox import rights

_RESERVE: Final = 16
"""Descriptors kept free for the model and for lanes that are open."""
_GREETING_TIMEOUT: Final = 1.0
"""Seconds that a caller has for its greeting once it has begun to send on a lane."""


class Worker:
    """One model in this process."""

    def __init__(
        self,
        spawn: template.Spawn,
        lifeline: int,
        gauges: Gauges,
        blobs: list[int],
        refusal: Exception | None = None,
    ) -> None:
        """``refusal``: the reason for which it must not load its model."""
        self._id = spawn.worker_id
        self._gauges = gauges
        self._refusal = refusal
        self._is_standby = spawn.standby
        self._is_confined = spawn.sandbox is not None
        self._lifeline = Channel.from_fd(lifeline)
        self._blobs = dict(zip(spawn.blobs, blobs, strict=True))
        """Descriptors by :func:`onnx_dl.core.spec.blob_tag`."""
        self._context = zeromq.context()
        self._control = zeromq.dealer(self._context, spawn.control, spawn.identity)
        self._secret = secrets.token_hex(16)
        self._address = fresh_address("worker")
        self._waker = Waker()
        self._limits: RecycleLimits | None = None
        self._watchdog: Watchdog | None = None
        self._pinned = PinnedBlocks()
        self._lanes: set[WorkerLane] = set()
        self._disconnected: set[Channel] = set()
        """Channels of callers that are gone and whose lanes are not closed yet."""
        self._lanes_lock = threading.Lock()
        self._tokens: dict[int, CancelToken] = {}
        """Lanes by native id of their thread."""
        self._finished: queue.SimpleQueue[Channel] = queue.SimpleQueue()
        """Channels of lanes whose threads have ended."""

    def serve(self) -> NoReturn:
        """Runs until the supervisor sends Exit or is gone; never returns."""
        door = self._stand_by() if self._is_standby else None
        self._send(control.WorkerStarted(worker_id=self._id))
        while isinstance(message := self._receive(), control.Prepare):
            standby.prepare(message.device_id)
            self._send(control.WorkerPrepared(worker_id=self._id))
        if isinstance(message, control.Load):
            self._load(message, door)
        _exit()

    def _stand_by(self) -> Handshakes:
        """Prepares all but the model, and waits until a model needs this process."""
        standby.rehearse()
        door = _open_door(self._address, is_sandboxed=False)
        self._send(control.WorkerStarted(worker_id=self._id))
        if (assigned := standby.await_assignment(self._lifeline)) is None:
            _exit()
        assign, self._blobs = assigned
        self._id = assign.worker_id
        if assign.thread_attributes is not None:  # libzmq's threads run already
            thread_attributes.apply_to_process(assign.thread_attributes)
        return door

    def _load(self, load: control.Load, door: Handshakes | None) -> None:
        """``door``: where it listens already."""
        if load.early:
            self._send(control.WorkerLoading(worker_id=self._id))
        spec, started = load.spec, time.monotonic()
        set_title(f"worker {file_name(spec.name)}")
        blobs = {name: fd for name in spec.blobs if (fd := self._blobs.get(blob_tag(name))) is not None}
        try:
            if self._refusal is not None:
                raise self._refusal
            if spec.sandbox and not self._is_confined:
                raise SandboxUnavailable("The worker was started without a sandbox.")
            door = door or _open_door(self._address, spec.sandbox)
            if not spec.members:  # each member of a group has a folder of its own
                backends.enter(spec.cwd)
            backend = backends.load(spec, blobs, mapped=load.mapped)
            loaded = time.monotonic()
            description = backend.describe()
            warmup.run_all(backend, spec, description, load.warmups)
            trim_heap()  # before WorkerReady, after which memory is measured
            ready = time.monotonic()
            self._gate = Gate(load.ttl, ready, self._waker.wake, self._gauges)
            self._trims = EngineTrims(self._gate.in_flight, self._waker.wake)
            self._set_limits(spec)
        except Exception as error:  # any error of the engine is sent to the proxies that wait for the model
            spawning.note_shortage(error)
            unsaved, failure = isinstance(error, NotInCache), failures.describe(error)
            self._send(control.WorkerFailed(worker_id=self._id, failure=failure, unsaved=unsaved))
            self._receive()
            return
        self._send(
            control.WorkerReady(
                worker_id=self._id,
                address=self._address,
                secret=self._secret,
                description=description,
                seconds=ready - started,
                **backends.origin(backend)._asdict(),
            )
        )
        with contextlib.suppress(Exception):  # a failure of background work must not end a model in use
            for order in backend.ready(loaded - started, blobs):
                self._send(_saveable(self._id, order))
        sockets.close_all(self._blobs.values())
        with contextlib.closing(door):
            self._run(door, backend)

    def _set_limits(self, spec: ModelSpec) -> None:
        if spec.max_memory is not None or spec.max_runs is not None:
            self._limits = RecycleLimits(spec.max_memory, spec.max_runs)
        if spec.max_memory_hard is not None:
            read = AnonymousMemory().read
            self._watchdog = Watchdog(spec.max_memory_hard, read, self._gate.in_flight, self._exit_for_memory)
            self._watchdog.start()

    def _exit_for_memory(self, nbytes: int) -> NoReturn:
        """Ends the process because it has this much memory; the supervisor reads the figure in the gauges."""
        self._gauges.exceeded(nbytes)
        os._exit(os.EX_TEMPFAIL)

    def _run(self, door: Handshakes, backend: Backend) -> None:
        """Runs the main thread's loop, from WorkerReady to Exit."""
        poller = zmq.Poller()
        for source in (self._control, self._lifeline, door, self._waker):
            poller.register(source if source is self._control else source.fileno(), zmq.POLLIN)
        callers: dict[int, Channel] = {}
        drained = False
        while True:
            decision = self._gate.judge(time.monotonic(), self._last_touch())
            if decision.expired:
                self._send(control.WorkerDraining(worker_id=self._id, reason=self._gate.reason))
            if decision.drained and not drained:
                drained = True
                backend.close()
                self._send(control.WorkerDrained(worker_id=self._id))
            self._trims.run_due(time.monotonic())
            ready = zeromq.wait(poller, _timeout(decision.wait, door.next_deadline(), self._trims.next_at))
            self._waker.clear()
            if self._lifeline.fileno() in ready:
                return
            if self._control in ready and not self._handle_message():
                self._flush()
                return
            for fd in [fd for fd in callers if fd in ready]:
                poller.unregister(fd)
                self._on_caller_gone(callers.pop(fd))
            self._close_finished(poller, callers)
            door.on_tick(time.monotonic())
            for channel in door.ready(time.monotonic()) if door.fileno() in ready else ():
                # Without POLLIN: the lane's own thread reads what the caller sends.
                poller.register(channel.fileno(), zmq.POLLERR)
                callers[channel.fileno()] = channel
                self._start_lane(channel, backend)

    def _flush(self) -> None:
        """Waits for replies that ZeroMQ still holds: a caller that lost one would repeat its call."""
        with self._lanes_lock:
            over_zmq = any(lane.over_zmq for lane in self._lanes)
        if over_zmq:
            self._control.close()
            self._context.term()  # lanes see that and close; no call runs on them any more

    def _handle_message(self) -> bool:
        """Handles one message of the supervisor; returns false if the worker has to exit."""
        match self._receive():
            case control.Retime(ttl=ttl, used=used):
                self._gate.retime(ttl, time.monotonic() if used else None)
            case control.Drain():
                self._gate.drain()
            case control.DrainIfIdle():
                self._gate.close_if_idle()
            case control.Exit():
                return False
        return True

    def _last_touch(self) -> float:
        with self._lanes_lock:
            return max((lane.last_touch() for lane in self._lanes), default=0.0)

    def _on_caller_gone(self, channel: Channel) -> None:
        """Cancels the call of a caller that ended or closed its lane, and wakes the lane's waiting thread."""
        with self._lanes_lock:
            self._disconnected.add(channel)
            for lane in self._lanes:
                if lane.channel is channel:
                    lane.hang_up()
                    if (token := self._tokens.get(lane.thread)) is not None:
                        token.cancel(lane.request)

    def _close_finished(self, poller: zmq.Poller, callers: dict[int, Channel]) -> None:
        """Closes the channels of ended lanes: in this thread, which polls them."""
        while not self._finished.empty():
            channel = self._finished.get()
            if callers.pop(channel.fileno(), None) is not None:
                poller.unregister(channel.fileno())
            channel.close()
            self._disconnected.discard(channel)

    def _start_lane(self, channel: Channel, backend: Backend) -> None:
        thread = threading.Thread(target=self._serve_lane, args=(channel, backend), daemon=True)
        try:
            spawning.start(thread, "A call at the same time as others")
        except ProcessesExhausted as error:  # concerns this caller only
            _reject_lane(channel, error)
            self._finish(channel)

    def _finish(self, channel: Channel) -> None:
        self._finished.put(channel)
        self._waker.wake()

    def _serve_lane(self, channel: Channel, backend: Backend) -> None:
        """Serves one caller until it is gone."""
        lane = None
        try:
            with contextlib.suppress(Exception):  # the peer is not one of our callers
                lane = WorkerLane(self._context, channel, self._secret, _GREETING_TIMEOUT)
            if lane is not None:
                self._serve_caller(lane, backend)
        finally:
            self._finish(channel)

    def _serve_caller(self, lane: WorkerLane, backend: Backend) -> None:
        with self._lanes_lock:
            self._lanes.add(lane)
            if lane.channel in self._disconnected:  # it left after its greeting
                lane.hang_up()
        model = backends.member(backend, lane.model)
        upkeep = Upkeep(self._limits, self._watchdog, self._trims, self._pinned, backends.turn(backend))
        service = LaneService(lane, self._gate, model, self._tokens, upkeep)
        try:
            service.run()
        finally:
            self._tokens.pop(threading.get_native_id())
            with self._lanes_lock:
                self._lanes.discard(lane)
                lane.close_calls()
            service.release()

    def _send(self, message: codec.Message) -> None:
        self._control.send(codec.encode(message))

    def _receive(self) -> control.ToWorker:
        """Waits for the next message of the supervisor; exits if the supervisor is gone."""
        poller = zmq.Poller()
        poller.register(self._control, zmq.POLLIN)
        poller.register(self._lifeline.fileno(), zmq.POLLIN)
        if self._control not in zeromq.wait(poller, None):
            _exit()
        return control.to_worker(self._control.recv())


def _saveable(worker_id: int, order: SaveOrder) -> control.Saveable:
    """Tells the supervisor that the model is worth saving."""
    return control.Saveable(
        worker_id=worker_id,
        key=order.key,
        nbytes=order.in_memory,
        blob=order.spec.blob,
        order=msgspec.json.encode(order).decode(),
        environment=order.spec.environment,
    )


def _open_door(address: str, is_sandboxed: bool) -> Handshakes:
    """Listens for callers, before a sandbox takes sockets away."""
    door = Handshakes(address, _RESERVE, lambda channel, why: None)  # a rejected caller sees EOF
    if is_sandboxed:
        rights.lock()
    return door


def _reject_lane(channel: Channel, error: Exception) -> None:
    """Tells a caller why it has no lane.  Reads its greeting first, or the caller sees a reset."""
    with contextlib.suppress(OSError):
        if (received := channel.receive(0)) is not None:
            sockets.close_all(received[1])
        channel.send(codec.encode(CallFailed(failure=failures.describe(error))))


def _timeout(wait: float | None, *times: float | None) -> float | None:
    """Returns the seconds until the earliest: a duration, and monotonic times; None: no limit."""
    now = time.monotonic()
    left = [max(0.0, at - now) for at in times if at is not None]
    return min(left if wait is None else [wait, *left], default=None)


def _exit() -> NoReturn:
    """Ends the process without destructors: freeing a model takes longer, and native code may hang."""
    os._exit(0)
