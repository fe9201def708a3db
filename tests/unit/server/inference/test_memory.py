"""Inputs in regions that this process reads itself: sizes are compared before memory is taken."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from onnx_dl.server.inference import memory
from onnx_dl.server.interfaces import RegionStatus
from onnx_dl.server.shm.regions import Region
from onnx_dl.server.v2.failures import RequestFailure
from onnx_dl.server.v2.messages import InputTensor, RegionSlice
from onnx_dl.tensors.foreign import ForeignMemory

SIZE = 1 << 30


class Memory:
    """Makes arrays, and notes their sizes."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def __call__(self, nbytes: int) -> Any:
        self.made.append(nbytes)
        return np.empty(nbytes, np.uint8)


@pytest.fixture
def region() -> Iterator[Region]:
    """A sparse region of 1 GiB, which begins with the text "ab"."""
    fd = os.memfd_create("region")
    os.ftruncate(fd, SIZE)
    os.pwrite(fd, b"\2\0\0\0ab", 0)
    region = Region(RegionStatus("r", "/k", 0, SIZE), ForeignMemory(fd, SIZE, is_mapped=False))
    yield region
    region.unregister()


def value(region: Region, datatype: str, shape: tuple[int, ...], nbytes: int, empty: Memory) -> Any:
    where = RegionSlice("r", 0, nbytes)
    return memory.input_value(InputTensor("x", datatype, shape, where), where, region, empty, 1 << 20)


@pytest.mark.parametrize(
    ("datatype", "shape", "nbytes", "http", "words"),
    [
        ("BF16", (1,), SIZE, 400, "Expected 2 bytes"),
        ("BF16", (1 << 40,), SIZE, 400, "Expected 2199023255552 bytes"),
        ("BF16", (SIZE // 2,), SIZE, 413, "the most is 1048576"),
        ("BYTES", (1 << 29,), SIZE, 400, "Expected at least 2147483648 bytes"),
        ("BYTES", (1,), SIZE, 413, "the most is 1048576"),
        ("COMPLEX", (1,), SIZE, 400, "not known"),
    ],
)
def test_nothing_is_allocated_for_sizes_that_do_not_fit(
    region: Region, datatype: str, shape: tuple[int, ...], nbytes: int, http: int, words: str
) -> None:
    empty = Memory()
    with pytest.raises(RequestFailure, match=words) as caught:
        value(region, datatype, shape, nbytes, empty)
    assert caught.value.http == http
    assert not empty.made


def test_what_is_read_here_lies_in_memory_that_is_counted(region: Region) -> None:
    empty = Memory()
    assert value(region, "BYTES", (1,), 6, empty).tolist() == ["ab"]
    assert value(region, "BF16", (2, 1), 4, empty).tolist() == [[2], [0]]
    assert value(region, "BF16", (0,), 0, empty).shape == (0,)
    assert empty.made == [6, 4]
