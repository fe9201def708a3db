"""What the ends of a lane know of foreign memories: announced once, few at a time, dropped when closed."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import numpy as np
import pytest

from onnx_dl.errors import DescriptorsExhausted, ForeignMemoryError, ProtocolError
from onnx_dl.system import descriptor_limits
from onnx_dl.tensors.foreign import (
    ForeignArray,
    ForeignMemory,
    SharedDescriptor,
    bytes_of,
    read_into,
    write_from,
)
from onnx_dl.tensors.foreign_tables import (
    MOST_NAMED,
    RESERVE,
    AnnouncedMemories,
    PeerMemories,
    PeerMemory,
    TooManyMemories,
    overlap,
)


def memfd(nbytes: int) -> int:
    fd = os.memfd_create("foreign")
    os.ftruncate(fd, nbytes)
    return fd


def memory(nbytes: int = 64) -> ForeignMemory:
    return ForeignMemory(memfd(nbytes), nbytes, is_mapped=False)


class Told:
    """What would have been sent to the worker."""

    def __init__(self) -> None:
        self.room = 64
        self.new: list[int] = []
        self.kinds: list[bool | None] = []
        self.dropped_numbers: list[int] = []

    @property
    def has_drops(self) -> bool:
        return bool(self.dropped_numbers)

    def shared(self, block: int, size: int, fd: int) -> None:
        raise AssertionError("no block is shared here")

    def foreign(self, memory: int, size: int, is_mapped: bool, fd: int) -> None:
        os.close(fd)
        self.new.append(memory)
        self.kinds.append(is_mapped)

    def part(self, number: int, size: int, fd: int) -> None:
        os.close(fd)
        self.new.append(number)
        self.kinds.append(None)

    def dropped(self, block: int) -> None:
        self.dropped_numbers.append(block)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def known(told: Told) -> AnnouncedMemories:
    numbers = iter(range(1, 1000))
    return AnnouncedMemories(told, numbers.__next__)


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_memory_is_announced_once(known: AnnouncedMemories, told: Told) -> None:
    first, second = memory(), memory()
    for _ in range(3):
        known.next_message()
        assert (known.number(first), known.number(second)) == (1, 2)
    assert told.new == [1, 2] and len(known) == 2
    first.close(), second.close()


def test_a_closed_memory_is_dropped_once(known: AnnouncedMemories, told: Told) -> None:
    first = memory()
    known.number(first)
    first.close()
    first.close()
    assert known.has_news
    known.next_message()
    assert told.dropped_numbers == [1] and len(known) == 0
    with pytest.raises(ForeignMemoryError, match="not registered any more"):
        known.number(first)
    assert told.new == [1]


def test_a_memory_that_nobody_has_is_dropped(known: AnnouncedMemories, told: Told) -> None:
    first = memory()
    known.number(first)
    del first
    gc.collect()
    known.drop_closed()
    assert told.dropped_numbers == [1]


def test_one_more_replaces_the_one_that_was_named_longest_ago(known: AnnouncedMemories, told: Told) -> None:
    some = [memory() for _ in range(MOST_NAMED + 1)]
    for each in some[:-1]:
        known.next_message()
        known.number(each)
    known.next_message()
    known.number(some[0])
    known.number(some[-1])
    assert told.dropped_numbers == [2] and len(known) == MOST_NAMED
    some[1].close()  # it is unknown by now: nothing is told
    known.next_message()
    assert told.dropped_numbers == [2]
    for each in some:
        each.close()


def test_one_message_has_room_for_so_many(known: AnnouncedMemories, told: Told) -> None:
    some = [memory() for _ in range(MOST_NAMED + 1)]
    known.next_message()
    for each in some[:-1]:
        known.number(each)
    with pytest.raises(TooManyMemories):
        known.number(some[-1])
    assert not told.dropped_numbers
    told.room = 0
    known.next_message()
    with pytest.raises(TooManyMemories):
        known.number(some[-1])
    for each in some:
        each.close()


def test_all_are_dropped(known: AnnouncedMemories, told: Told) -> None:
    first = memory()
    known.number(first)
    known.copied = 5
    known.drop_all()
    assert told.dropped_numbers == [1] and not known.copied and not len(known)
    known.next_message()
    assert known.number(first) == 2  # it may be announced again
    first.close()


def test_a_table_that_is_gone_is_not_told(told: Told) -> None:
    first = memory()
    table = AnnouncedMemories(told, iter(range(1, 9)).__next__)
    table.number(first)
    del table
    gc.collect()
    first.close()
    assert not told.dropped_numbers


def test_the_worker_keeps_few(told: Told) -> None:
    kept = PeerMemories(2)
    kept.add(1, 64, False, memfd(64))
    for number, size in ((1, 64), (0, 64), (-1, 64), (2, -1)):
        with pytest.raises(ProtocolError):
            kept.add(number, size, False, memfd(64))
    kept.add(2, 64, True, memfd(0))  # its size is looked at when it is used
    with pytest.raises(ProtocolError):
        kept.add(3, 64, False, memfd(64))
    with pytest.raises(ProtocolError, match="never announced"):
        kept.memory(3)
    kept.drop([1, 7])
    assert kept.drops == 1
    kept.add(3, 64, False, memfd(64))
    with pytest.raises(ForeignMemoryError, match="has 0 bytes, not 8"):
        kept.memory(2).check(0, 8)


def test_the_worker_takes_files_only() -> None:
    kept = PeerMemories(2)
    for fd in (*os.pipe(), os.open("/dev/null", os.O_RDWR), os.eventfd(0)):
        with pytest.raises(ProtocolError, match="not a regular file"):
            kept.add(1, 0, False, fd)


def test_memory_of_a_gpu_is_no_file_and_a_file_is_none() -> None:
    kept = PeerMemories(2)
    kept.add_part(1, 4096, os.open("/dev/null", os.O_RDWR))
    kept.add(2, 64, False, memfd(64))
    assert (kept.part(1).size, kept.memory(2).size) == (4096, 64)
    for find, number in ((kept.memory, 1), (kept.part, 2), (kept.part, 3)):
        with pytest.raises(ProtocolError):
            find(number)
    with pytest.raises(ProtocolError):  # too many
        kept.add_part(3, 4096, os.open("/dev/null", os.O_RDWR))
    kept.drop([1])
    with pytest.raises(ProtocolError):
        kept.part(1)


def test_parts_are_announced_as_what_they_are(known: AnnouncedMemories, told: Told) -> None:
    part = SharedDescriptor(os.open("/dev/null", os.O_RDWR), 4096)
    known.next_message()
    assert known.number(part) == known.number(part) == 1
    assert told.kinds == [None]
    part.close()
    assert known.has_news
    known.next_message()
    assert told.dropped_numbers == [1]


def test_a_mapping_lives_as_long_as_its_arrays() -> None:
    fd = memfd(8192)
    os.pwrite(fd, b"abcd", 4096)
    one = PeerMemory(fd, 8192, True)
    array = one.view(4096, 4)
    del one
    gc.collect()
    assert bytes(array) == b"abcd"
    del array
    with open("/proc/self/maps") as maps:
        assert "memfd:foreign" not in maps.read()


def test_slices_of_one_file_by_two_names() -> None:
    fd = memfd(64)
    one, same, other = (
        PeerMemory(os.dup(fd), 64, True),
        PeerMemory(fd, 64, True),
        PeerMemory(memfd(8), 8, True),
    )
    assert overlap((one, 0, 8), (same, 7, 8)) and overlap((same, 7, 8), (one, 0, 8))
    assert not overlap((one, 0, 8), (same, 8, 8))
    assert not overlap((one, 0, 8), (other, 0, 8))
    assert not overlap((one, 4, 0), (same, 4, 4))


def test_bytes_of_arrays() -> None:
    assert bytes_of(np.dtype("f4"), (2, 3)) == 24 and bytes_of(np.dtype("?"), ()) == 1
    assert bytes_of(np.dtype("f8"), (1 << 40, 1 << 40)) == 1 << 83
    for dtype in ("O", "U4", "S4", "V2", "M8[s]", "f4,f4", "(2,)f4"):
        with pytest.raises(ForeignMemoryError, match="cannot lie in shared memory"):
            bytes_of(np.dtype(dtype), (2,))
    first = memory()
    with pytest.raises(ForeignMemoryError, match="reach beyond"):  # before memory is taken for it
        ForeignArray(first, 0, np.dtype("f8"), (1 << 40, 1 << 40)).copy()
    first.close()


def test_what_cannot_be_read_or_written() -> None:
    fd = memfd(8)
    for nbytes in (9, 1 << 20):
        with pytest.raises(ForeignMemoryError, match="ends after 8 of the"):
            read_into(fd, 0, memoryview(bytearray(nbytes)))
    with pytest.raises(ForeignMemoryError, match="has 8 bytes, not 9"):
        write_from(fd, 1, memoryview(bytes(8)))
    only_read = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    with pytest.raises(ForeignMemoryError, match="cannot be written"):
        write_from(only_read, 0, memoryview(bytes(8)))
    only_written = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY)
    with pytest.raises(ForeignMemoryError, match="cannot be read"):
        read_into(only_written, 0, memoryview(bytearray(8)))
    for each in (fd, only_read, only_written):
        os.close(each)


def test_a_memory_without_a_descriptor_is_an_error_of_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    free = RESERVE
    monkeypatch.setattr(descriptor_limits, "free", lambda: free)
    memories = PeerMemories(2)
    memories.add(1, 64, False, memfd(64))
    free -= 1
    memories.add(2, 64, False, memfd(64))
    assert memories.memory(1).size == 64
    with pytest.raises(DescriptorsExhausted):
        memories.memory(2)
    with pytest.raises(ProtocolError):  # it counts
        memories.add(3, 64, False, memfd(64))
    with pytest.raises(ProtocolError):
        memories.add(2, 64, False, memfd(64))
    memories.drop([2])
    free += 1
    memories.add(3, 64, False, memfd(64))
    assert memories.memory(3).size == 64 and memories.drops == 1
