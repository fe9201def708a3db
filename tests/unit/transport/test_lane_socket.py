"""Messages of a lane over a real socket with the smallest buffers: one packet each, whatever their size."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from onnx_dl.errors import OnnxDLError, ProtocolError, SharedMemoryError
from onnx_dl.protocol import codec, lane
from onnx_dl.tensors import segment
from onnx_dl.tensors.arena import Arena, NoPeer
from onnx_dl.tensors.block import HEADER
from onnx_dl.transport.lane_socket import MOST_NEW, PACKET, LaneSocket
from onnx_dl.transport.sockets import MOST_DESCRIPTORS, Channel

MB = 1 << 20
SIZES = [1, 100, PACKET - 100, PACKET - 1, PACKET, PACKET + 1, 65_536, MB, 50 * MB]


def with_small_buffers() -> tuple[Channel, Channel]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 0)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
    return Channel(ends[0]), Channel(ends[1])


class Pair:
    """Two ends: one sends requests, the other replies."""

    def __init__(self) -> None:
        ours, theirs = with_small_buffers()
        self.client = LaneSocket(ours, lane.lane_reply, keep_descriptors=True)
        self.worker = LaneSocket(theirs, lane.lane_request, keep_descriptors=False)

    def request(self, message: codec.Message) -> object:
        assert self.client.send(codec.encode(message))
        return self.worker.next()

    def reply(self, message: codec.Message) -> object:
        assert self.worker.send(codec.encode(message))
        return self.client.next()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    for end in (made.client, made.worker):
        end.channel.close()


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def invoke(size: int) -> lane.Invoke:
    return lane.Invoke(method="x" * size)


def waiting(channel: Channel) -> bytes:
    """The packet that lies on the socket, which stays there."""
    return channel._sock.recv(1 << 20, socket.MSG_PEEK)


# --- any size ----------------------------------------------------------------------------------------------


@pytest.mark.timeout(60)
@pytest.mark.parametrize("size", SIZES)
def test_any_size_both_ways_is_one_packet(pair: Pair, size: int):
    for _ in range(3):
        assert pair.client.send(codec.encode(invoke(size)))
        assert len(waiting(pair.worker.channel)) <= PACKET
        assert pair.worker.next() == invoke(size)
        result = lane.Result(value=lane.Plain("y" * size))
        assert pair.reply(result) == result
        assert not pair.worker.channel.readable() and not pair.client.channel.readable()


def test_sizes_take_turns_in_the_same_memory(pair: Pair):
    for size in [*SIZES[:-1], *reversed(SIZES[:-1])] * 2:
        assert pair.request(invoke(size)) == invoke(size)
    assert pair.client.arena.nbytes < 4 * MB
    for _ in range(100):
        pair.client.arena.scratch(10)
        assert pair.request(lane.Touch()) == lane.Touch()
    assert pair.client.arena.nbytes < 100_000
    assert pair.worker.mappings.nbytes < 100_000, "the worker has heard of it"


@pytest.mark.timeout(30)
def test_a_reader_that_has_stopped_stops_no_writer(pair: Pair):
    sent = [pair.worker.send(codec.encode(lane.Result(value=lane.Plain("x" * 4000)))) for _ in range(100)]
    assert sent[0] and not sent[-1]
    assert pair.client.next() == lane.Result(value=lane.Plain("x" * 4000))


def test_started_and_its_result_find_room(pair: Pair):
    """The only case of two packets on their way."""
    result = lane.Result(value=lane.Plain("x" * 4000))
    assert pair.worker.send(codec.encode(lane.Started()))
    assert pair.worker.send(codec.encode(result))
    assert [pair.client.next(), pair.client.next()] == [lane.Started(), result]


def test_a_peer_that_is_gone(pair: Pair):
    pair.client.channel.close()
    assert pair.worker.channel.is_dead()
    assert pair.worker.next() is None
    pair.worker.arena.scratch(10)
    assert not pair.worker.send(codec.encode(lane.Result(value=lane.Plain("x" * MB))))


def test_a_packet_that_is_not_there(pair: Pair):
    assert pair.client.next() is None
    assert not pair.client.channel.is_dead()


# --- what is said of blocks --------------------------------------------------------------------------------


def test_blocks_travel_with_the_message_that_names_them(pair: Pair):
    block = pair.client.arena.scratch(1000)
    block.payload[:3] = b"abc"
    assert not pair.worker.channel.readable(), "nothing is said before there is a message"
    pair.request(lane.Touch())
    found = pair.worker.mappings.block(block.number)
    assert bytes(found.payload[:3]) == b"abc"
    pair.client.arena.trim()
    pair.request(lane.Touch())
    with pytest.raises(ProtocolError, match="never announced"):
        pair.worker.mappings.block(block.number)


def test_blocks_of_a_message_that_could_not_be_made_are_told_with_the_next(pair: Pair):
    block = pair.client.arena.scratch(1000)
    with pytest.raises(TypeError):
        pair.client.send(codec.encode(lane.Invoke(method="x", args=[lane.Plain(object())])))
    pair.request(lane.Touch())
    assert pair.worker.mappings.block(block.number).size == block.size


def test_a_block_that_came_and_went_between_two_messages_is_not_told(pair: Pair):
    before = descriptors()
    pair.client.arena.scratch(1000)
    pair.client.arena.trim()
    assert pair.client.send(codec.encode(lane.Touch()))
    assert waiting(pair.worker.channel) == codec.encode(lane.Touch())
    pair.worker.next()
    assert descriptors() == before


def test_descriptors_are_bounded(pair: Pair):
    """However many blocks one message could use, and however often it fails before it is sent."""
    leased, refused = [], 0
    for _ in range(3 * MOST_NEW):
        if (block := pair.worker.arena.take(1000)) is None:
            refused += 1
        else:
            leased.append(block)
    assert len(leased) == MOST_NEW and refused == 2 * MOST_NEW
    for size in (10, 100_000, MB):
        pair.worker.arena.scratch(size)
    assert pair.worker.send(codec.encode(lane.Result(value=lane.Plain("x" * MB))))
    _, control, _, _ = pair.client.channel._sock.recvmsg(PACKET, 4096, socket.MSG_PEEK)
    came = np.frombuffer(control[0][2], np.intc).tolist()
    for fd in came:
        os.close(fd)
    assert MOST_NEW < len(came) < MOST_NEW + 10 < MOST_DESCRIPTORS
    pair.client.next()
    assert all(pair.client.mappings.block(block.number) for block in leased)
    assert pair.worker.arena.take(1000) is not None, "with the next message there is room again"


def test_many_blocks_that_are_dropped_at_once(pair: Pair):
    for _ in range(40):
        for _ in range(MOST_NEW):
            assert pair.client.arena.take(10)
        pair.request(lane.Touch())
    assert pair.worker.mappings.nbytes > 40 * MOST_NEW * 1000
    for block in pair.client.arena._blocks:
        block.release()
    pair.client.arena.trim()
    assert pair.client.send(codec.encode(lane.Touch()))
    assert len(waiting(pair.worker.channel)) <= PACKET
    assert pair.worker.next() == lane.Touch()
    assert pair.worker.mappings.nbytes < 1e6


def test_nothing_is_left_of_a_lane_that_is_gone():
    before = descriptors()
    pair = Pair()
    other = Arena(NoPeer(), keep_descriptors=True)
    block = other.take(1000)
    pair.client.arena.adoptions.number(block)
    pair.request(invoke(MB))
    pair.reply(lane.Result(value=lane.Plain("x" * MB)))
    pair.client.arena.scratch(1000)
    pair.worker.arena.take(1000)
    del pair, other, block
    assert descriptors() == before


def test_no_memory_for_a_letter(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    """Nothing is sent, and short messages still are."""

    def full(size: int) -> int:
        raise SharedMemoryError("full")

    block = pair.worker.arena.scratch(10)
    with monkeypatch.context() as patch:
        patch.setattr(segment, "create", full)
        with pytest.raises(SharedMemoryError):
            pair.worker.send(codec.encode(lane.Result(value=lane.Plain("x" * MB))))
        assert not pair.client.channel.readable()
        assert pair.reply(lane.Draining()) == lane.Draining()
        assert pair.client.mappings.block(block.number)


# --- what a peer must not be able to do --------------------------------------------------------------------

TOUCH = msgspec.Raw(codec.encode(lane.Touch()))
HOSTILE = {
    "nothing in it": lane.Envelope(),
    "no message": lane.Envelope(message=msgspec.Raw(b"\xc1")),
    "another direction's": lane.Envelope(message=msgspec.Raw(codec.encode(lane.Draining()))),
    "an envelope": lane.Envelope(message=msgspec.Raw(codec.encode(lane.Envelope(message=TOUCH)))),
    "a block that did not come": lane.Envelope(shared=[(5, 10)], message=TOUCH),
    "a letter nowhere": lane.Envelope(letter=(99, 10)),
    "a letter in block 0": lane.Envelope(letter=(0, 10)),
    "a letter of less than nothing": lane.Envelope(letter=(1, -1)),
    "a letter beyond its block": lane.Envelope(letter=(1, 1 << 62)),
    "a letter of no message": lane.Envelope(letter=(1, 100)),
    "an empty letter": lane.Envelope(letter=(1, 0)),
}


@pytest.fixture
def known(pair: Pair) -> Pair:
    """Block 1 of the client is known to the worker."""
    assert pair.client.arena.scratch(1000).number == 1
    pair.request(lane.Touch())
    return pair


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_envelopes(known: Pair, name: str):
    before = descriptors()
    known.client.channel.post(codec.encode(HOSTILE[name]))
    with pytest.raises(ProtocolError):
        known.worker.next()
    assert descriptors() == before
    assert known.request(lane.Touch()) == lane.Touch()


@pytest.mark.parametrize(
    "inside",
    [
        lane.Touch(),
        lane.Envelope(letter=(1, 10)),
        lane.Envelope(shared=[(7, 10)], message=TOUCH),
        lane.Envelope(message=msgspec.Raw(codec.encode(lane.Envelope(message=TOUCH)))),
    ],
    ids=["no envelope", "another letter", "new blocks", "an envelope in it"],
)
def test_hostile_letters(known: Pair, inside: codec.Message):
    data = codec.encode(inside)
    known.client.arena.current_scratch.payload[: len(data)] = data
    known.client.channel.post(codec.encode(lane.Envelope(letter=(1, len(data)))))
    with pytest.raises(ProtocolError):
        known.worker.next()
    assert known.request(lane.Touch()) == lane.Touch()


@pytest.mark.parametrize(
    ("shared", "sizes"),
    [
        ([], [100]),
        ([(5, 10)], [HEADER + 10, 100]),
        ([(5, 1 << 40)], [100]),
        ([(5, -1)], [100]),
        ([(0, 10)], [100]),
        ([(1, 10)], [100]),
        ([(5, 10), (5, 10)], [100, 100]),
        ([(5, 10), (6, 1 << 62)], [100, 100]),
        ([(5, 10), (6, 10)], [100]),
        ([(5, 1 << 70)], [100]),
    ],
    ids=str,
)
def test_hostile_descriptors(known: Pair, shared: list, sizes: list):
    before = descriptors()
    fds = [segment.create(size) for size in sizes]
    envelope = {"type": "Envelope", "shared": shared, "message": msgspec.Raw(TOUCH)}
    if any(size >= 1 << 63 for _, size in shared):
        envelope["shared"] = [[number, float(size)] for number, size in shared]
    known.client.channel.post(msgspec.msgpack.encode(envelope), fds)
    for fd in fds:
        os.close(fd)
    with pytest.raises(OnnxDLError):
        known.worker.next()
    known.worker.mappings.drop([5])
    assert descriptors() == before
    lost = len(sizes) <= len(shared)  # else there was only one too many
    assert known.worker.is_broken == lost


def test_descriptors_without_a_message(known: Pair):
    before = descriptors()
    known.client.channel.post(codec.encode(lane.Touch()), [0, 1, 2])
    with pytest.raises(ProtocolError):
        known.worker.next()
    known.client.channel.post(b"\xc1", [0, 1, 2])
    with pytest.raises(ProtocolError):
        known.worker.next()
    assert descriptors() == before


def test_noise(known: Pair):
    rng = np.random.default_rng(5)
    good = codec.encode(lane.Envelope(shared=[(9, 10)], dropped=[1], message=TOUCH, letter=None))
    for _ in range(2000):
        noise = bytearray(good)
        for _ in range(3):
            noise[rng.integers(len(noise))] = rng.integers(256)
        known.client.channel.post(bytes(noise))
        try:
            message = known.worker.next()
        except OnnxDLError:
            continue
        assert isinstance(message, codec.Message)
