"""Registered regions: names, slices, users, and that each memory is closed once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from onnx_dl.errors import ForeignMemoryError, PlaceTooSmall
from onnx_dl.server.interfaces import RegionStatus
from onnx_dl.server.shm import regions as module
from onnx_dl.server.shm.regions import Region, Regions, failure_of
from onnx_dl.server.v2.failures import RequestFailure

F4 = np.dtype(np.float32)


def memfd(nbytes: int) -> int:
    fd = os.memfd_create("region")
    os.ftruncate(fd, nbytes)
    return fd


@pytest.fixture
def key() -> Iterator[str]:
    name = f"odl-test-{os.getpid()}"
    path = f"/dev/shm/{name}"
    with open(path, "wb") as file:
        file.truncate(4096)
    yield f"/{name}"
    os.unlink(path)


@pytest.fixture
def regions() -> Iterator[Regions]:
    made = Regions("copy")
    yield made
    made.close()


def refused(work: Callable[[], object]) -> tuple[int, str, str]:
    with pytest.raises(RequestFailure) as caught:
        work()
    return caught.value.http, caught.value.grpc, str(caught.value)


def test_a_region_is_registered_read_and_written(regions: Regions, key: str) -> None:
    regions.register("in", key, 64, 128)
    assert regions.status(None) == regions.status("in") == [RegionStatus("in", key, 64, 128)]
    with regions.find("in") as region:
        region.write(8, 4, "y", b"abcd")
        assert region.read(8, 4) == b"abcd"
        assert region.array(8, F4, (2,)).offset == 72
        assert region.place(0, 128).offset == 64
    with open(f"/dev/shm{key}", "rb") as file:
        assert file.read()[72:76] == b"abcd"


def test_a_name_is_registered_once(regions: Regions, key: str) -> None:
    regions.register("in", key, 0, 64)
    told = refused(lambda: regions.register("in", key, 0, 64))
    assert told == (400, "ALREADY_EXISTS", "shared memory region 'in' already in manager")
    assert refused(lambda: regions.adopt(RegionStatus("in", key, 0, 64), memfd(64)))[:2] == told[:2]
    regions.register("out", key, 0, 64)  # the same memory by another name
    assert [each.name for each in regions.status(None)] == ["in", "out"]


def test_an_unknown_name(regions: Regions) -> None:
    regions.unregister("none")
    regions.unregister(None)
    assert refused(lambda: regions.status("none")) == (
        404, "NOT_FOUND", "Unable to find system shared memory region: 'none'"
    )  # fmt: skip
    assert refused(lambda: regions.find("none"))[:2] == (404, "NOT_FOUND")


@pytest.mark.parametrize(
    ("offset", "byte_size"),
    [(0, 4097), (4096, 1), (-1, 4), (0, 0), (0, -1), (1 << 63, 1), (0, 1 << 63), (1 << 62, 1 << 62)],
)
def test_a_region_beyond_its_memory(regions: Regions, key: str, offset: int, byte_size: int) -> None:
    http, _, text = refused(lambda: regions.register("in", key, offset, byte_size))
    assert http == 400 and text.startswith("failed to register shared memory region 'in'")
    assert regions.status(None) == []


@pytest.mark.parametrize(
    ("offset", "nbytes", "text"),
    [
        (128, 1, "Invalid offset for"),
        (-1, 1, "Invalid offset for"),
        (1 << 70, 1, "Invalid offset for"),
        (0, 129, "Invalid offset + byte size for"),
        (120, 1 << 70, "Invalid offset + byte size for"),
        (0, -1, "Invalid offset + byte size for"),
    ],
)
def test_a_slice_beyond_its_region(regions: Regions, key: str, offset: int, nbytes: int, text: str) -> None:
    regions.register("in", key, 64, 128)
    with regions.find("in") as region:
        for work in (
            lambda: region.read(offset, nbytes),
            lambda: region.place(offset, nbytes),
            lambda: region.write(offset, nbytes, "y", b""),
            lambda: region.array(offset, np.dtype(np.uint8), (nbytes,)),
        ):
            http, _, told = refused(work)
            assert http == 400
            assert told.startswith(text) or (nbytes < 0 and "cannot lie in" in told)


def test_an_output_that_does_not_fit(regions: Regions, key: str) -> None:
    regions.register("out", key, 0, 8)
    with regions.find("out") as region:
        region.write(0, 8, "y", b"12345678")
        told = refused(lambda: region.write(0, 4, "y", b"abcde"))
        assert told[2] == (
            "shared memory size specified with the request for output 'y' (4 bytes) should be at least "
            "5 bytes to hold the results"
        )
        assert region.read(0, 8) == b"12345678"
    assert str(failure_of(PlaceTooSmall("", output="y", needed=5, available=4))) == told[2]
    assert failure_of(ForeignMemoryError("gone")).http == 400


def test_memory_that_its_maker_truncates(regions: Regions, key: str) -> None:
    regions.register("in", key, 0, 4096)
    os.truncate(f"/dev/shm{key}", 16)
    with regions.find("in") as region:
        assert region.read(0, 16) == bytes(16)
        assert "has 16 bytes, not 17" in refused(lambda: region.read(0, 17))[2]
        assert refused(lambda: region.write(0, 32, "y", bytes(32)))[0] == 400
    assert os.stat(f"/dev/shm{key}").st_size == 16, "a write has lengthened the client's file"


def test_off_is_told() -> None:
    off = Regions("off")
    for work in (
        lambda: off.register("in", "/x", 0, 64),
        lambda: off.unregister("in"),
        lambda: off.find("in"),
        lambda: off.adopt(RegionStatus("in", "/x", 0, 64), memfd(64)),
    ):
        http, grpc, text = refused(work)
        assert (http, grpc) == (403, "PERMISSION_DENIED") and "--client-shm" in text
    assert off.status(None) == []


def test_names_have_a_length_and_regions_a_number(regions: Regions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 2)
    for name in ("", "x" * 1025):
        assert refused(lambda name=name: regions.adopt(RegionStatus(name, "/x", 0, 8), memfd(8)))[0] == 400
    for name in ("a", "b"):
        regions.adopt(RegionStatus(name, "/x", 0, 8), memfd(8))
    assert refused(lambda: regions.adopt(RegionStatus("c", "/x", 0, 8), memfd(8)))[0] == 429
    regions.unregister("a")
    regions.adopt(RegionStatus("c", "/x", 0, 8), memfd(8))


def test_a_region_in_use_is_closed_after_its_last_user(regions: Regions) -> None:
    regions.adopt(RegionStatus("in", "/x", 0, 8), memfd(8))
    region = regions.find("in")
    with region:
        with region:
            regions.unregister("in")
            assert regions.status(None) == []
            assert region.read(0, 8) == bytes(8)
            regions.adopt(RegionStatus("in", "/x", 0, 8), memfd(8))  # its name is free at once
        assert not region.memory.is_closed
        region.unregister()
        assert not region.memory.is_closed
    assert region.memory.is_closed
    with pytest.raises(RequestFailure, match="Unable to find shared memory region: 'in'"), region:
        raise AssertionError("it was closed")
    assert not regions.find("in").memory.is_closed


def test_many_users_and_one_end() -> None:
    """Users in many threads, while the region is unregistered and registered again: each memory is closed,
    and never while it is used."""
    before = len(os.listdir("/proc/self/fd"))
    regions, stop = Regions("copy"), threading.Event()
    faults: list[BaseException] = []
    seen: list[Region] = []

    def use() -> None:
        while not stop.is_set():
            try:
                with regions.find("in") as region:
                    assert not region.memory.is_closed
                    assert region.read(0, 8) == bytes(8)
            except RequestFailure as failure:
                if failure.http != 404:
                    faults.append(failure)
            except BaseException as error:
                faults.append(error)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(300):
        regions.adopt(RegionStatus("in", "/x", 0, 8), memfd(8))
        seen.append(regions.find("in"))
        regions.unregister("in")
    stop.set()
    for thread in threads:
        thread.join(20)
    assert not faults
    assert all(region.memory.is_closed for region in seen)
    assert len(os.listdir("/proc/self/fd")) == before
