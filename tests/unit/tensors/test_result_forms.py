"""Text and maps in shared memory, and results that take the place of others."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest

from onnx_dl.errors import ProtocolError
from onnx_dl.protocol.lane import Items, Packed, Plain, Tensor, Text
from onnx_dl.tensors import packing
from onnx_dl.tensors.result_forms import ResultForm, in_one_place, reader_of
from onnx_dl.tensors.values import VIEW_FROM, Packer, Unpacker
from tests.support.builders import arena

LABEL = np.array([3])
MAPS = [{"a": 0.25, "b": math.nan}, {"a": -0.0, "b": math.inf}]
TEXT = np.array(["one", "zwölf"], object)


def sent(results: list[Any]) -> tuple[Any, Any, list[Any]]:
    """An arena, its peer, and how the results lie there."""
    a, peer = arena()
    return a, peer, Packer(a, VIEW_FROM).pack(results, from_engine=True)


def bits(number: float) -> bytes:
    return struct.pack("d", number)


def alike(got: Any, wanted: Any) -> bool:
    """The same types, order and bits."""
    if isinstance(wanted, np.ndarray):
        if wanted.dtype.kind == "O":
            return got.dtype.kind == "O" and got.shape == wanted.shape and got.tolist() == wanted.tolist()
        return got.dtype == wanted.dtype and got.shape == wanted.shape and got.tobytes() == wanted.tobytes()
    if type(got) is not type(wanted):
        return False
    if isinstance(wanted, list):
        return len(got) == len(wanted) and all(map(alike, got, wanted))
    if isinstance(wanted, dict):
        return alike(list(got), list(wanted)) and alike(list(got.values()), list(wanted.values()))
    return bits(got) == bits(wanted) if isinstance(wanted, float) else got == wanted


# --- maps --------------------------------------------------------------------------------------------------

PAYLOADS = [
    struct.unpack("<d", struct.pack("<Q", word))[0] for word in (0x7FF8000000000123, 0xFFF0000000000001)
]
TABLES = [
    MAPS,
    [],
    [{}],
    [{0: 0.5, 7: 1.0}, {0: 0.25, 7: 0.0}],
    [{"a": payload} for payload in PAYLOADS],
    [{"a": 5e-324, "b": 1.7976931348623157e308}],
    [{"a": 2**63, "b": -(2**63), "c": 2**64 - 1}],
    [{-(2**63): 1.0, 2**63 - 1: 2.0}],
    [{"a": "text", "b": ""}, {"a": "ü" * 1000, "b": "\0"}],
    [{"a": 1.0}, {"b": 2.0}, {"a": 1.0, "b": 2.0}, {}],
    [{"b": 1.0, "a": 2.0}, {"a": 1.0, "b": 2.0}],
    [{"a": 1, "b": 1.0, "c": True, "d": "1", "e": None, "f": b"1"}],
    [{1: 1.0, "1": 2.0}],
    [{"": 1.0}],
    [{"k" * 5000: 1.0}],
    [{f"class {index}": index / 7 for index in range(500)}] * 20,
]


@pytest.mark.parametrize("from_engine", [True, False])
@pytest.mark.parametrize("table", TABLES, ids=lambda table: str(table)[:40])
def test_maps_arrive_as_they_were(table: list, from_engine: bool):
    a, peer = arena()
    (packed,) = Packer(a).pack([table], from_engine=from_engine)
    assert isinstance(packed, Packed)
    assert alike(Unpacker(peer.mappings.block, copy=True).unpack(packed), table)


@pytest.mark.parametrize(
    "value",
    [[{"a": np.float32(1)}], [{"a": (1,)}], [{"a": np.ones(2)}], [{(1,): 1.0}], [{"a": 1.0}, (1,)]],
    ids=str,
)
def test_what_msgpack_would_lose_goes_in_parts(value: list):
    a, peer = arena()
    (packed,) = Packer(a).pack([value])
    assert isinstance(packed, Items)
    assert repr(Unpacker(peer.mappings.block, copy=True).unpack(packed)) == repr(value)


def test_an_engines_list_is_known_by_its_first_row():
    """A later one that has no form in msgpack is seen all the same."""
    a, peer = arena()
    value = [{"a": 1.0}, {"a": np.ones(2)}]
    (packed,) = Packer(a).pack([value], from_engine=True)
    assert isinstance(packed, Items)
    assert repr(Unpacker(peer.mappings.block, copy=True).unpack(packed)) == repr(value)


# --- text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_any_text(seed: int):
    rng = np.random.default_rng(seed)
    a, peer = arena()
    unpack = Unpacker(peer.mappings.block, copy=True).unpack
    for _ in range(50):
        shape = tuple(int(n) for n in rng.integers(0, 4, rng.integers(0, 4)))
        items = [
            "".join(map(chr, rng.choice([0, 65, 0xE4, 0x4E00, 0x1F600], int(rng.integers(0, 30)))))
            for _ in range(math.prod(shape))
        ]
        array = np.empty(len(items), object)
        array[:] = items
        array = array.reshape(shape)
        first, second = Packer(a).pack([array, array.T])
        assert alike(unpack(first), array)
        assert alike(unpack(second), array.T)


@pytest.mark.parametrize("surrogate", ["\ud800", "fine \udc80"])
def test_surrogates_have_no_form(surrogate: str):
    a, _ = arena()
    for value in (np.array(["ok", surrogate], object), [surrogate], {"k": surrogate}):
        with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
            Packer(a).pack([value])


def test_the_place_does_not_depend_on_the_length():
    a, _ = arena()
    short, long = (Packer(a).pack([np.array([text], object), LABEL, MAPS]) for text in ("x", "x" * 1000))
    assert short == long


def test_what_is_no_text_at_its_place():
    a, peer = arena()
    block = a.scratch(60_000)
    for data in (b"", b"\xc1", b"\xc0", packing.encode([1]), packing.encode(["a"]), b"\x91\xa2\xff\xff"):
        packing.write(block, 0, 64, data)
        with pytest.raises(ProtocolError):
            Unpacker(peer.mappings.block, copy=True).unpack(Text((2,), block.number, 0))
    packing.write(block, 0, 64, b"\x91" * 50_000 + b"\xc0")
    with pytest.raises(ProtocolError):
        Unpacker(peer.mappings.block, copy=True).unpack(Packed(block.number, 0))


@pytest.mark.parametrize(
    "numbers", [(64, 1 << 40), (1 << 63, 1), (1 << 63, 1 << 63), (65_537, 0), (0, 65_537)]
)
def test_places_beyond_the_block(numbers: tuple[int, int]):
    a, peer = arena()
    block = a.scratch(1000)
    struct.pack_into("=QQ", block.payload, 0, *numbers)
    for value in (Text((1,), block.number, 0), Packed(block.number, 0)):
        with pytest.raises(ProtocolError):
            Unpacker(peer.mappings.block, copy=True).unpack(value)


# --- taking the place of others ----------------------------------------------------------------------------

OTHERS = {
    "numbers": ([LABEL], [np.array([-7])]),
    "maps": ([MAPS], [[{"a": 1.0, "b": 2.0}]]),
    "more maps": ([MAPS], [MAPS * 100]),
    "other maps": ([MAPS], [[{"x": "y"}]]),
    "no maps": ([MAPS], [[]]),
    "text": ([TEXT], [np.array(["", "x" * 10_000], object)]),
    "all": ([LABEL, MAPS, TEXT, LABEL], [np.array([1]), [], TEXT[::-1], np.array([2])]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_results_of_the_same_form_take_the_place(name: str):
    before, after = OTHERS[name]
    a, peer, packed = sent(before)
    form = ResultForm(in_one_place(Items("list", packed)), a.current_scratch)
    readers = [reader_of(value, peer.mappings.block(value.block), np.copy) for value in packed]
    for results in (before, after, before):
        assert form.put(results, a)
        assert alike([read() for read in readers], list(results))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([LABEL], [LABEL, LABEL]),
        ([LABEL], [np.array([1, 2])]),
        ([LABEL], [np.array([1.0])]),
        ([LABEL], [np.array([1]).astype(">i8")]),
        ([LABEL], [[1]]),
        ([LABEL], [None]),
        ([TEXT], [TEXT.reshape(2, 1)]),
        ([TEXT], [np.array(["a", "b"])]),
        ([TEXT], [["a", "b"]]),
        ([MAPS], [None]),
        ([MAPS], [TEXT]),
        ([MAPS], [MAPS[0]]),
        ([MAPS], [[np.ones(2)]]),
        ([MAPS], [[{"a": np.ones(2)}]]),
        ([MAPS], [[(1, 2)]]),
    ],
    ids=str,
)
def test_results_of_another_form_do_not(before: list, after: list):
    a, _, packed = sent(before)
    assert not ResultForm(packed, a.current_scratch).put(after, a)


def test_results_that_need_more_room_do_not():
    a, _, packed = sent([TEXT])
    form, block = ResultForm(packed, a.current_scratch), a.current_scratch
    assert not form.put([np.array(["x" * 200_000, ""], object)], a)
    assert a.current_scratch is not block
    assert not form.put([TEXT], a), "what lay there is gone"


@pytest.mark.parametrize(
    "value",
    [
        Items("list", []),
        Items("tuple", [Packed(1, 0)]),
        Items("list", [Packed(1, 0), Plain(1)]),
        Items("list", [Tensor("<f4", (0,), 0, 0)]),
        Items("list", [Tensor("<f4", (4,), 1, 0, True), Packed(2, 0)]),
        Items("list", [Text((0,), 0, 0)]),
        Items("list", [Items("list", [Packed(1, 0)])]),
        Packed(1, 0),
        Plain(None),
    ],
    ids=str,
)
def test_results_that_leave_no_place(value: Any):
    assert in_one_place(value) is None
