"""Memory on a GPU that callers lend: opened once, closed when nobody names it, and no more than there is."""

from __future__ import annotations

import os
from typing import Any

import pytest

from onnx_dl.ort.ortvalues import Parts
from onnx_dl.protocol.lane import Plain
from onnx_dl.system.cuda_types import DevicePointer, DriverError
from onnx_dl.tensors.device_values import DeviceTensor, Handle, UnopenedTensor, handle_from, size_of
from onnx_dl.tensors.foreign_tables import PeerPart
from onnx_dl.workers.device_memory import LaneDevices, OpenAllocations
from onnx_dl.workers.engines.base import DeviceResults

UUID = b"u" * 16
HANDLE = Handle(1, [2, 3], UUID, 7, "ipc", b"h" * 64, 256, 24, 1024)
PARTS = Handle(1, [2, 3], UUID, 0, "parts", b"", 256, 24, 1024)


class Driver:
    """A driver that opens allocations of 1024 bytes at 4096, 8192 and so on."""

    def __init__(self) -> None:
        self.open_now: dict[int, bytes] = {}
        self.opened = 0
        self.waits: list[int] = []
        self.size = 1024
        self.refuses = False

    def device_of(self, uuid: bytes) -> int | None:
        return 3 if uuid == UUID else None

    def open(self, device: int, handle: bytes) -> int:
        if self.refuses:
            raise DriverError(201, "cuIpcOpenMemHandle_v2", "CUDA_ERROR_INVALID_CONTEXT")
        assert handle not in self.open_now.values(), "a driver opens a handle once"
        self.opened += 1
        address = self.opened * 4096
        self.open_now[address] = handle
        return address

    def pointer(self, address: int) -> DevicePointer:
        return DevicePointer(3, 1, address, self.size)

    def close(self, device: int, address: int) -> None:
        del self.open_now[address]

    def synchronize(self, device: int) -> None:
        self.waits.append(device)


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def allocations() -> OpenAllocations:
    return OpenAllocations()


def lane(
    driver: Driver | None, allocations: OpenAllocations, *, keeps_open: bool = False, part: Any = None
) -> LaneDevices:
    return LaneDevices(keeps_open=keeps_open, part=part, allocations=allocations, loaded=lambda: driver)  # type: ignore


def test_two_tensors_of_an_allocation_open_it_once(driver: Driver, allocations: OpenAllocations) -> None:
    one = lane(driver, allocations)
    first, second = one.open([HANDLE]), one.open([HANDLE._replace(offset=512, shape=[6])])
    assert isinstance(first, DeviceTensor) and isinstance(second, DeviceTensor)
    assert first[:5] == (1, (2, 3), "cuda", 3, 4096 + 256)
    assert second[:5] == (1, (6,), "cuda", 3, 4096 + 512)
    assert first.owner is second.owner
    assert driver.opened == 1 and one.is_used
    one.begin()
    one.synchronize()
    assert driver.waits == [3] and len(driver.open_now) == 1


def test_what_a_request_does_not_name_is_closed_before_it(
    driver: Driver, allocations: OpenAllocations
) -> None:
    one = lane(driver, allocations)
    other = HANDLE._replace(handle=b"i" * 64, buffer=8)
    for named in [HANDLE, other], [other], [], [other]:
        for handle in named:
            one.open([handle])
        one.begin()
        assert set(driver.open_now.values()) == {handle.handle for handle in named}
    one.close()
    assert not driver.open_now and not one.is_used and not len(allocations)


def test_an_allocation_that_came_to_the_place_of_another_is_opened_again(
    driver: Driver, allocations: OpenAllocations
) -> None:
    one = lane(driver, allocations)
    one.open([HANDLE])
    one.begin()
    one.begin()
    again = one.open([HANDLE._replace(buffer=8)])
    assert isinstance(again, DeviceTensor) and again.address == 8192 + 256


def test_it_is_opened_after_the_other_one_is_closed(driver: Driver, allocations: OpenAllocations) -> None:
    """The next request names only the new one, and is decoded before what it does not name is closed."""
    one = lane(driver, allocations)
    one.open([HANDLE])
    one.begin()
    again = one.open([HANDLE._replace(buffer=8)])
    assert isinstance(again, DeviceTensor) and again.address == 8192 + 256
    one.begin()
    assert list(driver.open_now) == [8192]


def test_lanes_share_what_is_open(driver: Driver, allocations: OpenAllocations) -> None:
    one, two = lane(driver, allocations), lane(driver, allocations)
    assert one.open([HANDLE]) == two.open([HANDLE])
    one.close()
    assert driver.opened == len(driver.open_now) == 1
    two.close()
    assert not driver.open_now


def test_a_model_with_cuda_graphs_keeps_what_it_had_until_the_end_of_the_lane(
    driver: Driver, allocations: OpenAllocations
) -> None:
    one = lane(driver, allocations, keeps_open=True)
    first = one.open([HANDLE])
    one.begin()
    one.begin()
    assert one.open([HANDLE]) == first and driver.opened == len(driver.open_now) == 1
    one.close()
    assert not driver.open_now
    again = lane(driver, allocations, keeps_open=True).open([HANDLE])
    assert isinstance(first, DeviceTensor) and isinstance(again, DeviceTensor)
    assert [tensor.owner.is_open for tensor in (first, again)] == [False, True]  # type: ignore[attr-defined]


def test_a_model_with_cuda_graphs_does_not_keep_everything(
    driver: Driver, allocations: OpenAllocations
) -> None:
    one = lane(driver, allocations, keeps_open=True)
    for number in range(100):
        one.open([HANDLE._replace(handle=number.to_bytes(64, "little"))])
        one.begin()
        assert len(driver.open_now) <= 65


class Mapped:
    """Parts that a driver has mapped, by address."""

    def __init__(self) -> None:
        self.now: dict[int, list[int]] = {}
        self.opened = 0

    def open(self, device: int, parts: list[tuple[int, int]]) -> int:
        self.opened += 1
        address = self.opened << 20
        self.now[address] = [size for _, size in parts]
        return address

    def close(self, device: int, address: int, sizes: tuple[int, ...]) -> None:
        assert self.now.pop(address) == list(sizes)


def test_parts_are_opened_side_by_side(driver: Driver, allocations: OpenAllocations) -> None:
    mapped = driver.parts = Mapped()  # type: ignore[attr-defined]
    announced = {number: PeerPart(os.open("/dev/null", os.O_RDONLY), 512) for number in (4, 5, 6)}
    one = lane(driver, allocations, part=announced.__getitem__)
    first, again = one.open([PARTS, 4, 5]), one.open([PARTS._replace(offset=0), 4, 5])
    assert isinstance(first, DeviceTensor) and isinstance(again, DeviceTensor)
    assert first.address == again.address + 256 and mapped.now == {again.address: [512, 512]}
    one.begin()
    other = one.open([PARTS, 4, 6])
    assert isinstance(other, DeviceTensor) and other.address != first.address
    one.begin()
    assert list(mapped.now) == [other.address - 256]
    with pytest.raises(ValueError, match="another size"):
        one.open([PARTS, 4])
    two = lane(driver, allocations, part=announced.__getitem__)
    two.open([PARTS, 4, 6])  # of another lane, where the numbers are those of other parts
    assert len(mapped.now) == 2
    one.close()
    two.close()
    assert not mapped.now and not len(allocations)
    with pytest.raises(ValueError, match="no parts"):
        lane(driver, allocations).open([PARTS, 4, 6])


def test_why_a_tensor_is_not_opened(driver: Driver, allocations: OpenAllocations) -> None:
    unopened = lane(None, allocations).open([HANDLE])
    assert isinstance(unopened, UnopenedTensor) and "uses no GPU" in unopened.reason
    one = lane(driver, allocations)
    unopened = one.open([HANDLE._replace(uuid=b"v" * 16)])
    assert isinstance(unopened, UnopenedTensor) and "does not have the GPU" in unopened.reason
    driver.refuses = True
    unopened = one.open([HANDLE])
    assert isinstance(unopened, UnopenedTensor) and "CUDA_ERROR_INVALID_CONTEXT" in unopened.reason
    assert not one.is_used and not len(allocations)


@pytest.mark.parametrize(
    "changed",
    [
        {"shape": [2, 4]},
        {"shape": [-2, -3]},
        {"shape": "23"},
        {"shape": [2.0, 3]},
        {"element_type": 8},
        {"element_type": 99},
        {"kind": "fd"},
        {"kind": "parts"},
        {"offset": -1},
        {"offset": 1001},
        {"nbytes": 48},
        {"nbytes": 0, "shape": [0]},
        {"size": 1 << 70, "offset": 1.5},
        {"handle": "text"},
        {"buffer": None},
    ],
    ids=str,
)
def test_a_handle_that_contradicts_itself(changed: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        handle_from([HANDLE._replace(**changed)])


@pytest.mark.parametrize(
    "items", [[], [None], [HANDLE[:-1]], [HANDLE, HANDLE], [HANDLE, 1], [5], [PARTS], [PARTS, "1"]], ids=str
)
def test_parts_that_are_no_handle(items: list[Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        handle_from(items)


def test_an_allocation_that_is_smaller_than_was_said(driver: Driver, allocations: OpenAllocations) -> None:
    driver.size = 512
    with pytest.raises(ValueError, match="512 bytes was announced with 1024"):
        lane(driver, allocations).open([HANDLE])
    assert not driver.open_now and not len(allocations)


def test_a_result_without_a_handle_travels_as_its_value(driver: Driver, allocations: OpenAllocations) -> None:
    """This process has no CUDA context to export it from."""
    owner = object()
    results = DeviceResults([None, DeviceTensor(1, (6,), "cuda", 0, 4096, owner), 5])
    one = lane(driver, allocations)
    assert one.lend(results) == [None, owner, 5]
    assert not one.is_used


def test_a_handle_travels_as_it_is() -> None:
    assert HANDLE.parts() == Parts("device", [Plain(list(HANDLE))])
    assert handle_from([list(HANDLE)]) == HANDLE


def test_bytes_of_tensors() -> None:
    given = ((1, [2, 3]), (16, []), (9, [5]), (22, [3]), (25, [5]), (11, [0]))
    assert [size_of(*each) for each in given] == [24, 2, 5, 2, 2, 0]
