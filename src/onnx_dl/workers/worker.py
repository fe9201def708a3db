"""The life of a worker process: load one model, serve lanes, drain, leave.

The main thread talks to the supervisor and accepts lanes; each lane has a thread of its own, which receives,
runs and replies without handing anything over.  Whether a call may begin and when the worker may end is
decided by :mod:`onnx_dl.workers.gate`; what runs is behind :mod:`onnx_dl.workers.engines.base`.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any, Final, NoReturn

import zmq

from onnx_dl.concurrency import spawning
from onnx_dl.core.spec import ModelSpec, blob_tag
from onnx_dl.errors import OnnxDLError, ProcessesExhausted, SharedMemoryError
from onnx_dl.protocol import codec, control, failures, template
from onnx_dl.protocol.lane import (
    Again,
    Call,
    CallFailed,
    Draining,
    Hold,
    Invoke,
    Started,
    Terminate,
    Touch,
    Trim,
    Unhold,
)
from onnx_dl.transport import sockets
from onnx_dl.transport.addresses import fresh_address
from onnx_dl.transport.gauges import Gauges
from onnx_dl.transport.handshakes import Door
from onnx_dl.transport.sockets import Channel, Waker
from onnx_dl.transport.worker_lane import WorkerLane
from onnx_dl.workers import heap, warmup
from onnx_dl.workers.cancellation import Halt
from onnx_dl.workers.engines import base as backends
from onnx_dl.workers.engines.base import Backend, Unsaved
from onnx_dl.workers.gate import Gate
from onnx_dl.workers.heap import Allowance, Own
from onnx_dl.workers.prepared_calls import Repeat, Repeats
from onnx_dl.workers.watchdog import Watchdog

_RESERVE: Final = 16
"""Descriptors that stay free for the model and for lanes that are open."""
_GREETING: Final = 1.0
"""Seconds for a caller that has begun to say hello on a lane."""


class Worker:
    """One model in this process."""

    def __init__(self, spawn: template.Spawn, lifeline: int, gauges: Gauges, blobs: list[int]) -> None:
        self._id = spawn.worker_id
        self._gauges = gauges
        self._lifeline = Channel.from_fd(lifeline)
        self._tagged = dict(zip(spawn.blobs, blobs, strict=True))
        self._context = sockets.context()
        self._control = sockets.dealer(self._context, spawn.control, spawn.identity)
        self._secret = secrets.token_hex(16)
        self._address = fresh_address("worker")
        self._waker = Waker()
        self._allowance: Allowance | None = None
        self._watchdog: Watchdog | None = None
        self._lanes: set[WorkerLane] = set()
        self._gone: set[Channel] = set()
        """Of callers whose lanes are not closed yet."""
        self._lanes_lock = threading.Lock()
        self._halts: dict[int, Halt] = {}
        """By the thread that serves the lane."""
        self._done: queue.SimpleQueue[Channel] = queue.SimpleQueue()

    def serve(self) -> NoReturn:
        """Runs until the supervisor says Exit or is gone; never returns."""
        self._say(control.WorkerStarted(worker_id=self._id))
        order = self._hear()
        if isinstance(order, control.Load):
            self._load(order)
        _leave()

    def _load(self, order: control.Load) -> None:
        started = time.monotonic()
        tagged = {name: self._tagged.get(blob_tag(name)) for name in order.spec.blobs}
        blobs = {name: fd for name, fd in tagged.items() if fd is not None}
        try:
            if not order.spec.members:  # each of a group has its own
                backends.enter(order.spec.cwd)
            backend = backends.load(order.spec, blobs, mapped=order.mapped)
            loaded = time.monotonic()
            description = backend.describe()
            warmup.run_all(backend, order.spec, description, order.warmups)
            heap.trim()  # before ready, so that what is measured then is what stays
            ready = time.monotonic()
            self._gate = Gate(order.ttl, ready, self._waker.wake, self._gauges)
            self._set_limits(order.spec)
            door = Door(self._address, _RESERVE, lambda channel, why: None)  # a caller sees EOF
        except Exception as error:  # whatever the engine raised belongs to whoever asked for the model
            spawning.note_shortage(error)
            unsaved = isinstance(error, Unsaved)
            failure = failures.describe(error)
            self._say(control.WorkerFailed(worker_id=self._id, failure=failure, unsaved=unsaved))
            self._hear()
            return
        self._say(
            control.WorkerReady(
                worker_id=self._id,
                address=self._address,
                secret=self._secret,
                description=description,
                seconds=ready - started,
                **backends.origin(backend)._asdict(),
            )
        )
        with contextlib.suppress(Exception):  # what is done in the background must not end a model in use
            for save in backend.ready(loaded - started, blobs):
                self._say(control.Saveable(worker_id=self._id, **save._asdict()))
        sockets.close_all(self._tagged.values())
        with contextlib.closing(door):
            self._attend(door, backend)

    def _set_limits(self, spec: ModelSpec) -> None:
        if spec.max_memory is not None or spec.max_runs is not None:
            self._allowance = Allowance(spec.max_memory, spec.max_runs)
        if spec.max_memory_hard is not None:
            self._watchdog = Watchdog(spec.max_memory_hard, Own(), self._gate.in_flight, self._end_for)
            self._watchdog.start()

    def _end_for(self, nbytes: int) -> NoReturn:
        """Ends the process for having so many bytes, which it leaves where the supervisor looks."""
        self._gauges.exceeded(nbytes)
        os._exit(os.EX_TEMPFAIL)

    def _attend(self, door: Door, backend: Backend) -> None:
        """The main thread's loop, from ready to Exit."""
        poller = zmq.Poller()
        for source in (self._control, self._lifeline, door, self._waker):
            poller.register(source if source is self._control else source.fileno(), zmq.POLLIN)
        callers: dict[int, Channel] = {}
        drained = False
        while True:
            verdict = self._gate.judge(time.monotonic(), self._last_touch())
            if verdict.expired:
                self._say(control.WorkerDraining(worker_id=self._id, reason=self._gate.reason))
            if verdict.drained and not drained:
                drained = True
                backend.close()
                self._say(control.WorkerDrained(worker_id=self._id))
            ready = sockets.wait(poller, _sooner(verdict.wait, door.next_deadline()))
            self._waker.clear()
            if self._lifeline.fileno() in ready:
                return
            if self._control in ready and not self._obey():
                self._flush()
                return
            for fd in [fd for fd in callers if fd in ready]:
                poller.unregister(fd)
                self._caller_gone(callers.pop(fd))
            self._bury_lanes(poller, callers)
            door.on_tick(time.monotonic())
            for channel in door.spoken(time.monotonic()) if door.fileno() in ready else ():
                # Without POLLIN: what the caller says is for the lane's own thread.
                poller.register(channel.fileno(), zmq.POLLERR)
                callers[channel.fileno()] = channel
                self._start_lane(channel, backend)

    def _flush(self) -> None:
        """Waits for replies that ZeroMQ still holds: a caller who lost one would make its call again."""
        with self._lanes_lock:
            over_zmq = any(lane.over_zmq for lane in self._lanes)
        if over_zmq:
            self._control.close()
            self._context.term()  # lanes hear of it and close; nothing runs on them any more

    def _obey(self) -> bool:
        """Follows one order of the supervisor; false if it is to leave."""
        match self._hear():
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

    def _caller_gone(self, channel: Channel) -> None:
        """A caller's process ended, or it gave its lane up; the lane's thread waits for a bell that nobody
        else will ring."""
        with self._lanes_lock:
            self._gone.add(channel)
            for lane in self._lanes:
                if lane.channel is channel:
                    lane.hang_up()
                    if (halt := self._halts.get(lane.thread)) is not None:
                        halt.ask(lane.request)  # nobody waits for what runs now

    def _bury_lanes(self, poller: zmq.Poller, callers: dict[int, Channel]) -> None:
        """Closes lanes whose threads are done: here, so that no descriptor is closed that is polled."""
        while not self._done.empty():
            channel = self._done.get()
            if callers.pop(channel.fileno(), None) is not None:
                poller.unregister(channel.fileno())
            channel.close()
            self._gone.discard(channel)

    def _start_lane(self, channel: Channel, backend: Backend) -> None:
        thread = threading.Thread(target=self._serve_lane, args=(channel, backend), daemon=True)
        try:
            spawning.start(thread, "A call at the same time as others")
        except ProcessesExhausted as error:  # this caller has to do without, the others must not
            _turn_away(channel, error)
            self._done.put(channel)
            self._waker.wake()

    def _serve_lane(self, channel: Channel, backend: Backend) -> None:
        """One caller, until it is gone."""
        lane = None
        try:
            with contextlib.suppress(Exception):  # whoever it was, it is no caller of ours
                lane = WorkerLane(self._context, channel, self._secret, _GREETING)
            if lane is not None:
                self._serve_caller(lane, backend)
        finally:
            self._done.put(channel)
            self._waker.wake()

    def _serve_caller(self, lane: WorkerLane, backend: Backend) -> None:
        with self._lanes_lock:
            self._lanes.add(lane)
            if lane.channel in self._gone:  # between its greeting and now
                lane.hang_up()
        own = backends.member(backend, lane.model)
        service = LaneService(lane, self._gate, own, self._halts, self._allowance, self._watchdog)
        try:
            service.run()
        finally:
            self._halts.pop(threading.get_native_id())
            with self._lanes_lock:
                self._lanes.discard(lane)
                lane.close_calls()
            service.release()

    def _say(self, message: codec.Message) -> None:
        self._control.send(codec.encode(message))

    def _hear(self) -> Any:
        """The next order; leaves the process if the supervisor is gone."""
        poller = zmq.Poller()
        poller.register(self._control, zmq.POLLIN)
        poller.register(self._lifeline.fileno(), zmq.POLLIN)
        if self._control not in sockets.wait(poller, None):
            _leave()
        return control.to_worker(self._control.recv())


def _turn_away(channel: Channel, error: Exception) -> None:
    """Tells a caller why it has no lane.  What it said is read first, or it sees a reset."""
    with contextlib.suppress(OSError):
        if (said := channel.receive(0)) is not None:
            sockets.close_all(said[1])
        channel.send(codec.encode(CallFailed(failure=failures.describe(error))))


class LaneService:
    """Answers the requests of one lane."""

    def __init__(
        self,
        lane: WorkerLane,
        gate: Gate,
        backend: Backend,
        halts: dict[int, Halt],
        allowance: Allowance | None,
        watchdog: Watchdog | None,
    ) -> None:
        self._lane = lane
        self._allowance = allowance
        self._watchdog = watchdog
        self._gate = gate
        self._backend = backend
        self._halts = halts
        self._halt = halts[threading.get_native_id()] = Halt()
        self._repeats = Repeats(lane, backend, self._halt)
        self._holds = 0

    def run(self) -> None:
        """Until the caller is gone."""
        while True:
            try:
                request = self._lane.receive()
            except (OnnxDLError, OSError) as error:  # the lane ends with the next one if it is of no more use
                self._fail(error)
                continue
            self._halt.begin(self._lane.request)
            if type(request) is int:
                self._guarded(self._repeats.answer_number, request)
                continue
            match request:
                case Again():
                    self._guarded(self._repeats.answer, request)
                case Call():
                    self._guarded(self._call, request)
                case Invoke():
                    self._guarded(self._invoke, request)
                case Terminate(thread=thread, request=number):
                    if (halt := self._halts.get(thread)) is not None:
                        halt.ask(number)
                    self._lane.reply(None)
                case Touch():
                    self._guarded(lambda _: self._lane.reply(None), request)
                case Hold():
                    self._hold()
                case Unhold():
                    self._unhold()
                    self._lane.reply(None)
                case Trim():
                    self._repeats.clear()
                    self._lane.trim()
                    self._lane.reply(None)
                case None:
                    return

    def release(self) -> None:
        """Gives up what a caller held who is gone."""
        while self._holds:
            self._unhold()

    def _guarded(self, answer: Callable[[Any], object], request: object) -> None:
        """Answers, unless the worker drains; the reply is sent before the call ends."""
        if not self._gate.enter():
            self._lane.say(Draining())
            return
        if self._watchdog is not None:
            self._watchdog.call_begins()
        began = time.monotonic()
        try:
            answer(request)
        except Exception as error:  # the engine's errors are the caller's
            self._fail(error)
        finally:
            is_run = type(request) is not Touch
            if is_run and self._allowance is not None and self._allowance.is_used_up():
                self._gate.retire()
            now = time.monotonic()
            self._gate.leave(now, now - began if is_run else None)

    def _fail(self, error: Exception) -> None:
        if self._lane.is_answered:  # what was to be remembered of the call was not
            self._lane.give_up()
            return
        try:
            self._lane.say(CallFailed(failure=failures.describe(error)))
        except (TypeError, ValueError, OverflowError):  # an attribute of it cannot travel; its text can
            self._lane.say(CallFailed(failure=failures.describe(RuntimeError(ascii(error)))))
        except SharedMemoryError as no_memory:  # its text is too long for a packet
            self._lane.say(CallFailed(failure=failures.describe(no_memory)))

    def _call(self, call: Call) -> None:
        self._repeats.review()
        feed = {_key(name): self._lane.unpack(value) for name, value in call.feed}
        outputs = self._lane.unpack(call.outputs)
        repeat = None if call.plan is None else Repeat(call, outputs, feed)
        if call.background:
            run = self._backend.run_async(
                outputs, feed, call.options, self._halt, lambda: self._lane.say(Started())
            )
        else:
            run = self._backend.run(outputs, feed, call.options, self._halt)
        self._lane.reply(run, keep=call.keep)
        if call.plan is not None and repeat is not None:
            self._repeats.remember(call.plan, repeat)

    def _invoke(self, request: Invoke) -> None:
        args = [self._lane.unpack(arg) for arg in request.args]
        self._lane.reply(self._backend.invoke(request.method, args, self._halt))

    def _hold(self) -> None:
        if not self._gate.hold():
            self._lane.say(Draining())
            return
        self._holds += 1
        self._lane.reply(None)

    def _unhold(self) -> None:
        self._holds -= 1
        self._gate.unhold(time.monotonic())


def _sooner(wait: float | None, deadline: float | None) -> float | None:
    """Seconds to wait, for so many at most and until this moment; None: for ever."""
    left = None if deadline is None else max(0.0, deadline - time.monotonic())
    return min((each for each in (wait, left) if each is not None), default=None)


def _key(name: Any) -> Any:
    """A name in a feed; msgpack has no tuples, which onnxruntime shall refuse in its own words."""
    return tuple(map(_key, name)) if isinstance(name, list) else name


def _leave() -> NoReturn:
    """Ends the process without destructors: freeing a model piece by piece takes longer than dying, and what
    native code does at exit is what hangs."""
    os._exit(0)
