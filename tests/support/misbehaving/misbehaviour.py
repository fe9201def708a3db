"""What a process of ours does on request that it should not do, by name.

A test orders it in one of two ways: by a named pipe in the model's folder, at which the engine waits
(:func:`moment`), or by SIGUSR1 and a file (:func:`on_signal`), at any moment, in the main thread.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time
from typing import Any

EVER = 3600.0
LEAK = 192 << 20
"""Bytes."""
LATE = 2.0
"""Seconds after which a late answer comes: its caller has given up by then, also on a busy machine."""

_leaked: list[bytes] = []


def moment(name: str, results: Any = None) -> None:
    """Waits for an order at the pipe of this name in the working directory, if there is one, and obeys."""
    with contextlib.suppress(FileNotFoundError):
        with open(name) as pipe:
            order = pipe.read()
        misbehave(order, results)


def on_signal(*_: Any) -> None:
    """The order is in a file of the folder ``MISBEHAVING``, which is removed when it is obeyed, or from then
    on for ever."""
    with open(_order_file()) as file:
        order = file.read()
    misbehave(order)
    _is_obeyed()


def _order_file() -> str:
    return os.path.join(os.environ["MISBEHAVING"], str(os.getpid()))


def _is_obeyed() -> None:
    with contextlib.suppress(FileNotFoundError):  # it was an order at a pipe
        os.unlink(_order_file())


def _hang() -> None:
    _is_obeyed()
    time.sleep(EVER)


def misbehave(order: str, results: Any = None) -> None:
    if order.startswith("answer "):
        for lane in _lanes(results is not None):
            ANSWERS[order](lane, results)
    elif order.startswith("fact "):
        (worker,) = _instances("onnx_dl.workers.worker", "Worker")
        FACTS[order](worker)
    elif order:
        FAULTS[order]()


# --- ends, hangs, memory -----------------------------------------------------------------------------------


def _segv() -> None:
    import ctypes

    ctypes.string_at(8)


def _with_the_lock() -> None:
    import ctypes

    sys.setswitchinterval(EVER)  # from now on, not only in native code
    _is_obeyed()
    ctypes.PyDLL(None).sleep(int(EVER))


def _heeds_no_sigterm() -> None:
    import ctypes

    ctypes.CDLL(None).signal(signal.SIGTERM, ctypes.c_void_p(1))  # SIG_IGN, from any thread
    os.kill(os.getpid(), signal.SIGTERM)


def _leak() -> None:
    _leaked.append(os.urandom(1) * LEAK)
    time.sleep(0.5)  # who watches looks more often


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(LATE)  # the kernel may stop this thread a moment later than the others


def _close_everything() -> None:
    os.closerange(3, 1 << 16)
    _hang()


FAULTS = {
    "exit": lambda: os._exit(3),
    "SIGSEGV": _segv,
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "abort": os.abort,
    "ignores SIGTERM": _heeds_no_sigterm,
    "hangs": _hang,
    "hangs with the lock": _with_the_lock,
    "stops": _stop,
    "leaks": _leak,
    "takes too much": _leak,
    "closes": _close_everything,
}

# --- to callers --------------------------------------------------------------------------------------------


def _instances(module: str, name: str) -> list[Any]:
    cls = getattr(__import__(module, fromlist=[name]), name)
    return [found for found in gc.get_objects() if type(found) is cls]


def _lanes(own: bool) -> list[Any]:
    """Of the worker: all, or the one of this thread.  Another's ZeroMQ socket is used while that thread waits
    at it, which libzmq does not promise to bear."""
    lanes = _instances("onnx_dl.transport.worker_lane", "WorkerLane")
    return [lane for lane in lanes if not own or lane.thread == threading.get_native_id()]


def _result() -> bytes:
    from onnx_dl.protocol import codec
    from onnx_dl.protocol.lane import Result, Tensor

    return codec.encode(Result(value=Tensor("<f4", (4,), 999, 0)))


def _say_raw(lane: Any, data: bytes) -> None:
    calls = lane._calls
    if lane.over_zmq:
        calls.send(data)
    else:
        lane.channel.post(data)
        calls.ring()


def _say_packet(lane: Any, data: bytes) -> None:
    """On the Unix socket, however calls travel."""
    calls = lane._calls
    lane.channel.post(data)
    if lane.over_zmq:
        calls.post(b"")
    else:
        calls.ring()


def _announce_a_block_that_is_not_sent(lane: Any) -> None:
    import msgspec

    from onnx_dl.protocol import codec
    from onnx_dl.protocol.lane import Envelope

    _say_packet(lane, codec.encode(Envelope(shared=[(7, 4096)], message=msgspec.Raw(_result()))))


def _wrong_results(results: Any) -> list[Any]:
    import numpy as np

    return [np.full(4, -1, np.float32)] if results is None else results


ANSWERS = {
    "answer twice": lambda lane, results: lane.reply(_wrong_results(results)),
    "answer late": lambda lane, results: time.sleep(LATE),
    "answer with another block": lambda lane, results: _say_raw(lane, _result()),
    "answer with another number": lambda lane, results: _with_another_number(lane, results),
    "answer nonsense": lambda lane, results: _say_raw(lane, b"\xff" * 100),
    "answer in part": lambda lane, results: _say_raw(lane, _result()[:-3]),
    "answer without a descriptor": lambda lane, results: _announce_a_block_that_is_not_sent(lane),
}


def _with_another_number(lane: Any, results: Any) -> None:
    lane._calls.number += 5
    lane.reply(_wrong_results(results))
    lane._calls.number -= 5


# --- to the supervisor -------------------------------------------------------------------------------------


def _ready(worker: Any, other: int = 0) -> Any:
    from onnx_dl.core.status import ModelDescription
    from onnx_dl.protocol import control

    return control.WorkerReady(
        worker_id=worker._id + other,
        address="nowhere",
        secret="none",
        description=ModelDescription(),
        seconds=0.0,
    )


def _twice(worker: Any) -> None:
    """Everything from now on, and that it has started."""
    from onnx_dl.protocol import control

    say = worker._send

    def twice(message: Any) -> None:
        say(message)
        say(message)

    worker._send = twice
    worker._send(control.WorkerStarted(worker_id=worker._id))


def _in_part(worker: Any) -> None:
    from onnx_dl.protocol import codec

    worker._control.send(codec.encode(_ready(worker))[:-5])


FACTS = {
    "fact twice": _twice,
    "fact that cannot be": lambda worker: worker._send(_ready(worker)),
    "fact of another worker": lambda worker: worker._send(_ready(worker, 1)),
    "fact nonsense": lambda worker: worker._control.send(b"\xff" * 100),
    "fact in part": _in_part,
}
