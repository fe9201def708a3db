"""Each decoder: what valid input looks like, and what may come out of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import struct
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from onnx_dl.core import mlir_signature, model_files
from onnx_dl.errors import ConfigError, OnnxDLError, ProtocolError, SharedMemoryError
from onnx_dl.protocol import codec, failures, lane
from onnx_dl.supervisor.hostfile.reader import read as read_host_file
from onnx_dl.supervisor.measure import requirement_store
from onnx_dl.supervisor.metrics.connections import is_allowed_host
from onnx_dl.supervisor.policy.memory_amount import MemoryAmount
from onnx_dl.supervisor.policy.requirements import Peak, Requirement
from onnx_dl.tensors import packing, segment
from onnx_dl.tensors.block import HEADER, Block
from onnx_dl.tensors.values import Unpacker
from onnx_dl.transport import zmtp
from onnx_dl.transport.lane_socket import PACKET, LaneSocket
from onnx_dl.transport.rendezvous import HostEntry, HostRecord
from onnx_dl.transport.sockets import Channel
from onnx_dl.workers.load_cache.store import Cache, EntryMeta, seal_meta
from tests.fuzz import descriptors, examples, mutation, placed
from tests.fuzz.mutation import Mutator
from tests.support.slow import identity_model


@dataclasses.dataclass
class Target:
    """``take`` is given damaged input; what it raises beyond ``allowed`` is a fault."""

    name: str
    mutator: Mutator
    take: Callable[[bytes], object]
    allowed: tuple[type[Exception], ...] = ()
    share: float = 1.0
    """How often it has its turn."""


def all_of(rng: random.Random, stack: contextlib.ExitStack) -> list[Target]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    return [
        *(_messages(name, rng) for name in examples.UNIONS),
        _failures(rng),
        _values(rng, copy=True),
        _values(rng, copy=False),
        *_packed(rng),
        *(_lane_socket(rng, keep, stack) for keep in (False, True)),
        _placed_calls(rng),
        _zmtp(rng),
        *_files(rng, folder),
        _host_file(rng, folder),
        _model_file(rng, folder),
        Target("signature", mutation.json(rng, [b'[{"type":"f32","dims":[2,-1],"name":"x"}]']), _signature),
        Target("host header", Mutator(rng, [b"localhost:9464", b"[::1]:80", b"127.0.0.1"]), _host_header),
    ]


# --- from other processes ---------------------------------------------------------------------------------


def _messages(name: str, rng: random.Random) -> Target:
    read = examples.READERS[name]

    def take(data: bytes) -> None:
        message = read(data)
        again = read(codec.encode(message))  # what was let in can be told on
        assert again == message or "nan" in repr(message).lower() or isinstance(message, lane.Envelope)

    return Target(name, mutation.msgpack(rng, examples.frames(name, rng)), take, (ProtocolError,))


def _failures(rng: random.Random) -> Target:
    """What a peer says went wrong: whatever it says, an exception comes of it that can be raised."""

    def take(data: bytes) -> None:
        try:
            failure = msgspec.msgpack.decode(data, type=failures.Failure)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        error = failures.rebuild(failure)
        assert isinstance(error, Exception)
        str(error), repr(error)

    corpus = [msgspec.msgpack.encode(examples.failure(rng)) for _ in range(40)]
    return Target("failure", mutation.msgpack(rng, corpus), take, (OnnxDLError,))


_SIZE = 4096


def block(content: bytes = b"") -> Block:
    made = Block(7, _SIZE, segment.create(_SIZE + HEADER))
    made.payload[: len(content)] = content
    return made


def _values(rng: random.Random, *, copy: bool) -> Target:
    """Values that name bytes in shared memory, as they come in calls and results."""
    some = packing.encode(["a", 1, {"b": [2.5]}])
    home = block(struct.pack("=QQ", 16, len(some)) + some)
    home.payload[1024:1040] = struct.pack("=QQ", 1040, 5)
    home.payload[1040:1045] = packing.encode(["x", "y"])
    find = {7: home}.__getitem__

    def found(number: int) -> Block:
        try:
            return find(number)
        except KeyError:
            raise ProtocolError("no such block") from None

    unpacker = Unpacker(found, copy=copy)
    read = msgspec.msgpack.Decoder(lane.Value)
    tensor = lane.Tensor("<f4", (2, 8), 7, 64)
    values = [
        tensor,
        lane.Tensor("|b1", (3,), 7, 0),
        lane.Tensor("q", (4,), 7, 8),
        lane.Tensor("<f4", (0, 3), 0, 0),
        lane.Tensor("|V2", (4,), 7, 128, True),
        lane.Tensor("<M8[s]", (2,), 7, 64),
        lane.Text((2,), 7, 1024),
        lane.Text((0,), 0, 0),
        lane.Packed(7, 0),
        lane.Plain({"a": [1, 2]}),
        lane.Items("list", [tensor, lane.Plain(1)]),
        lane.Items("tuple", []),
        lane.Items("dict", [lane.Plain("k"), tensor]),
        lane.Items("scalar", [lane.Tensor("<f8", (), 7, 0)]),
        lane.Items(
            "OrtValue",
            [lane.Items("dense", [lane.Plain(1), lane.Plain([2, 8]), lane.Tensor("|u1", (64,), 7, 0)])],
        ),
        lane.Items("dense", [lane.Plain(16), lane.Plain([32]), lane.Tensor("|u1", (64,), 7, 0)]),
        lane.Items("text", [lane.Text((2,), 7, 1024)]),
        lane.Items("sequence", [lane.Plain("seq(tensor(float))"), lane.Items("list", [tensor])]),
        lane.Items("maps", [lane.Plain("seq(map(int64,tensor(float)))"), lane.Plain([{1: 0.5}])]),
        lane.Items("absent", []),
        lane.Items(
            "coo",
            [
                lane.Tensor("<i8", (2,), 7, 0),
                lane.Tensor("<f4", (4,), 7, 64),
                lane.Tensor("<i8", (4,), 7, 128),
            ],
        ),
    ]

    def take(data: bytes) -> None:
        try:
            value = read.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        made = unpacker.unpack(value)
        if isinstance(made, np.ndarray):
            made.tobytes()  # all of it can be read

    corpus = [msgspec.msgpack.encode(value) for value in values]
    return Target(f"values, copy={copy}", mutation.msgpack(rng, corpus), take, (OnnxDLError,), 0.5)


def _packed(rng: random.Random) -> list[Target]:
    """A block that the peer may write to at any time."""
    home = block()

    def lay(data: bytes) -> None:
        data = data[:_SIZE]
        home.payload[: len(data)] = data

    def anything(data: bytes) -> None:
        lay(data)
        packing.reader(home, rng.choice((0, 8, _SIZE - 16)))()

    def text(data: bytes) -> None:
        lay(data)
        packing.text_reader(home, 0, rng.choice(((2,), (1, 2), (), (2, 0))))()

    def laid(value: Any) -> bytes:
        data = packing.encode(value)
        return struct.pack("=QQ", 16, len(data)) + data

    rows = [laid([{"a": 1.5, "b": 2}] * 3), laid({"k": [1, [2]]}), laid([])]
    texts = [laid(["a", "bc"]), laid(["", "x" * 50]), laid([])]
    allowed = (ProtocolError,)
    return [
        Target("packed", Mutator(rng, rows), anything, allowed),
        Target("text", Mutator(rng, texts), text, allowed),
    ]


def _lane_socket(rng: random.Random, keep: bool, stack: contextlib.ExitStack) -> Target:
    """A lane's socket, with descriptors of every kind beside what is said."""
    read, union = (lane.lane_reply, "lane_reply") if keep else (lane.lane_request, "lane_request")
    odd = stack.enter_context(contextlib.closing(descriptors.Odd()))
    corpus = [
        codec.encode(
            lane.Envelope(shared=shared, foreign=foreign, dropped=dropped, message=msgspec.Raw(inside))
        )
        for inside in examples.frames(union, rng)
        for shared, foreign, dropped in (
            ([], [], []),
            ([(3, 4096)], [], []),
            ([], [(7, 64, True)], [7]),
            ([(1, 0), (4, 65536)], [(8, 4096, False)], [3, 9]),
        )
    ] + [
        codec.encode(lane.Envelope(shared=[(5, 4096)], letter=(5, 40))),
        codec.encode(lane.Envelope(letter=(3, 0))),
    ]
    ends: list[Any] = []
    stack.callback(lambda: [each.close() for each in ends])

    def renew() -> None:
        while ends:
            ends.pop().close()
        ends.extend(Channel.pair())
        ends.append(LaneSocket(ends[1], read, keep_descriptors=keep, most_foreign=0 if keep else 4))

    def take(data: bytes) -> None:
        if not ends or ends[2].is_broken or rng.random() < 0.02:
            if ends:
                ends.pop()
            renew()
        fds = [odd.some(rng) for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 5)))]
        if not ends[0].post(data[:PACKET], fds):
            return
        ends[2].next()

    stack.callback(lambda: ends and ends.pop())
    allowed = (ProtocolError, SharedMemoryError)
    return Target(f"handover, keep={keep}", mutation.msgpack(rng, corpus), take, allowed, 0.5)


def _placed_calls(rng: random.Random) -> Target:
    """Calls with inputs and places in foreign memory, as a worker gets them."""
    calls = placed.PlacedCallsAlone(rng)
    return Target("placed calls", mutation.msgpack(rng, calls.corpus()), calls.take, (OnnxDLError,))


def _zmtp(rng: random.Random) -> Target:
    """A stream may come in pieces of any size: what is heard is the same."""
    hello = zmtp.GREETING + zmtp.ready(Socket_Type=b"DEALER", Identity=b"0123456789abcdef")
    streams = [
        hello,
        hello + zmtp.frame(b"hi") + zmtp.frame(b"x" * 300),
        hello + zmtp.frame(b"a", 1) + zmtp.frame(b"b"),
        hello + zmtp.frame(b"\x04PING\0\0", 4) + zmtp.frame(b""),
        zmtp.GREETING,
    ]

    def heard(pieces: list[bytes]) -> tuple[list[bytes], bool]:
        reader, found = zmtp.FrameReader(), []
        try:
            for piece in pieces:
                found += reader.feed(piece)
        except ProtocolError:
            return found, False
        assert len(reader._data) <= sum(map(len, pieces))
        return found, True

    def take(data: bytes) -> None:
        whole, fine = [], True
        reader = zmtp.FrameReader()
        try:
            whole.extend(reader.feed(data))
        except ProtocolError:
            fine = False
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(4))
        pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        found, well = heard(pieces)
        assert fine == well
        assert found[: len(whole)] == whole[: len(found)], "pieces of another size are another message"

    return Target("zmtp", Mutator(rng, streams), take)


# --- from a disk ------------------------------------------------------------------------------------------


def _files(rng: random.Random, folder: Path) -> list[Target]:
    needs = {
        f"key{n}": Requirement(
            load=Peak(5 << 20), steady=MemoryAmount(1 << 20), peak=MemoryAmount(2 << 20), at=1e9
        )
        for n in range(3)
    }
    record = HostRecord(
        address="a/b", secret="s" * 32, pid=os.getpid(), protocol=5, package="0.2", started=5.0
    )
    place = HostEntry("fuzz", folder=folder)
    kept = Cache(folder / "cache", 1 << 30)

    def read_needs(data: bytes) -> None:
        for _, need in requirement_store._entries(data, 2e9):
            msgspec.json.encode(need)

    def read_record(data: bytes) -> None:
        place._record.write_bytes(data)
        found = place.record()
        assert found is None or isinstance(found, HostRecord)

    def read_meta(data: bytes) -> None:
        path = folder / "cache" / ("0" * 32)
        path.mkdir(parents=True, exist_ok=True)
        (path / "meta.json").write_bytes(data)
        kept.entries()

    def read_sealed(data: bytes) -> None:
        """Damaged before the checksum was made: by whatever wrote it."""
        read_meta(b'{"crc":%d,"meta":%b}' % (zlib.crc32(data), data))

    return [
        Target("needs", mutation.json(rng, [requirement_store._encode(list(needs.items()))]), read_needs),
        Target("record", mutation.json(rng, [msgspec.json.encode(record)]), read_record, share=0.2),
        Target("meta of the load cache", mutation.json(rng, [seal_meta(meta())]), read_meta, share=0.1),
        Target("sealed meta", mutation.json(rng, [msgspec.json.encode(meta())]), read_sealed, share=0.1),
    ]


def meta() -> EntryMeta:
    made = examples._made(msgspec.inspect.type_info(EntryMeta), random.Random(5), 0)
    return msgspec.convert(made, EntryMeta)


_HOST_FILE = b"""memory_limit = "2GiB"
room_timeout = "30s"
[models.asr]
path = "asr.onnx"
ttl = "5m"
pin = true
priority = 3
eager = true
providers = ["CPUExecutionProvider"]
[models.asr.warmup]
x = {dtype = "float32", shape = [1, 4], fill = 0}
[models.b]
path = "b.onnx"
group = "g"
options = {intra_op_num_threads = 2}
"""


def _host_file(rng: random.Random, folder: Path) -> Target:
    for name in ("asr.onnx", "b.onnx"):
        (folder / name).write_bytes(identity_model())

    def take(data: bytes) -> None:
        path = folder / "host.toml"
        path.write_bytes(data)
        read_host_file(path)

    return Target("host.toml", Mutator(rng, [_HOST_FILE]), take, (ConfigError, OSError), 0.2)


def _model_file(rng: random.Random, folder: Path) -> Target:
    def take(data: bytes) -> None:
        path = folder / "m.onnx"
        path.write_bytes(data)
        model_files.bytes_of(str(path))
        fd = segment.freeze(data)
        with contextlib.closing(open(fd, "rb")), contextlib.suppress(ValueError):
            model_files.external_files(fd)

    tensor = b"\x08\x04\x10\x01\x42\x01w\x6a\x0f\x0a\x08location\x12\x03w.b\x70\x01"
    graph = b"\x2a" + bytes([len(tensor)]) + tensor
    return Target(
        "model file", Mutator(rng, [identity_model(), b"\x3a" + bytes([len(graph)]) + graph]), take, share=0.3
    )


def _signature(data: bytes) -> None:
    mlir_signature.parse(data.decode(errors="replace"))


def _host_header(data: bytes) -> None:
    assert is_allowed_host(data.decode("latin-1"), frozenset({"localhost"})) in (True, False)
