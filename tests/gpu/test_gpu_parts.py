"""Memory that is mapped by parts, as torch's expandable segments are, and what is assumed of the driver."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence

import numpy as np
import pytest

from onnx_dl import ModelHost
from onnx_dl.system import cuda_driver
from onnx_dl.system.cuda_driver import CudaDriver
from onnx_dl.system.cuda_types import DevicePointer, DriverError
from onnx_dl.tensors.foreign import as_bytes
from tests.support.gpu import CASES, DriverMemory, OrtMemory, equal, feed_of, in_process, proxied
from tests.support.waiting import DEADLINE

PART = 2 << 20
"""Bytes of a part: the smallest that a device maps."""


class _Properties(ctypes.Structure):
    """CUmemAllocationProp: pinned memory of device 0, exported as descriptors."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location_type", ctypes.c_int),
        ("location_id", ctypes.c_int),
        ("security", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
    ]


class Segment(DriverMemory):
    """Addresses for twice as many parts as are mapped at their begin."""

    def __init__(self, parts: int) -> None:
        super().__init__(np.zeros(1, np.float32))  # it has the context
        address = ctypes.c_uint64()
        self._in_context(
            "cuMemAddressReserve", ctypes.byref(address), ctypes.c_size_t(2 * parts * PART), 0, 0, 0
        )
        self.base = address.value
        self._parts = parts
        for index in range(parts):
            self.map(index)

    def map(self, index: int) -> None:
        handle, properties = ctypes.c_uint64(), _Properties(1, 1, 1, 0, None, 0)
        at, size, zero = ctypes.c_uint64(self.base + index * PART), ctypes.c_size_t(PART), ctypes.c_uint64(0)
        self._in_context("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(properties), zero)
        self._in_context("cuMemMap", at, size, ctypes.c_size_t(0), handle, zero)
        device = ctypes.c_int()
        self._in_context("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
        access = (ctypes.c_int * 3)(1, device.value, 3)
        self._in_context("cuMemSetAccess", at, size, access, ctypes.c_size_t(1))
        self._in_context("cuMemRelease", handle)

    def free(self) -> None:
        for index in range(self._parts):
            self.unmap(index)
        size = ctypes.c_size_t(2 * self._parts * PART)
        self._in_context("cuMemAddressFree", ctypes.c_uint64(self.base), size)
        super().free()

    def unmap(self, index: int) -> None:
        self._in_context("cuMemUnmap", ctypes.c_uint64(self.base + index * PART), ctypes.c_size_t(PART))


@pytest.fixture
def driver() -> CudaDriver:
    OrtMemory(np.zeros(1, np.float32))
    found = cuda_driver.loaded()
    assert found is not None
    return found


def test_the_driver_tells_the_parts_of_a_range(driver: CudaDriver) -> None:
    segment = Segment(3)
    parts = [driver.parts.at(0, segment.base + offset) for offset in (0, PART + 5, 3 * PART - 1)]
    bounds = [part and (part.base - segment.base, part.size) for part in parts]
    assert bounds == [(index * PART, PART) for index in range(3)], "cuMemGetAddressRange tells other bounds"
    found = [part for part in parts if part is not None]
    assert len({part.handle for part in found}) == 3
    assert driver.parts.cover(0, segment.base + 100, 2 * PART)
    assert not driver.parts.cover(0, segment.base, 3 * PART + 1)
    segment.unmap(1)
    segment.map(1)
    new = driver.parts.at(0, segment.base + PART)
    assert new is not None and new.handle != found[1].handle, "a handle that is kept came back"
    for part in (*found, new):
        driver.parts.release(part.handle)
    with pytest.raises(DriverError):
        driver.export(DevicePointer(0, 0, segment.base, PART))
    held = DriverMemory(np.zeros(PART, np.uint8))
    assert driver.parts.at(0, held.address) is None, "an ordinary allocation has a handle of a part"
    held.free()
    segment.free()


IMPORT = """
import ctypes, sys
import numpy as np
from onnx_dl.system import cuda_driver
from onnx_dl.tensors.foreign import as_bytes
cuda, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
assert not cuda.cuInit(0) and not cuda.cuDeviceGet(ctypes.byref(device), 0)
assert not cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
driver = cuda_driver.loaded()
fds, size = [int(fd) for fd in sys.argv[2:]], int(sys.argv[1])
for _ in range(2):
    address = driver.parts.open(0, [(fd, size) for fd in fds])
    data = np.empty(len(fds) * size // 4, np.int32)
    driver.copy_to_host(0, as_bytes(data), address)
    assert (data == np.arange(len(data), dtype=np.int32)).all()
    driver.copy_to_device(0, address + size - 64, as_bytes(np.full(32, -1, np.int32)))
    driver.copy_to_device(0, address + size - 64, as_bytes(data[(size - 64) // 4 :][:32].copy()))
    driver.parts.close(0, address, [size] * len(fds))
driver.copy_to_device(0, driver.parts.open(0, [(fd, size) for fd in fds]), as_bytes(np.full(1, 77, np.int32)))
"""


def test_another_process_maps_them_side_by_side(driver: CudaDriver) -> None:
    segment, numbers = Segment(3), np.arange(3 * PART // 4, dtype=np.int32)
    driver.copy_to_device(0, segment.base, as_bytes(numbers))
    fds = []
    for index in range(3):
        part = driver.parts.at(0, segment.base + index * PART)
        assert part is not None
        fds.append(driver.parts.export(part))
        driver.parts.release(part.handle)
    command = [sys.executable, "-c", IMPORT, str(PART), *map(str, fds)]
    done = subprocess.run(
        command, pass_fds=fds, capture_output=True, text=True, timeout=2 * DEADLINE, check=False
    )
    assert done.returncode == 0, done.stderr
    for fd in fds:
        os.close(fd)
    first = np.empty(1, np.int32)
    driver.copy_to_host(0, as_bytes(first), segment.base)
    assert first[0] == 77, "both processes have one memory"
    segment.free()


def test_a_binding_of_tensors_in_several_parts(driver: CudaDriver, host: ModelHost) -> None:
    case = CASES["5mb"]
    own, x = in_process(case.model), case.feed["x"]
    (expected,) = own.run(None, case.feed)
    segment = Segment(8)
    source, target = segment.base + 4096, segment.base + 4 * PART - 512
    proxy = proxied(case.model, host)
    binding = proxy.io_binding()
    binding.bind_input("x", "cuda", 0, np.float32, list(x.shape), source)
    binding.bind_output("y", "cuda", 0, np.float32, list(expected.shape), target)
    found = np.empty_like(expected)

    def check(turns: Sequence[int]) -> None:
        for turn in turns:
            driver.copy_to_device(0, source, as_bytes(feed_of(case, turn)["x"]))
            proxy.run_with_iobinding(binding)
            driver.copy_to_host(0, as_bytes(found), target)
            equal([found], own.run(None, feed_of(case, turn)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is copied through main memory
        check([0, 1, 2])
        for index in (1, 5):  # other memory at the same addresses
            segment.unmap(index)
            segment.map(index)
            check([3, 4])
    segment.free()  # while the worker has it open: such memory lives on


def test_bindings_of_a_model_with_cuda_graphs(host: ModelHost) -> None:
    """Each gets its own results, by turns, also beside calls by value, which have no graph."""
    case = CASES["conv"]
    own = in_process(case.model)
    (first,) = own.run(None, case.feed)
    proxy = proxied(case.model, host, enable_cuda_graph="1")
    held = [(OrtMemory(case.feed["x"]), OrtMemory(np.zeros_like(first))) for _ in range(3)]
    bindings = []
    for x, y in held:
        bindings.append(binding := proxy.io_binding())
        binding.bind_ortvalue_input("x", x.value)
        binding.bind_ortvalue_output("y", y.value)
    for turn in range(4):
        for index, ((x, y), binding) in enumerate(zip(held, bindings, strict=True)):
            feed = feed_of(case, 3 * turn + index)
            x.set(feed["x"])
            proxy.run_with_iobinding(binding)
            (expected,) = own.run(None, feed)
            np.testing.assert_allclose(y.numpy(), expected, rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(proxy.run(None, feed)[0], expected, rtol=1e-3, atol=1e-4)
