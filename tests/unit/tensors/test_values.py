"""Values through two arenas of this process, over real msgpack, and back."""

from __future__ import annotations

import gc
import itertools
import random

import numpy as np
import pytest

from onnx_dl.errors import ProtocolError
from onnx_dl.protocol import codec, lane
from onnx_dl.protocol.lane import Items, Packed, Plain, Tensor, Text
from onnx_dl.tensors.values import VIEW_FROM, AlignedCopies, Packer, Unpacker, is_plain
from tests.support.builders import arena

DTYPES = [
    "?",
    *("<i1", "<i2", "<i4", "<i8", "<u1", "<u2", "<u4", "<u8"),
    *("<f2", "<f4", "<f8", "<c8", "<c16"),
    *(">i2", ">f4", ">f8"),
    *("<U5", "|S5", "|V3", "<M8[ns]", "<m8[s]"),
]
SHAPES = [(), (1,), (7,), (0,), (3, 0, 2), (2, 3), (1, 1, 1, 1), (2, 3, 4, 5), (64, 64), (3, 101, 97)]


def travel(values: list, take_from: int | None = None, copy: bool = True) -> list:
    """As a lane does it: packed, encoded, decoded, unpacked."""
    a, peer = arena()
    packed = Packer(a, take_from).pack(values)
    arrived = []
    for value in packed:
        raw = codec.encode(lane.Result(value=value))
        arrived.append(Unpacker(peer.mappings.block, copy=copy).unpack(lane.lane_reply(raw).value))
    return arrived


def array_of(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape, dtype=int))
    raw = np.random.default_rng(size).integers(0, 100, max(size, 1))[:size]
    if np.dtype(dtype).kind in "US":
        return np.array([str(n) for n in raw], dtype).reshape(shape)
    if np.dtype(dtype).kind == "V":
        return np.array([bytes([n, 1, 2]) for n in raw], dtype).reshape(shape)
    return raw.astype(dtype).reshape(shape)


def assert_same(got: np.ndarray, sent: np.ndarray) -> None:
    assert type(got) is np.ndarray
    assert got.dtype == sent.dtype
    assert got.dtype.byteorder == sent.dtype.byteorder
    assert got.shape == sent.shape
    assert got.tobytes() == sent.tobytes()
    assert got.flags.c_contiguous and got.flags.writeable and got.flags.aligned


# --- arrays ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("take_from", [None, 0, VIEW_FROM], ids=["scratch", "held", "by size"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape(dtype, take_from):
    sent = [array_of(dtype, shape) for shape in SHAPES]
    for got, was in zip(travel(sent, take_from), sent, strict=True):
        assert_same(got, was)


def test_special_numbers_keep_their_bits():
    bits = np.array([0x7FC00001, 0xFFC12345, 0x80000000, 0x7F800000, 1], np.uint32)
    (got,) = travel([bits.view(np.float32)])
    assert got.view(np.uint32).tolist() == bits.tolist()


@pytest.mark.parametrize(
    "sent",
    [
        np.arange(24.0).reshape(4, 6)[:, ::2],
        np.arange(24.0).reshape(4, 6).T,
        np.arange(24.0)[::-1],
        np.asfortranarray(np.arange(24.0).reshape(4, 6)),
        np.broadcast_to(np.float32(3), (4, 5)),
        np.arange(100, dtype=np.uint8)[1:81].view("<f8"),
        np.arange(24.0).reshape(4, 6)[1, 2:3],
    ],
    ids=["strided", "transposed", "reversed", "fortran", "broadcast", "unaligned", "slice"],
)
@pytest.mark.parametrize("take_from", [None, 0])
def test_layouts_arrive_contiguous(sent, take_from):
    (got,) = travel([sent], take_from)
    assert_same(got, np.ascontiguousarray(sent))


def test_read_only_array_arrives_writable():
    sent = np.arange(5.0)
    sent.flags.writeable = False
    (got,) = travel([sent])
    got += 1
    assert sent.tolist() == [0, 1, 2, 3, 4]


def test_sender_may_change_its_array_after_packing():
    a, peer = arena()
    sent = np.arange(5.0)
    (packed,) = Packer(a).pack([sent])
    sent[:] = 0
    assert Unpacker(peer.mappings.block, copy=True).unpack(packed).tolist() == [0, 1, 2, 3, 4]


def test_subclasses_arrive_as_arrays():
    (got,) = travel([np.ma.masked_array(np.arange(3.0), [0, 1, 0])])
    assert_same(got, np.arange(3.0))


def test_arrays_of_one_message_do_not_overlap_and_are_aligned():
    a, _ = arena()
    rng = np.random.default_rng(1)
    sent = [rng.integers(0, 255, n, np.uint8) for n in (1, 63, 64, 65, 1000, 0, 70_000)]
    packed = Packer(a).pack(sent)
    spans = sorted(
        (t.offset, t.offset + array.nbytes) for t, array in zip(packed, sent, strict=True) if t.block
    )
    assert all(start % 64 == 0 for start, _ in spans)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert {t.block for t in packed if t.block} == {1}
    for got, was in zip(travel(sent), sent, strict=True):
        assert_same(got, was)


def test_empty_arrays_need_no_memory():
    a, peer = arena()
    packed = Packer(a, 0).pack([np.empty((0, 3), np.float32), np.empty((5, 0), "<U4")])
    assert packed == [Tensor("<f4", (0, 3), 0, 0), Tensor("<U4", (5, 0), 0, 0)]
    assert peer.calls == []


# --- text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        np.array(["a", "", "Zürich", "日本", "\0", "x" * 10_000], object),
        np.array([["a", "b"], ["c", "d"]], object).T,
        np.array("alone", object),
        np.empty((0,), object),
        np.empty((2, 0), object),
    ],
    ids=["1-d", "transposed", "0-d", "empty", "empty 2-d"],
)
def test_text_arrays(sent):
    (got,) = travel([sent])
    assert got.dtype == object
    assert got.shape == sent.shape
    assert got.tolist() == sent.tolist()
    assert all(type(item) is str for item in got.flat)


def test_objects_in_a_text_array_become_text():
    (got,) = travel([np.array([1, None, 2.5, np.str_("s")], object)])
    assert got.tolist() == ["1", "None", "2.5", "s"]


# --- containers and the rest -----------------------------------------------------------------------------

PLAIN = [
    None,
    True,
    False,
    0,
    -1,
    2**63,
    -(2**63),
    1.5,
    "text",
    "日本",
    b"\0\xff",
    [],
    {},
    [1, [2.5, ["x", None]]],
    {"a": 1, 2: [3], b"k": None, None: True, 1.5: {}},
]


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_values(value):
    assert is_plain(value)
    (got,) = travel([value])
    assert got == value
    assert type(got) is type(value)


def test_booleans_and_floats_keep_their_types_in_lists():
    (got,) = travel([[True, 1, 1.0, "1"]])
    assert list(map(type, got)) == [bool, int, float, str]


@pytest.mark.parametrize(
    "value",
    [
        (),
        (1, "a"),
        [(1,), [2]],
        {"x": (1, 2)},
        {(1, 2): "tuple key"},
        {"n": {"m": [({},)]}},
    ],
    ids=repr,
)
def test_containers_that_msgpack_would_lose(value):
    assert not is_plain(value)
    (got,) = travel([value])
    assert got == value
    assert repr(got) == repr(value)


@pytest.mark.parametrize("take_from", [None, 0])
def test_arrays_in_containers(take_from):
    sent = {"probabilities": [{0: np.float32(0.5), 1: np.arange(3)}, (np.eye(2), "x")], "label": np.int64(3)}
    (got,) = travel([sent], take_from)
    assert list(got) == ["probabilities", "label"]
    first, second = got["probabilities"]
    assert type(first[0]) is np.float32 and first[0] == 0.5
    assert_same(first[1], np.arange(3))
    assert type(second) is tuple and second[1] == "x"
    assert_same(second[0], np.eye(2))
    assert type(got["label"]) is np.int64 and got["label"] == 3


@pytest.mark.parametrize(
    "value",
    [
        np.float16(1.5),
        np.uint8(255),
        np.bool_(True),
        np.complex64(1 + 2j),
        np.str_("abc"),
        np.datetime64(5, "ns"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_numpy_scalars(value):
    (got,) = travel([value])
    assert type(got) is type(value)
    assert got == value


class Mine:
    def __repr__(self) -> str:
        return "Mine()"


@pytest.mark.parametrize("value", [Mine(), [Mine()], {"a": (Mine(),)}, 1j], ids=repr)
def test_what_onnxruntime_takes_from_nobody_is_refused_in_its_words(value):
    a, _ = arena()
    with pytest.raises(RuntimeError, match=r"Unable to handle object of type <class '"):
        Packer(a).pack([value])


def test_failed_packing_gives_its_blocks_back():
    a, _ = arena()
    with pytest.raises(RuntimeError):
        Packer(a, 0).pack([np.ones(1000), np.ones(70_000), Mine()])
    a.trim()
    assert a.nbytes == 0


def test_abandoned_message_gives_its_blocks_back():
    a, _ = arena()
    packer = Packer(a, 0)
    packer.pack([np.ones(1000)])
    a.trim()
    assert a.nbytes
    packer.abandon()
    a.trim()
    assert a.nbytes == 0


def test_random_values_round_trip():
    rng = random.Random(7)

    def some(depth: int):
        kind = rng.randrange(8 if depth else 5)
        if kind < 2:
            shape = tuple(rng.randrange(4) for _ in range(rng.randrange(4)))
            return array_of(rng.choice(DTYPES), shape)
        if kind == 2:
            return rng.choice(PLAIN)
        if kind == 3:
            return np.float32(rng.random())
        if kind == 4:
            return np.array(["a", "b"], object)
        if kind == 5:
            return [some(depth - 1) for _ in range(rng.randrange(4))]
        if kind == 6:
            return tuple(some(depth - 1) for _ in range(rng.randrange(4)))
        return {rng.choice(["a", "b", 3]): some(depth - 1) for _ in range(rng.randrange(4))}

    for _ in range(300):
        sent = [some(3) for _ in range(rng.randrange(4))]
        for take_from in (None, 0, 100):
            got = travel(sent, take_from)
            assert repr(got) == repr(sent)


# --- copies, views, held blocks --------------------------------------------------------------------------


def test_small_results_are_copies_that_the_next_message_leaves_alone():
    a, peer = arena()
    unpack = Unpacker(peer.mappings.block, copy=True).unpack
    (one,) = Packer(a, VIEW_FROM).pack([np.arange(4)])
    got = unpack(one)
    Packer(a, VIEW_FROM).pack([np.zeros(4, int)])
    assert got.tolist() == [0, 1, 2, 3]


def test_without_copy_scratch_arrays_are_views():
    a, peer = arena()
    (one,) = Packer(a).pack([np.arange(4)])
    got = Unpacker(peer.mappings.block, copy=False).unpack(one)
    assert got.base is not None
    Packer(a).pack([np.zeros(4, int)])
    assert got.tolist() == [0, 0, 0, 0]


def test_size_decides_what_is_held():
    a, _ = arena()
    below, at = np.zeros(VIEW_FROM - 1, np.uint8), np.zeros(VIEW_FROM, np.uint8)
    assert [t.held for t in Packer(a, VIEW_FROM).pack([below, at])] == [False, True]
    assert [t.held for t in Packer(a, None).pack([below, at])] == [False, False]


def test_held_results_survive_later_calls_and_are_reused_when_collected():
    a, peer = arena()
    unpack = Unpacker(peer.mappings.block, copy=True).unpack
    kept = []
    for n in range(5):
        (packed,) = Packer(a, VIEW_FROM).pack([np.full(20_000, n)])
        kept.append(unpack(packed))
    assert [array[0] for array in kept] == [0, 1, 2, 3, 4]
    assert len({id(array.base) for array in kept}) == 5
    shared = len(peer.calls)
    kept.clear()
    gc.collect()
    for n in range(20):
        (packed,) = Packer(a, VIEW_FROM).pack([np.full(20_000, n)])
        assert unpack(packed)[-1] == n
    assert len(peer.calls) == shared  # no new block


def test_held_result_survives_its_arena():
    a, peer = arena()
    (packed,) = Packer(a, VIEW_FROM).pack([np.arange(20_000)])
    got = Unpacker(peer.mappings.block, copy=True).unpack(packed)
    del a, peer
    gc.collect()
    assert got.sum() == sum(range(20_000))
    got[:] = 1
    assert got.sum() == 20_000


def test_part_of_a_held_result_keeps_it():
    a, peer = arena()
    (packed,) = Packer(a, VIEW_FROM).pack([np.arange(20_000)])
    part = Unpacker(peer.mappings.block, copy=True).unpack(packed)[5:7]
    gc.collect()
    Packer(a, VIEW_FROM).pack([np.zeros(20_000, int)])
    assert part.tolist() == [5, 6]


# --- what a peer must not be able to do ------------------------------------------------------------------

HOSTILE = [
    Tensor("<f4", (2**40,), 1, 0),
    Tensor("<f4", (16_385,), 1, 0),
    Tensor("<f4", (1,), 1, 65_536),
    Tensor("<f4", (1,), 1, -64),
    Tensor("<f4", (-1,), 1, 0),
    Tensor("<f4", (2**62, 2**62), 1, 0),
    Tensor("<f4", (1,) * 200, 1, 0),
    Tensor("|O", (1,), 1, 0),
    Tensor("O8", (1,), 1, 0),
    Tensor("<f4,O", (1,), 1, 0),
    Tensor("quatsch", (1,), 1, 0),
    Tensor("<f4", (1,), 99, 0),
    Tensor("<f4", (10**13,), 0, 0),
    Tensor("<f4", (3,), 0, 0),
    Tensor("<f4", (-1,), 0, 0),
    Tensor("|O", (3,), 0, 0),
    Tensor("quatsch", (0,), 0, 0),
    Text((3,), 1, 0),
    Text((-1, 5), 1, 0),
    Text((2**62,), 1, 0),
    Text((1,), 1, 2**62),
    Text((1,), 1, -8),
    Text((1,), 99, 0),
    Text((3,), 0, 0),
    Text((-1,), 0, 0),
    Packed(1, 2**62),
    Packed(1, -8),
    Packed(1, 65_530),
    Packed(99, 0),
    Packed(0, 0),
    Items("set", []),
    Items("", []),
    Items("dict", [Plain(1)]),
    Items("dict", [Plain([]), Plain(1)]),
    Items("scalar", []),
    Items("scalar", [Plain("x")]),
    Items("list", [Items("list", [Tensor("<f4", (1,), 1, 2**61)])]),
]


@pytest.mark.parametrize("leased", [False, True], ids=["scratch", "held"])
@pytest.mark.parametrize("value", HOSTILE, ids=repr)
def test_hostile_values_are_protocol_errors(value, leased):
    a, peer = arena()
    block = a.scratch(100)
    block.take()

    if isinstance(value, Tensor):
        value = Tensor(value.dtype, value.shape, value.block, value.offset, leased)
    with pytest.raises(ProtocolError):
        Unpacker(peer.mappings.block, copy=True).unpack(value)
    assert block.is_taken


def test_copies_are_aligned_like_those_of_onnxruntime():
    memory = AlignedCopies()
    copies = [memory.copy(np.full(size, size, np.float32)) for size in (1, 0, 16, 300, 2000, 1, 17) * 40]
    for copy in copies:
        assert copy.ctypes.data % 64 == 0
        assert copy.flags.writeable and copy.flags.c_contiguous
        assert (copy == len(copy)).all()
    assert memory.copy(np.ones((2, 3)).T).shape == (3, 2)
    assert memory.copy(np.array(5)).shape == ()
