"""The worker's side of calls with places, without a lane and without a model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from onnx_dl.errors import EngineError, SharedMemoryError
from onnx_dl.protocol import lane as m
from onnx_dl.tensors import segment
from onnx_dl.tensors.foreign_tables import PeerMemories
from onnx_dl.workers.engines.base import BoundRun, CancelToken
from onnx_dl.workers.placed_calls import PlacedCalls

SIZE = 16 << 20
HALF = SIZE // 2
MARK = b"\7" * 16


class Alone:
    """Calls of one lane.  It stands for the lane and for the model: y = x."""

    def __init__(self, *, is_mapped: bool) -> None:
        self.memories = PeerMemories(4)
        self.fd = os.memfd_create("foreign")
        os.ftruncate(self.fd, SIZE)
        self.memories.add(7, SIZE, is_mapped, os.dup(self.fd))
        self.token = CancelToken()
        self.at_end: Callable[[], object] = lambda: None
        """Called at the end of each run."""
        self.bound = 0
        self.replies = 0
        self.calls = PlacedCalls(self, self, self.token)  # type: ignore[arg-type]

    def call(self, nbytes: int) -> None:
        self.token.number += 1
        self.calls.call(
            m.PlacedCall(
                outputs=["y"],
                foreign=[("x", m.Foreign("|u1", (nbytes,), 7, 0))],
                places=[("y", m.Place(7, HALF, nbytes))],
            )
        )

    # --- as a lane ----------------------------------------------------------------------------------------

    def reply_placed(self, values: list[object], written: list[m.WrittenResult]) -> None:
        assert not values and len(written) == 1
        self.replies += 1

    def send(self, reply: bytes) -> None:
        assert len(msgspec.msgpack.decode(reply)["written"]) == 1
        self.replies += 1

    # --- as a model ---------------------------------------------------------------------------------------

    def run(self, outputs: list[str], feed: dict[str, Any], options: object, token: CancelToken) -> list[Any]:
        result = feed["x"].copy()
        self.at_end()
        return [result]

    def bind(self, outputs: list[str], feed: dict[str, Any], results: list[Any]) -> BoundRun:
        def run() -> None:
            self.bound += 1
            results[0][...] = feed["x"]
            self.at_end()

        return BoundRun(run, None)


@pytest.fixture
def alone() -> Iterator[Alone]:
    made = Alone(is_mapped=False)
    yield made
    os.close(made.fd)


@pytest.mark.parametrize("calls_before", [0, 3], ids=["unbound", "bound"])
def test_a_run_that_was_given_up_writes_nothing(alone: Alone, calls_before: int) -> None:
    """Its caller may have closed the memory since, and other data may lie there."""
    for _ in range(calls_before):
        alone.call(HALF)
    replies = alone.replies

    def given_up() -> None:
        alone.token.cancel(alone.token.number)
        os.pwrite(alone.fd, MARK, HALF)

    alone.at_end = given_up
    with pytest.raises(EngineError, match="given up"):
        alone.call(HALF)
    assert os.pread(alone.fd, 16, HALF) == MARK
    assert alone.replies == replies and bool(alone.bound) == bool(calls_before)
    alone.at_end = lambda: None
    alone.call(HALF)
    assert os.pread(alone.fd, 16, HALF) == bytes(16)


def test_a_run_that_is_given_up_while_it_writes(alone: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = alone.memories.memory(7)
    write, written = memory.write, []

    def and_cancel(offset: int, data: memoryview) -> None:
        write(offset, data)
        written.append(data.nbytes)
        alone.token.cancel(alone.token.number)

    monkeypatch.setattr(memory, "write", and_cancel)
    with pytest.raises(EngineError, match="given up"):
        alone.call(HALF)
    assert len(written) == 1 and written[0] < HALF


def test_blocks_of_large_calls_are_freed_while_small_ones_go_on(alone: Alone) -> None:
    for _ in range(3):
        alone.call(HALF)
    assert alone.bound
    before = mapped()
    for _ in range(200):
        alone.call(1 << 10)
    assert before - mapped() >= 2 * HALF


def mapped() -> int:
    """Bytes of blocks that this process has mapped."""
    found = 0
    with open("/proc/self/maps") as maps:
        for line in maps:
            if "memfd:onnx-dl" in line:
                begin, end = (int(part, 16) for part in line.split()[0].split("-"))
                found += end - begin
    return found


def test_a_memory_that_cannot_be_mapped_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(fd: int, size: int) -> int:
        raise SharedMemoryError("Cannot map")

    monkeypatch.setattr(segment, "map_shared", fails)
    alone = Alone(is_mapped=True)
    os.pwrite(alone.fd, MARK, 0)
    for _ in range(3):
        os.pwrite(alone.fd, bytes(16), HALF)
        alone.call(HALF)
        assert os.pread(alone.fd, 16, HALF) == MARK
    assert alone.replies == 3 and alone.bound
    os.close(alone.fd)
