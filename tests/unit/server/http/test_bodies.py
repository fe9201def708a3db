from __future__ import annotations

import numpy as np
import pytest

from onnx_dl.server.http.bodies import Gathered, IncomingBody, open_body
from onnx_dl.server.http.head import Framing
from onnx_dl.server.http.limits import STEPS
from onnx_dl.server.v2.failures import RequestFailure, too_many


class Memory:
    """Counts what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def allocate(self, nbytes: int) -> memoryview:
        self.asked.append(nbytes)
        return memoryview(bytearray(nbytes))


def fixed(length: int, memory: Memory, header_length: int | None = None) -> IncomingBody:
    return open_body(Framing(length, "", header_length, False), 1 << 30, memory.allocate)


def fill(body: IncomingBody, data: bytes) -> None:
    """Writes like a socket: as much as there is room for."""
    at = 0
    while at < len(data):
        room = body.room()
        assert room is not None
        step = min(len(room), len(data) - at)
        room[:step] = data[at : at + step]
        body.advance(step)
        at += step


def test_a_small_body_asks_for_no_memory() -> None:
    memory = Memory()
    body = fixed(5, memory)
    fill(body, b"hello")
    assert body.is_complete and body.take() == b"hello" and not memory.asked


def test_memory_is_asked_for_as_the_body_comes() -> None:
    memory = Memory()
    body = fixed(200 << 20, memory)
    for number, step in enumerate(STEPS[:-1]):
        fill(body, bytes(step - body.filled - 1))
        assert [nbytes - nbytes % 4096 for nbytes in memory.asked] == list(STEPS[1 : number + 1])
        fill(body, b"x")
    assert len(memory.asked) == len(STEPS) - 1 and not body.is_complete


def test_what_came_before_memory_was_asked_for_is_kept() -> None:
    data = np.random.default_rng(1).bytes(9 << 20)
    body = fixed(len(data), Memory())
    fill(body, data)
    assert body.is_complete and body.take() == data


@pytest.mark.parametrize("header_length", [1, 63, 64, 65, 117, 70_000])
def test_the_first_binary_tensor_is_aligned(header_length: int) -> None:
    body = fixed(1 << 20, Memory(), header_length)
    fill(body, bytes(1 << 20))
    tensor = np.frombuffer(body.take()[header_length:], np.uint8)
    assert tensor.__array_interface__["data"][0] % 64 == 0


def test_bytes_of_the_next_request_are_left() -> None:
    body = fixed(3, Memory())
    assert body.write(memoryview(b"abcdef")) == 3 and body.take() == b"abc"


def test_memory_that_is_not_there_is_a_refusal() -> None:
    def allocate(nbytes: int) -> memoryview:
        raise too_many("full")

    body = open_body(Framing(1 << 20, "", None, False), 1 << 30, allocate)
    with pytest.raises(RequestFailure, match="full"):
        fill(body, bytes(1 << 20))


def test_a_chunked_body_grows_to_its_limit() -> None:
    memory = Memory()
    body = open_body(Framing(None, "", None, False), 300_000, memory.allocate)
    assert body.room() is None
    chunk = b"186a0\r\n" + b"x" * 100_000 + b"\r\n"
    for _ in range(3):
        assert body.write(memoryview(chunk)) == len(chunk)
    assert body.filled == 300_000
    with pytest.raises(RequestFailure) as caught:
        body.write(memoryview(b"1\r\nx"))
    assert caught.value.http == 413


def test_a_chunked_body_is_what_its_chunks_carry() -> None:
    body = open_body(Framing(None, "", 3, False), 300_000, Memory().allocate)
    data = np.random.default_rng(2).bytes(200_000)
    assert body.write(memoryview(b"30d40\r\n" + data + b"\r\n0\r\n\r\nGET")) == 200_000 + 14
    assert body.is_complete and body.take() == data


def test_gathered_memory_is_a_few_times_what_is_there() -> None:
    memory = Memory()
    gathered = Gathered(1 << 30, None, memory.allocate)
    for _ in range(40):
        gathered.put(memoryview(bytes(100_000)))
    assert sum(memory.asked) < 8 * gathered.filled
