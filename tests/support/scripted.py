"""A supervisor and a worker that follow a script: real up to some step, and then mute, or gone.

They live in a thread of the test.  What they do until then, they do with the project's own sockets and
messages, so that a client cannot tell them from real ones.
"""

from __future__ import annotations

import contextlib
import select
import threading
import time
from typing import Any, Final

import pytest
import zmq

from onnx_dl.client import launcher
from onnx_dl.core.status import ModelDescription, ModelStatus
from onnx_dl.protocol import codec, control
from onnx_dl.transport import zeromq
from onnx_dl.transport.router import Router
from onnx_dl.transport.sockets import Channel, Listener, Waker, fresh_address
from onnx_dl.transport.worker_lane import WorkerLane

STEPS: Final = ("greeting", "acquire", "lane", "call", "fate")
"""The steps of a first call, in order.  At "fate" the worker has begun the call and goes away."""
HOWS: Final = ("mute", "closes")

_SECRET: Final = "of the script"


class _Process:
    """In place of the supervisor's process, which has ended."""

    pid = -1

    def poll(self) -> int:
        return 0

    def wait(self, timeout: float | None = None) -> int:
        return 0

    def kill(self) -> None:
        pass


class Scripted:
    """Serves until :meth:`close`.  ``step``: from which on it is ``how``: "mute" or "closes"."""

    def __init__(self, step: str, how: str) -> None:
        self._step, self._how = step, how
        self._address = fresh_address("scripted")
        self._worker_address = fresh_address("scripted-worker")
        self._context = zeromq.context()
        self._control = Router(f"{self._address}/control", 0, lambda name: True)
        self._lifelines = Listener(f"{self._address}/lifeline")
        self._lanes = Listener(self._worker_address)
        self._stop = Waker()
        self._kept: list[Any] = []
        self._serving: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._lanes_served: list[WorkerLane] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def start(self, *_: Any, **__: Any) -> tuple[Any, str, str]:
        """In place of :func:`onnx_dl.client.launcher.start`."""
        return _Process(), self._address, _SECRET

    def close(self) -> None:
        self._stop.wake()
        self._thread.join()
        for kept in self._kept:
            kept.close()
        with self._lock:
            for lane in self._lanes_served:
                lane.hang_up()
        for thread in self._serving:
            thread.join()
        self._lifelines.close()
        self._lanes.close()
        self._control.close(0.0)
        self._context.destroy(
            0
        )  # also of a lane that came while this ended: term() would wait for it for ever

    # --- the thread ---------------------------------------------------------------------------------------

    def _serve(self) -> None:
        poller = zmq.Poller()
        for source in (self._lifelines, self._lanes, self._control, self._stop):
            poller.register(source.fileno(), zmq.POLLIN)
        while self._stop.fileno() not in (ready := zeromq.wait(poller, None)):
            if self._lifelines.fileno() in ready and (channel := self._lifelines.accept()):
                self._greet(channel)
            if self._lanes.fileno() in ready and (channel := self._lanes.accept()):
                self._open_lane(channel)
            if self._control.fileno() in ready:
                for identity, data in self._control.receive(time.monotonic()):
                    self._answer(identity, control.from_client(data))

    def _greet(self, channel: Channel) -> None:
        channel.receive(1.0)
        self._kept.append(channel)
        if self._step == "greeting":
            if self._how == "closes":
                channel.close()
        else:
            channel.send(codec.encode(control.Welcome()))

    def _answer(self, identity: bytes, message: Any) -> None:
        answer: Any = None
        match message:
            case control.Acquire() if self._step == "acquire" and self._how == "closes":
                self._kept[0].close()
            case control.Acquire(ticket=ticket) if self._step != "acquire":
                answer = control.Granted(
                    ticket=ticket,
                    worker_id=1,
                    pid=1,
                    address=self._worker_address,
                    secret=_SECRET,
                    description=ModelDescription(),
                )
            case control.AskStatus(ticket=ticket) if self._step != "acquire":
                models: list[ModelStatus] = []
                answer = control.Status(ticket=ticket, seq=0, supervisor_pid=1, models=models)
            case control.AskOutcome() if self._how == "closes":
                self._kept[0].close()
            case control.Shutdown(ticket=ticket):
                answer = control.Bye(ticket=ticket)
        if answer is not None:
            self._control.send(identity, codec.encode(answer))

    def _open_lane(self, channel: Channel) -> None:
        self._kept.append(channel)
        if self._step == "lane":
            if self._how == "closes":
                channel.close()
            return
        thread = threading.Thread(target=self._serve_lane, args=(channel,), daemon=True)
        self._serving.append(thread)
        thread.start()

    def _serve_lane(self, channel: Channel) -> None:
        with contextlib.suppress(Exception):
            lane = WorkerLane(self._context, channel, _SECRET, 5.0)
            with self._lock:
                self._lanes_served.append(lane)
            try:
                if self._step == "fate":
                    lane.receive()  # begins it
                elif self._how == "mute":
                    self._wait_for_its_end(channel)
            finally:
                with self._lock:
                    self._lanes_served.remove(lane)
                    lane.close()

    @staticmethod
    def _wait_for_its_end(channel: Channel) -> None:
        poll = select.poll()
        poll.register(channel.fileno(), 0)  # what the caller says is not read
        poll.poll()


@contextlib.contextmanager
def scripted(monkeypatch: pytest.MonkeyPatch, step: str, how: str) -> Any:
    """In the block, hosts of this process start nothing but this."""
    script = Scripted(step, how)
    monkeypatch.setattr(launcher, "start", script.start)
    try:
        yield script
    finally:
        script.close()
