"""A call that ends early, at whichever of its steps, leaves the lane as it was, or no lane.

Later calls are right, and none is answered with what another call was to get.  Steps of the application are
made to fail in place; the worker is a real process.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from onnx_dl import InferenceSessionProxy, ModelHost, RunTimeout
from onnx_dl.client.lane_pool import LanePool
from onnx_dl.client.pending_call import PendingCall
from onnx_dl.protocol import lane as m
from onnx_dl.tensors import arena, call_codec, call_plans, repeated_call, values
from onnx_dl.tensors.adoptions import Adoptions
from onnx_dl.tensors.call_codec import CallCodec
from onnx_dl.transport import call_channel, doorbell, lane_socket, sockets, zmq_channel
from onnx_dl.transport.client_lane import ClientLane
from tests.contract.both import CPU, loop
from tests.support.slow import identity_model
from tests.support.waiting import worker_pid
from tests.tensors.test_zero_copy import mapped_segments

pytestmark = pytest.mark.slow

STEPS: list[tuple[Any, str]] = [
    (CallCodec, "repeated"),
    (CallCodec, "encode_call"),
    (CallCodec, "_shared_inputs"),
    (CallCodec, "_encode_new"),
    (call_codec, "key_of"),
    (call_codec, "InputLayout"),
    (Adoptions, "number"),
    (arena.Arena, "scratch"),
    (arena.Arena, "_create"),
    (values.Packer, "pack"),
    (values.Packer, "_place_array"),
    (call_plans.InputLayout, "fill"),
    (call_plans.InputLayout, "_copy"),
    (call_plans.CallPlans, "next_number"),
    (ClientLane, "send"),
    (arena.Block, "ask"),
    (lane_socket.LaneSocket, "send"),
    (sockets.Channel, "post"),
    (call_channel.CallerBellChannel, "send"),
    (call_channel.CallerBellChannel, "replay"),
    (doorbell.CallerBell, "ring"),
    (zmq_channel.ZmqChannel, "send"),
    (call_channel.CallerBellChannel, "next"),
    (zmq_channel.ZmqChannel, "next"),
    (lane_socket.LaneSocket, "next"),
    (ClientLane, "receive"),
    (CallCodec, "decode"),
    (CallCodec, "_learn"),
    (CallCodec, "_prepare_reading"),
    (repeated_call.RepeatedCall, "fill"),
    (repeated_call.RepeatedCall, "results"),
    (ClientLane, "repeat"),
    (values.Unpacker, "unpack"),
    (call_plans.CallPlans, "remember"),
    (PendingCall, "_result"),
    (LanePool, "put"),
]
SMALL, LARGE = 3, 50_000


class Injected(Exception):
    """What a step raises."""


@contextlib.contextmanager
def failing(owner: Any, name: str, when: str, error: type[BaseException]) -> Iterator[list[None]]:
    """In the block, the step fails the first time that this thread is at it.  Yields whether it was."""
    original, thread, reached = getattr(owner, name), threading.get_ident(), list[None]()

    def step(*args: Any, **kwargs: Any) -> Any:
        fails = threading.get_ident() == thread and not reached
        if fails:
            reached.append(None)
        if fails and when == "before":
            raise error
        result = original(*args, **kwargs)
        if fails:
            raise error
        return result

    setattr(owner, name, step)
    try:
        yield reached
    finally:
        setattr(owner, name, original)


@pytest.fixture(params=["socket", "zmq"])
def proxy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[InferenceSessionProxy]:
    monkeypatch.setenv("ONNX_DL_LANE", request.param)
    with ModelHost() as host:
        yield InferenceSessionProxy(identity_model(), providers=CPU, host=host)


class Shapes:
    """Calls of shapes that come once, so that each of them is said in full."""

    def __init__(self, proxy: InferenceSessionProxy) -> None:
        self._proxy = proxy
        self._next = 1

    def new(self, base: int = 0, *, lies_there: bool = False) -> np.ndarray:
        self._next += 1
        made = (
            self._proxy.empty((base + self._next,)) if lies_there else np.empty(base + self._next, np.float32)
        )
        made[:] = self._next
        return made

    def warm(self, count: int) -> None:
        for _ in range(count):
            right(self._proxy, self.new())


def right(proxy: InferenceSessionProxy, x: np.ndarray) -> None:
    (y,) = proxy.run(None, {"x": x})
    assert y.shape == x.shape and np.array_equal(x, y)


def ways(shapes: Shapes) -> list[np.ndarray]:
    """Inputs that are copied, small and large, and one that lies in shared memory."""
    return [shapes.new(SMALL), shapes.new(LARGE), shapes.new(LARGE, lies_there=True)]


def trimmed(proxy: InferenceSessionProxy) -> None:
    """Nothing is there any more that the next call needs."""
    model = proxy._handle.model()
    call = model.prepare(proxy._handle.lease, lambda lane: m.Touch())
    if call.lane.trim():
        call.release()
    else:  # the worker got no processor in time: a caller closes the lane then, too
        call.lane.close()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_call_that_fails_at_any_step(proxy: InferenceSessionProxy, when: str) -> None:
    shapes, reached = Shapes(proxy), set()
    known, known_there = shapes.new(SMALL), shapes.new(LARGE, lies_there=True)
    for index, (owner, name) in enumerate(STEPS):
        error = (Injected, KeyboardInterrupt)[index % 2]
        for turn, x in enumerate((shapes.new(SMALL), shapes.new(LARGE, lies_there=True), known, known_there)):
            shapes.warm((1, 64)[turn % 2])  # then the next one that is new replaces all
            right(proxy, known)
            if turn == 1:
                trimmed(proxy)
            with failing(owner, name, when, error) as at, contextlib.suppress(error):
                right(proxy, shapes.new(LARGE))
                for _ in range(4):
                    right(proxy, x)
            if at:
                reached.add(name)
            for after in (x, shapes.new(), known, known_there, x):
                right(proxy, after)
    other_lane = (
        {"replay", "ring", "results", "repeat", "repeated"}
        if proxy._handle.model().worker._over_zmq
        else set()
    )
    assert {name for _, name in STEPS} - reached <= other_lane


def test_a_request_that_is_made_and_not_sent_changes_nothing(proxy: InferenceSessionProxy) -> None:
    """Also the one that, if it were sent, would replace all others."""
    shapes = Shapes(proxy)
    first = shapes.new(SMALL)
    right(proxy, first)
    model = proxy._handle.model()
    for count in (1, 70):
        shapes.warm(count)
        for x in ways(shapes):
            call = model.prepare(
                proxy._handle.lease, lambda lane, x=x: lane.codec.encode_call(None, {"x": x}, None)
            )
            known = dict(call.lane.codec.plans._plans)
            call.release()
            proxy.load()
            assert call.lane.codec.plans._plans == known
            for _ in range(2):
                right(proxy, x)
                right(proxy, first)


@pytest.mark.parametrize("base", [SMALL, LARGE, 300_000], ids=["small", "large", "copied in a thread"])
def test_a_coroutine_that_is_cancelled_at_any_step(proxy: InferenceSessionProxy, base: int) -> None:
    shapes = Shapes(proxy)
    known = shapes.new(base)
    right(proxy, known)

    async def cancelled(x: np.ndarray, steps: int) -> None:
        task = asyncio.ensure_future(proxy.arun(None, {"x": x}))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def all_steps() -> None:
        for steps in range(8):
            shapes.warm((1, 64)[steps % 2])
            for x in (shapes.new(base), known):
                await cancelled(x, steps)
                proxy.load()  # a request that is of no plan
                for again in (x, known, x):
                    (y,) = await proxy.arun(None, {"x": again})
                    assert np.array_equal(again, y)
                    right(proxy, again)

    asyncio.run(all_steps())


def test_a_run_that_is_cancelled_while_it_computes(host: ModelHost) -> None:
    """The worker says that it was told to end; the lane is then free, and in nobody's way."""
    spin = InferenceSessionProxy(loop(), providers=CPU, host=host)
    x = np.ones(4, np.float32)

    def feed(turns: int) -> dict[str, Any]:
        return {"n": np.array(turns), "x": x}

    expected = spin.run(None, feed(3))[0]

    async def cancelled() -> None:
        task = asyncio.ensure_future(spin.arun(None, feed(1 << 60)))
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    for _ in range(3):
        asyncio.run(cancelled())
        with pytest.raises(RunTimeout):
            spin.run(None, feed(1 << 60), timeout=0.02)
        for _ in range(3):
            assert np.array_equal(spin.run(None, feed(3))[0], expected)


def test_times_that_are_up_at_any_step(proxy: InferenceSessionProxy) -> None:
    shapes = Shapes(proxy)
    known = shapes.new(SMALL)
    for exponent in range(-7, 0):
        shapes.warm(64)
        x = shapes.new(LARGE)
        with contextlib.suppress(RunTimeout):
            proxy.run(None, {"x": x}, timeout=10.0**exponent)
        for again in (x, known, x):
            right(proxy, again)


def test_a_worker_lets_go_what_its_caller_does(host: ModelHost) -> None:
    """Also where no call needs anything copied, so that no scratch block is ever looked after."""
    proxy = InferenceSessionProxy(identity_model(), providers=CPU, host=host)
    rng = np.random.default_rng(1)
    kept: list[np.ndarray] = []
    for index in range(600):
        x = proxy.empty((int(rng.integers(17_000, 300_000)),))
        x[0] = index
        assert proxy.run(None, {"x": x})[0][0] == index
        if index // 8 % 2:
            kept.append(x)
        if len(kept) > 20:
            kept.clear()
    del x
    here = mapped_segments("self")
    assert len(mapped_segments(worker_pid(host)) - here) <= 40
