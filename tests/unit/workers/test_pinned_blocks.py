"""Blocks that CUDA's driver pins: which, when, and that they are unpinned before their memory goes."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from onnx_dl.protocol import lane as m
from onnx_dl.system.cuda_types import DriverError
from onnx_dl.tensors import segment
from onnx_dl.tensors.block import Block
from onnx_dl.workers.engines.base import BoundRun, CancelToken
from onnx_dl.workers.pinned_blocks import LanePins, PinnedBlocks, PinRules, most_pinned
from onnx_dl.workers.prepared_calls import PreparedCall
from tests.support.builders import arena

GIB = 1 << 30


# --- rules ------------------------------------------------------------------------------------------------


def rules(most: int = 100) -> PinRules:
    return PinRules(lambda: most)


def test_a_block_is_pinned_from_its_second_use_on() -> None:
    pins = rules()
    assert [pins.use(1, 10) for _ in range(4)] == [False, True, False, False]
    assert pins.nbytes == 10


def test_a_block_that_is_used_once_is_not_pinned() -> None:
    pins = rules()
    assert not any(pins.use(address, 10) for address in range(20))
    assert pins.nbytes == 0


def test_a_refused_block_is_never_tried_again() -> None:
    pins = rules()
    pins.use(1, 10)
    assert pins.use(1, 10)
    pins.refuse(1)
    assert not pins.use(1, 10)
    assert pins.nbytes == 0
    assert not pins.gone(1)


def test_another_block_at_the_address_of_a_refused_one_is_tried() -> None:
    pins = rules()
    pins.use(1, 10), pins.use(1, 10)
    pins.refuse(1)
    pins.gone(1)
    assert [pins.use(1, 10) for _ in range(2)] == [False, True]


def test_the_bytes_are_bounded_and_free_again_when_a_block_goes() -> None:
    pins = rules(most=25)
    for address in (1, 2, 3):
        pins.use(address, 10)
    assert [pins.use(address, 10) for address in (1, 2, 3, 3)] == [True, True, False, False]
    assert pins.nbytes == 20
    assert pins.gone(1)
    assert pins.use(3, 10)
    assert not pins.gone(99)


@pytest.mark.parametrize(
    ("memory", "most"), [(None, GIB), (128 * GIB, GIB), (4 * GIB, GIB), (2 * GIB, GIB // 2), (0, 0)]
)
def test_a_worker_pins_a_quarter_of_the_memory_at_most(memory: int | None, most: int) -> None:
    assert most_pinned(memory) == most


# --- the driver -------------------------------------------------------------------------------------------


class Driver:
    """A driver that checks the calls, as CUDA's does, and looks whether the memory is there."""

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.tries = 0
        self.refuses = False

    def register_host(self, device: int, address: int, nbytes: int) -> None:
        assert device == 3
        assert address not in self.pinned
        assert is_mapped(address)
        self.tries += 1
        if self.refuses:
            raise DriverError(801, "cuMemHostRegister_v2", "CUDA_ERROR_NOT_SUPPORTED")
        self.pinned[address] = nbytes

    def unregister_host(self, device: int, address: int) -> None:
        assert device == 3
        assert is_mapped(address)
        del self.pinned[address]


def is_mapped(address: int) -> bool:
    with open("/proc/self/maps") as maps:
        return any(line.startswith(f"{address:x}-") for line in maps)


def pinned(driver: Driver | None, most: int = GIB) -> PinnedBlocks:
    found: Any = driver
    return PinnedBlocks(lambda: most, lambda: found)


def block(size: int = 4096, number: int = 1) -> Block:
    return Block(number, size, segment.create(size + 64))


def test_a_block_is_unpinned_before_its_memory_goes() -> None:
    driver = Driver()
    pins, one = pinned(driver), block()
    for _ in range(3):
        pins.use(3, one)
    address = one.mapping.address
    assert driver.pinned == {address: 4096 + 64}
    assert pins.nbytes == 4096 + 64
    array = one.array("<f4", (4,), 0)
    del one
    assert driver.pinned  # an array still needs the memory
    del array
    assert driver.pinned == {}
    assert pins.nbytes == 0
    assert not is_mapped(address)


def test_a_block_that_the_driver_refuses_is_used_as_it_is() -> None:
    driver = Driver()
    driver.refuses = True
    pins, one = pinned(driver), block()
    for _ in range(5):
        pins.use(3, one)
    assert (driver.tries, driver.pinned, pins.nbytes) == (1, {}, 0)
    del one


def test_nothing_is_pinned_where_nobody_uses_cuda() -> None:
    pins, one = pinned(None), block()
    pins.use(3, one), pins.use(3, one)
    assert pins.nbytes == 0
    assert one.mapping.before_unmap is None


def test_blocks_are_pinned_by_threads_at_once_within_the_bound() -> None:
    driver = Driver()
    pins = pinned(driver, most=10 * (4096 + 64))
    blocks = [block() for _ in range(16)]
    at_once = threading.Barrier(4)

    def use(some: list[Block]) -> None:
        at_once.wait(10)
        for one in some * 3:
            pins.use(3, one)

    threads = [threading.Thread(target=use, args=(blocks[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(driver.pinned) == 10
    assert pins.nbytes == sum(driver.pinned.values())
    blocks.clear()
    del thread, threads
    assert driver.pinned == {}


# --- the uses of a lane -----------------------------------------------------------------------------------


class Lane:
    """A worker's end: the caller's blocks are mapped, and its own arena has results."""

    def __init__(self) -> None:
        self.callers, peer = arena()
        self.mappings = peer.mappings
        self.arena, _ = arena()
        self.sent = 0

    def send_same(self) -> None:
        self.sent += 1


class Backend:
    def bind(self, *_: object) -> BoundRun:
        return BoundRun(lambda: None, None)


def test_a_call_that_repeats_pins_its_inputs_and_results() -> None:
    lane: Any = Lane()
    driver = Driver()
    pins = LanePins(pinned(driver), 3, lane.mappings)
    fed = lane.callers.scratch(100)
    value = m.Tensor("<f4", (4,), fed.number, 0)
    call = m.Call(outputs=m.Plain(None), feed=[("x", value)], plan=0)
    repeat = PreparedCall(call, None, {"x": np.zeros(4, np.float32)})
    repeat.pins = pins
    result = lane.arena.scratch(100)
    repeat.learn(m.Items("list", [m.Tensor("<f4", (4,), result.number, 0)]), lane)
    pins.fed(call.feed)  # of the first call, which is not prepared
    pins.used((), [result])
    assert driver.pinned == {}
    backend: Any = Backend()
    assert repeat.run(lane, backend, {}, [], CancelToken())
    assert lane.sent == 1
    assert driver.pinned.keys() == {lane.mappings.block(fed.number).mapping.address, result.mapping.address}
    del fed, result, repeat
    lane.callers.trim()
    lane.arena.trim()
    assert driver.pinned == {}


def test_blocks_that_the_caller_has_dropped_are_not_counted() -> None:
    lane: Any = Lane()
    driver = Driver()
    pins = LanePins(pinned(driver), 3, lane.mappings)
    for _ in range(3):
        pins.used([7], [None])
        pins.fed([("x", m.Plain(1)), ("y", m.Tensor("<f4", (0,), 0, 0))])
    assert driver.pinned == {}
