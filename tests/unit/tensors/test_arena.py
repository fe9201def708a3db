"""Blocks of shared memory: sizes, reuse, held blocks, and memory that is given back."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from onnx_dl.errors import ProtocolError, SharedMemoryError
from onnx_dl.tensors import block as block_module
from onnx_dl.tensors import block as blocks
from onnx_dl.tensors.arena import IDLE_TURNS, SMALLEST, Arena, Mappings, NoPeer, size_class
from onnx_dl.tensors.block import HEADER, Block, align
from onnx_dl.tensors.segment import freeze, thaw
from tests.support.builders import arena, segment

MB = 1 << 20


@pytest.fixture
def block():
    fd = segment(1024 + HEADER)
    return Block(1, 1024, fd)


# --- sizes -----------------------------------------------------------------------------------------------


def test_size_class_properties():
    rng = random.Random(1)
    sizes = [0, 1, SMALLEST - 1, SMALLEST, SMALLEST + 1, *(1 << n for n in range(17, 40))]
    sizes += [(1 << n) + d for n in range(17, 40) for d in (-1, 1)]
    sizes += [rng.randrange(1, 1 << rng.randrange(1, 42)) for _ in range(5000)]
    last = 0
    for nbytes in sorted(sizes):
        size = size_class(nbytes)
        assert size >= max(nbytes, SMALLEST)
        assert size <= max(SMALLEST, nbytes * 1.25 + 1)
        assert size >= last  # grows with the request
        assert size_class(size) == size
        assert size % HEADER == 0
        last = size


def test_at_most_four_classes_per_doubling():
    for n in range(17, 30):
        assert len({size_class(x) for x in range((1 << n) + 1, (2 << n) + 1, 1 << (n - 8))}) <= 4


def test_align():
    assert [align(n) for n in (0, 1, 63, 64, 65, 128)] == [0, 64, 64, 64, 128, 128]


# --- blocks ----------------------------------------------------------------------------------------------


def test_array_lies_in_the_payload_aligned_and_writable(block):
    array = block.array("<f4", (4, 8), 128)
    array[:] = 3
    assert array.flags.c_contiguous and array.flags.writeable and array.flags.aligned
    assert array.__array_interface__["data"][0] % HEADER == 0
    assert block.array("<f4", (32,), 128).tolist() == [3.0] * 32
    assert block.array("|u1", (128,), 0).tolist() == [0] * 128
    assert not block.is_taken and block.clock == 0  # the header is untouched


@pytest.mark.parametrize("method", ["array", "held_array"])
@pytest.mark.parametrize(
    ("dtype", "shape", "offset"),
    [
        ("<f4", (257,), 0),
        ("<f4", (256,), 4),
        ("<f4", (1,), -4),
        ("<f4", (1,), -(2**62)),
        ("<f4", (1,), 2**62),
        ("<f4", (1,), 2**63),
        ("<f4", (1,), 1025),
        ("<f4", (0,), 1025),
        ("<f4", (-1,), 0),
        ("<f4", (-4, -4), 0),
        ("<f4", (2**62, 4), 0),
        ("<f4", (2**32, 2**32), 0),
        ("<f4", (2**63,), 0),
        ("<f4", (1,) * 100, 0),
        ("|O", (1,), 0),
        ("nonsense", (1,), 0),
        ("", (1,), 0),
        ("<f4,<O", (1,), 0),
    ],
)
def test_bounds(block, method, dtype, shape, offset):
    with pytest.raises(ProtocolError, match="block of 1024 bytes"):
        getattr(block, method)(dtype, shape, offset)


def test_exact_fit_and_empty(block):
    assert block.array("|u1", (1024,), 0).nbytes == 1024
    assert block.array("|u1", (0, 5), 1024).shape == (0, 5)
    assert block.array("<f8", (), 1016).shape == ()


def test_block_is_reheld_with_the_last_view(block):
    block.take()
    array = block.held_array("<i4", (2, 4), 64)
    assert array.flags.writeable and array.flags.c_contiguous
    array[:] = 5
    assert block.array("<i4", (8,), 64).tolist() == [5] * 8
    view = array[1:].T
    del array
    gc.collect()
    assert block.is_taken
    del view
    gc.collect()
    assert not block.is_taken


def clear(address):
    """What a store-release does, but for its order."""
    ctypes.c_uint32.from_address(address).value = 0


@pytest.mark.parametrize("release", [None, clear])
def test_release_leaves_the_other_words_of_the_header(block, monkeypatch, release):
    monkeypatch.setattr(block_module, "clear_word", release)
    block.take()
    block.ask(2**63)
    block.clock = 2**64 - 1
    block.release()
    block.begin()
    assert (block.is_taken, block.clock, block.begun) == (False, 2**64 - 1, 2**63)


def test_machines_that_keep_the_order_of_writes_pay_for_nothing():
    assert blocks.store_release_for("x86_64") is None


@pytest.mark.skipif(blocks.clear_word is None, reason="this machine needs no store-release")
def test_store_release_clears_four_bytes():
    words = (ctypes.c_uint32 * 2)(1, 7)
    blocks.clear_word(ctypes.addressof(words))
    assert list(words) == [0, 7]


def test_refused_held_array_does_not_release_the_block(block):
    block.take()
    with pytest.raises(ProtocolError):
        block.held_array("<f4", (2000,), 0)
    gc.collect()
    assert block.is_taken


def test_block_is_mapped_where_no_descriptor_is_left(block, monkeypatch):
    def refused(fd):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "dup", refused)
    block.array("|u1", (4,), 0)[:] = 7
    monkeypatch.undo()
    assert bytes(Block(1, 1024, block.mapping.duplicate()).payload[:4]) == bytes([7] * 4)


def test_frozen_bytes_are_read_whole_by_several_at_once():
    """Descriptors of one memory have one position, also in other processes."""
    data = random.Random(1).randbytes(8 * MB)
    fd = freeze(data)
    os.lseek(fd, 5, os.SEEK_SET)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: thaw(fd), range(40)))
    assert all(each == data for each in found)
    assert os.lseek(fd, 0, os.SEEK_CUR) == 5
    os.close(fd)


def test_held_array_outlives_block_and_mapping(block):
    mappings = Mappings()
    fd = segment(MB + HEADER)
    mappings.add(7, MB, fd)
    array = mappings.block(7).held_array("<f4", (MB // 4,), 0)
    mappings.drop([7])
    assert not mappings.has(7)
    gc.collect()
    array[:] = 1
    assert array.sum() == MB // 4


def test_clock_and_holding_are_seen_by_both_sides():
    a, peer = arena()
    block = a.page()
    theirs = peer.mappings.block(block.number)
    block.clock = 123
    theirs.take()
    assert theirs.clock == 123
    assert block.is_taken
    theirs.release()
    assert not block.is_taken


def test_mappings_clock_is_the_latest():
    a, peer = arena()
    assert peer.mappings.clock() == 0
    one, two = a.page(), a.page()
    one.clock, two.clock = 5, 3
    assert peer.mappings.clock() == 5


def test_mapping_smaller_than_announced_is_refused_and_its_descriptor_closed():
    mappings = Mappings()
    fd = segment(4096)
    with pytest.raises(SharedMemoryError, match="smaller than announced"):
        mappings.add(1, 8192, fd)
    with pytest.raises(OSError) as caught:
        os.fstat(fd)
    assert caught.value.errno == errno.EBADF
    assert not mappings.has(1)


# --- scratch ---------------------------------------------------------------------------------------------


def test_scratch_is_announced_once_and_reused():
    a, peer = arena()
    first = a.scratch(100)
    assert first.size == SMALLEST
    for n in range(20):
        assert a.scratch(n * 1000) is first
    assert peer.calls == [("shared", 1)]
    assert a.nbytes == SMALLEST


def test_scratch_that_is_too_small_is_replaced_by_a_doubled_one():
    a, peer = arena()
    a.scratch(MB)
    second = a.scratch(MB + 1)
    assert second.size >= 2 * MB
    assert a.scratch(2 * MB) is second
    assert peer.calls == [("shared", 1), ("dropped", 1), ("shared", 2)]
    assert not peer.mappings.has(1)


def test_doubling_does_not_more_than_double_what_is_needed():
    a, _ = arena()
    a.scratch(10 * MB)
    assert a.scratch(11 * MB).size <= 25 * MB
    a, _ = arena()
    a.scratch(100)
    assert a.scratch(100 * MB).size <= size_class(100 * MB)


def test_growing_sequence_allocates_few_blocks():
    a, peer = arena()
    for n in range(1, 400):
        a.scratch(n * 10_000)
    assert len([c for c in peer.calls if c[0] == "shared"]) <= 20


def test_scratch_after_a_burst_is_trimmed_but_not_while_it_is_needed():
    a, _ = arena()
    for _ in range(3 * IDLE_TURNS):
        assert a.scratch(100 * MB).size >= 100 * MB
    for n in range(2 * IDLE_TURNS):
        a.scratch(MB)
        assert n < 2 * IDLE_TURNS
    assert a.nbytes <= 2 * MB


def test_scratch_of_alternating_sizes_is_kept():
    a, peer = arena()
    for n in range(4 * IDLE_TURNS):
        a.scratch(20 * MB if n % 8 == 0 else 1000)
    assert len([c for c in peer.calls if c[0] == "shared"]) <= 2


def test_page_stays():
    a, peer = arena()
    page = a.page()
    assert page.size == 0
    for _ in range(3 * IDLE_TURNS):
        a.scratch(10)
        a.take(10)
    a.trim()
    assert ("dropped", page.number) not in peer.calls


# --- held blocks -----------------------------------------------------------------------------------------


def test_taken_block_is_not_used_again_until_the_peer_clears_it():
    a, peer = arena()
    one = a.take(MB)
    two = a.take(MB)
    assert one is not two and one.is_taken and two.is_taken
    peer.mappings.block(one.number).release()
    assert a.take(MB) is one
    assert one.is_taken
    assert peer.calls == [("shared", one.number), ("shared", two.number)]


def test_take_finds_the_smallest_that_fits_and_none_that_is_far_too_large():
    a, _ = arena()
    small, middle, large = a.take(MB), a.take(2 * MB), a.take(50 * MB)
    for block in (large, middle, small):
        block.release()
    assert a.take(int(1.5 * MB)) is middle
    assert a.take(MB) is small
    assert a.take(MB) not in (small, middle, large)


def test_a_scratch_block_is_never_taken():
    a, _ = arena()
    scratch = a.scratch(MB)
    assert a.take(MB) is not scratch


def test_free_blocks_are_given_back_after_a_burst():
    a, peer = arena()
    burst = [a.take(MB) for _ in range(20)]
    for block in burst:
        block.release()
    keep = a.take(MB)
    for _ in range(3 * IDLE_TURNS):
        keep.release()
        assert a.take(MB) is keep
    dropped = {number for kind, number in peer.calls if kind == "dropped"}
    assert dropped == {block.number for block in burst} - {keep.number}
    assert a.nbytes == keep.size


def test_held_blocks_are_not_given_back():
    a, peer = arena()
    held = a.take(MB)
    for _ in range(3 * IDLE_TURNS):
        a.scratch(10)
    assert a.nbytes >= held.size
    assert ("dropped", held.number) not in peer.calls
    held.release()
    for _ in range(2 * IDLE_TURNS):
        a.scratch(10)
    assert ("dropped", held.number) in peer.calls


def test_trim_gives_back_all_that_nobody_holds():
    a, peer = arena()
    a.scratch(MB)
    free, held = a.take(MB), a.take(MB)
    free.release()
    a.trim()
    assert a.nbytes == held.size
    assert {n for kind, n in peer.calls if kind == "dropped"} == {1, free.number}
    assert a.scratch(10).size == SMALLEST  # the old peak is forgotten


def test_numbers_are_never_used_twice():
    a, peer = arena()
    for n in range(1, 50):
        a.scratch(n * MB)
        a.trim()
    shared = [number for kind, number in peer.calls if kind == "shared"]
    assert len(shared) == len(set(shared)) == 49
    assert 0 not in shared  # which stands for "no block" on the wire


# --- the system ------------------------------------------------------------------------------------------


def open_segments() -> int:
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            found += "memfd:onnx-dl" in os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
    return found


def mapped_bytes() -> int:
    total = 0
    with open("/proc/self/maps") as maps:
        for line in maps:
            if "memfd:onnx-dl" in line:
                start, end = line.split()[0].split("-")
                total += int(end, 16) - int(start, 16)
    return total


def test_memory_is_given_back_to_the_system():
    gc.collect()
    before, fds = mapped_bytes(), open_segments()
    a, peer = arena()
    a.scratch(20 * MB)
    a.take(20 * MB).release()
    assert mapped_bytes() - before >= 80 * MB  # both sides map both
    a.trim()
    gc.collect()
    assert mapped_bytes() == before
    a.take(MB)
    del a, peer
    gc.collect()
    assert (mapped_bytes(), open_segments()) == (before, fds)


def test_results_that_an_application_keeps_cost_it_no_descriptors():
    """Most systems allow 1024: somebody who keeps a thousand results must not run out of them."""
    fds = open_segments()
    a, peer = arena()
    kept = [peer.mappings.block(a.take(SMALLEST).number).held_array("|u1", (SMALLEST,), 0) for _ in range(50)]
    assert open_segments() - fds < 10
    assert len(kept) == 50


def test_refused_memory_is_an_error_of_ours_and_leaks_nothing(monkeypatch):
    fds = open_segments()

    def refuse(fd, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    a, peer = arena()
    with pytest.raises(SharedMemoryError, match=r"refused .* bytes .*No space left") as caught:
        a.scratch(MB)
    assert isinstance(caught.value, MemoryError)
    with pytest.raises(SharedMemoryError):
        a.take(MB)
    assert (a.nbytes, peer.calls, open_segments()) == (0, [], fds)
    monkeypatch.undo()
    assert a.scratch(MB).size == MB


def test_failed_announcement_leaks_nothing(monkeypatch):
    def none_left(fd: int) -> int:
        raise OSError(errno.EMFILE, "no descriptor is left")

    fds = open_segments()
    a, peer = arena()
    monkeypatch.setattr(os, "dup", none_left)
    for take in (a.scratch, a.take, a.letter):
        with pytest.raises(OSError, match="left"):
            take(MB)
    assert (a.nbytes, peer.calls, open_segments()) == (0, [], fds)
    monkeypatch.undo()
    assert a.scratch(MB).size == MB


def test_a_message_that_announces_enough_takes_no_new_block():
    a, peer = arena()
    kept = a.take(MB)
    peer.room = 0
    assert a.take(MB) is None
    kept.release()
    assert a.take(MB) is kept, "the peer knows this one"
    assert a.scratch(MB).size == MB, "without scratch no message could be sent"
    assert a.letter(MB).size == MB


def test_what_cannot_be_announced_is_not_adopted():
    a, peer = arena()
    other = Arena(NoPeer(), keep_descriptors=True)
    first, second = other.take(MB), other.take(MB)
    number = a.adoptions.number(first)
    peer.room = 0
    assert a.adoptions.number(second) is None
    assert a.adoptions.number(first) == number
    peer.room = 1
    second.mapping.close_descriptor()  # another thread has more recent ones
    assert a.adoptions.number(second) is None


def test_letters_use_free_blocks_again_and_go_when_they_are_not_used():
    a, peer = arena()
    letter = a.letter(MB)
    assert a.letter(MB) is letter
    leased = a.take(MB)
    assert leased is letter, "a letter is valid until the next message"
    assert a.letter(MB) is not leased
    leased.release()
    for _ in range(3 * IDLE_TURNS):
        a.scratch(10)
    assert a.nbytes == SMALLEST
    assert [call for call, _ in peer.calls].count("dropped") == 2


def test_hostile_announcements():
    for number, size in ((0, 10), (-1, 10), (2, -1), (1, 10), (2, 2**62)):
        mappings = Mappings()
        mappings.add(1, 0, segment(HEADER))
        fds = open_segments()
        with pytest.raises((ProtocolError, SharedMemoryError)):
            mappings.add(number, size, segment(HEADER))
        assert open_segments() == fds
        assert not mappings.has(2)


def test_freeze_and_thaw():
    for data in (b"", b"x", np.random.default_rng(1).bytes(3 * MB + 5)):
        fd = freeze(data)
        try:
            assert thaw(fd) == data
            assert thaw(fd) == data  # twice: a second worker reads it too
        finally:
            os.close(fd)


def test_segments_are_not_inherited():
    fd = segment(10)
    assert not os.get_inheritable(fd)
    os.close(fd)
