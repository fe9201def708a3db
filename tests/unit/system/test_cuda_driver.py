"""CUDA's driver by ctypes, against the stand-in, in processes of their own: a library stays loaded."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from onnx_dl.system import cuda_driver
from onnx_dl.system.cuda_driver import CudaDriver, loaded
from onnx_dl.system.cuda_types import DevicePointer, DriverError
from tests.support import fake_cuda
from tests.support.fake_cuda import FakeCuda
from tests.support.waiting import DEADLINE

WORDS = bytes(range(200))
HANDLE_OF_NOBODY = bytes(64)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_cuda.build(tmp_path_factory.mktemp("cuda"))


Try = Callable[..., str]


def run_apart(function: Callable[..., None], *arguments: object, **how: object) -> str:
    """Calls a function of this file in another process; returns what it prints."""
    code = f"from {__name__} import {function.__name__} as f; f(*{arguments!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE, check=False, **how
    )  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


@pytest.fixture
def apart(library: Path) -> Try:
    """``apart(function, *arguments, IPC="refuse")``: calls a function of this file in a process that can find
    the stand-in."""

    def run(function: Callable[..., None], *arguments: object, **variables: str) -> str:
        return run_apart(function, *arguments, env=fake_cuda.environment(library.parent, **variables))

    return run


def started() -> tuple[FakeCuda, CudaDriver]:
    cuda = FakeCuda()
    driver = loaded()
    assert driver is not None
    return cuda, driver


# --- who uses it -------------------------------------------------------------------------------------------


def test_only_the_driver_and_its_table_name_functions() -> None:
    from tests.unit.test_layers import TREES  # not in the processes that the tests below start

    def names(tree: ast.AST) -> set[str]:
        texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        return {text for text in texts if isinstance(text, str) and text[:2] == "cu" and text[2:3].isupper()}

    assert {name for name, tree in TREES.items() if names(tree)} == {
        "system.cuda_calls",
        "system.cuda_driver",
        "system.cuda_parts",
    }


def no_driver() -> None:
    assert loaded() is None
    maps = Path("/proc/self/maps").read_text()
    assert "libcuda" not in maps
    FakeCuda(is_started=False)
    assert "libcuda" in Path("/proc/self/maps").read_text()


def test_it_loads_nothing(apart: Try) -> None:
    """Also where the library could be found."""
    apart(no_driver)


def not_started() -> None:
    assert loaded() is None
    cuda = FakeCuda(is_started=False)
    assert loaded() is None
    cuda.check(cuda.library.cuInit(0))
    assert loaded() is None, "the driver is started, but no device has a context"
    cuda.activate(0)
    assert loaded() is not None
    assert loaded() is loaded()
    assert cuda.retained() == 1


def test_it_starts_nothing(apart: Try) -> None:
    apart(not_started)


def forked() -> None:
    _cuda, _driver = started()
    if (child := os.fork()) == 0:
        cuda_driver.linux_only.library_if_loaded = None  # type: ignore[assignment]  # it is not even asked
        try:
            os._exit(0 if loaded() is None else 1)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert loaded() is not None


def test_a_forked_child_does_not_use_it(apart: Try) -> None:
    apart(forked)


def no_devices() -> None:
    cuda = FakeCuda(is_started=False)
    cuda.check(cuda.library.cuInit(0))
    assert loaded() is None


def test_without_devices(apart: Try) -> None:
    apart(no_devices, DEVICES="0")


def test_an_old_driver_lacks_functions() -> None:
    class Old:
        def __getattr__(self, name: str) -> object:
            if name != "cuGetErrorName":
                raise AttributeError(name)
            return lambda code, name: 0

    with pytest.raises(DriverError, match=r"cuDeviceGetCount failed: unknown \(500\)"):
        CudaDriver(Old()).device_of(bytes(16))  # type: ignore[arg-type]


# --- addresses and devices ---------------------------------------------------------------------------------


def addresses() -> None:
    cuda, driver = started()
    address = cuda.allocate(1000)
    pointer = driver.pointer(address + 999)
    assert pointer is not None and pointer[0] == 0 and pointer[2:] == (address, 1000)
    assert driver.pointer(address) == pointer
    host = memoryview(bytearray(64))
    at = cuda_driver._address(host)
    assert driver.pointer(at) is None
    driver.register_host(0, at, 64)
    assert driver.pointer(at) is None, "pinned memory is the host's"
    driver.unregister_host(0, at)
    assert driver.pointer(cuda.allocate(64, is_managed=True)) is None
    assert driver.pointer(0) is None
    cuda.free(address)
    assert driver.pointer(address) is None
    again = driver.pointer(cuda.allocate(1000))
    assert again is not None and again.buffer != pointer.buffer
    assert (cuda.misuses, cuda.depth) == (0, 0)


def test_addresses_of_devices_and_of_the_host(apart: Try) -> None:
    apart(addresses)


def two_devices() -> None:
    cuda, driver = started()
    assert cuda.retained(1) == 0
    uuids = [driver.uuid(device) for device in (0, 1)]
    assert len(set(uuids)) == 2 and {len(each) for each in uuids} == {16}
    assert [driver.device_of(uuid) for uuid in uuids] == [0, 1]
    assert driver.device_of(bytes(16)) is None
    with pytest.raises(DriverError, match="CUDA_ERROR_INVALID_CONTEXT"):
        driver.synchronize(1)
    assert cuda.retained(1) == 0, "a device that nobody uses gets no context"
    address = cuda.allocate(300, device=1)
    pointer = driver.pointer(address + 8)
    assert pointer is not None and (pointer.device, pointer.base, pointer.size) == (1, address, 300)
    driver.copy_to_device(1, address, memoryview(WORDS))
    assert cuda.read(address, 200) == WORDS
    driver.synchronize(1)
    assert cuda.misuses == 0


def test_two_devices(apart: Try) -> None:
    apart(two_devices, DEVICES="2")


def settled() -> None:
    cuda, driver = started()
    known = []
    for device in (0, 1):
        address = cuda.allocate(100, device)
        pointer = driver.pointer(address + 50)
        assert pointer is not None
        known.append((address + 50, pointer.buffer))
    assert driver.is_settled(0, known[:1]) and driver.is_settled(1, known[1:])
    assert driver.is_settled(0, []), "there is nothing that could have changed"
    assert not driver.is_settled(1, [known[1], (known[1][0], known[0][1])])
    host = cuda_driver._address(memoryview(bytearray(64)))
    assert not driver.is_settled(0, [(host, 0)])
    cuda.free(known[0][0] - 50)
    assert not driver.is_settled(0, known[:1])
    assert cuda.allocate(100) == known[0][0] - 50, "the test needs another allocation at the same address"
    assert not driver.is_settled(0, known[:1])
    assert driver.is_settled(1, known[1:])
    cuda.reset(1)
    assert not driver.is_settled(1, known[1:])
    assert not driver.is_settled(5, [])
    assert (cuda.misuses, cuda.depth) == (0, 0)


def test_allocations_that_are_still_there(apart: Try, tmp_path: Path) -> None:
    apart(settled, DEVICES="2", LOG=str(tmp_path / "log"))
    calls = fake_cuda.calls(tmp_path / "log")
    waits = [call for call in calls if call.function == "cuCtxSynchronize"]
    assert [call.address for call in waits] == [0, 1, 0, 1, 0, 0, 0, 1]


def pointer_after_reset() -> None:
    cuda, driver = started()
    cuda.activate(1)
    address = cuda.allocate(100, 1)
    assert driver.pointer(cuda.allocate(100)) is not None
    cuda.reset(0)
    found = driver.pointer(address)
    assert found is not None and found.device == 1
    cuda.reset(1)
    assert driver.pointer(address) is None
    assert (cuda.misuses, cuda.depth) == (0, 0)


def test_an_address_is_found_with_a_device_that_is_left(apart: Try) -> None:
    apart(pointer_after_reset, DEVICES="2")


def first_of_another() -> None:
    print(started()[1].uuid(0).hex())


def test_a_device_has_one_uuid_in_all_processes(apart: Try, monkeypatch: pytest.MonkeyPatch) -> None:
    first = apart(first_of_another, DEVICES="2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    second = apart(first_of_another, DEVICES="2")
    assert first != second
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert apart(first_of_another, DEVICES="2") == first


def reset() -> None:
    cuda, driver = started()
    driver.synchronize(0)
    cuda.reset()
    with pytest.raises(DriverError):
        driver.synchronize(0)
    cuda.activate(0)
    driver.synchronize(0)
    assert cuda.depth == 0


def test_a_device_that_the_application_resets(apart: Try) -> None:
    apart(reset)


def contexts() -> None:
    cuda, driver = started()
    address = cuda.allocate(len(WORDS))
    barrier = threading.Barrier(4)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            barrier.wait(DEADLINE)
            for _ in range(50):
                target = memoryview(bytearray(len(WORDS)))
                driver.copy_to_device(0, address, memoryview(WORDS))
                driver.copy_to_host(0, target, address)
                assert (bytes(target), cuda.depth) == (WORDS, 0)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(DEADLINE)
    assert (failed, cuda.misuses) == ([], 0)
    assert cuda.retained() == 2, "the context is retained once"


def test_threads_have_the_context_for_a_call_only(apart: Try) -> None:
    apart(contexts)


# --- copies ------------------------------------------------------------------------------------------------


def copies() -> None:
    cuda, driver = started()
    source, target = cuda.allocate(1000), cuda.allocate(500)
    driver.copy_to_device(0, source + 100, memoryview(WORDS))
    driver.copy_on_device(0, target, source + 100, 200)
    found = bytearray(200)
    driver.copy_to_host(0, memoryview(found), target)
    assert found == WORDS
    for nothing in (memoryview(b""), memoryview(bytearray())):
        driver.copy_to_device(0, source, nothing)
        driver.copy_to_host(0, nothing, source)
    driver.copy_on_device(0, target, source, 0)
    assert cuda.misuses == 0
    for attempt in (
        lambda: driver.copy_on_device(0, target, source, 501),
        lambda: driver.copy_to_device(0, target + 400, memoryview(WORDS)),
        lambda: driver.copy_to_host(0, memoryview(bytearray(200)), target + 301),
        lambda: driver.copy_to_host(0, memoryview(bytearray(8)), 4096),
    ):
        with pytest.raises(DriverError, match=r"cuMemcpy.* failed: CUDA_ERROR_INVALID_VALUE \(1\)") as caught:
            attempt()
        assert (caught.value.code, caught.value.function[:8]) == (1, "cuMemcpy")
    assert cuda.depth == 0


def test_copies(apart: Try) -> None:
    apart(copies)


def touched() -> None:
    cuda, _driver = started()
    address = cuda.allocate(64)
    if (child := os.fork()) == 0:
        import ctypes

        ctypes.string_at(address, 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) < 0


def test_a_host_that_touches_device_memory_ends(apart: Try) -> None:
    """As on a GPU: else the stand-in would hide it."""
    apart(touched)


# --- other processes ---------------------------------------------------------------------------------------


def owner() -> None:
    cuda, driver = started()
    address = cuda.allocate(5000)
    cuda.write(address, WORDS)
    pointer = driver.pointer(address + 700)
    assert pointer is not None
    exported = driver.export(pointer)
    assert len(exported) == 64
    run_apart(importer, exported, 5000, env=os.environ)
    assert cuda.read(address + 200, 200) == WORDS
    assert cuda.misuses == 0
    with pytest.raises(DriverError) as caught:
        driver.open(0, exported)  # a process cannot open what is its own
    assert caught.value.function == "cuIpcOpenMemHandle_v2"
    cuda.free(address)


def importer(handle: bytes, size: int) -> None:
    cuda, driver = started()
    base = driver.open(0, handle)
    assert cuda.open_handles == 1
    assert driver.pointer(base + 1) == DevicePointer(0, 1, base, size)
    driver.copy_on_device(0, base + 200, base, 200)
    assert cuda.misuses == 0
    with pytest.raises(DriverError) as caught:
        driver.open(0, handle)
    assert caught.value.code == 208, "the stand-in opens an allocation once, so that openers must count"
    with pytest.raises(DriverError):
        driver.close(0, base + 1)
    driver.close(0, base)
    assert (cuda.open_handles, cuda.depth) == (0, 0)
    with pytest.raises(DriverError):
        driver.close(0, base)
    again = driver.open(0, handle)
    driver.close(0, again)


def test_an_allocation_in_another_process(apart: Try) -> None:
    apart(owner)


def segment(cuda: FakeCuda, *sizes: int) -> int:
    """Memory that is mapped by parts; there are as many addresses again behind it."""
    address = place = cuda.reserve(2 * sum(sizes))
    for size in sizes:
        cuda.map_part(place, size)
        place += size
    return address


def owner_of_parts() -> None:
    cuda, driver = started()
    address = segment(cuda, 4096, 8192, 4096)
    cuda.write(address + 4000, WORDS)
    parts = [driver.parts.at(0, address + offset) for offset in (0, 5000, 12288)]
    assert [part and (part.base - address, part.size) for part in parts] == [
        (0, 4096),
        (4096, 8192),
        (12288, 4096),
    ]
    found = [part for part in parts if part is not None]
    assert len({part.handle for part in found}) == 3
    again = driver.parts.at(0, address)
    assert again == found[0], "the handle at an address is the one that was mapped there"
    driver.parts.release(again.handle)
    with pytest.raises(DriverError):
        driver.export(DevicePointer(0, 0, address, 4096))
    fds = [driver.parts.export(part) for part in found]
    for part, fd in zip(found, fds, strict=True):
        driver.parts.release(part.handle)
        assert not os.get_inheritable(fd)
        os.set_inheritable(fd, True)
    given = [(fd, part.size) for fd, part in zip(fds, found, strict=True)]
    run_apart(importer_of_parts, given, env=os.environ, close_fds=False)
    assert cuda.read(address + 4200, 200) == WORDS
    assert (cuda.parts, cuda.depth, cuda.misuses) == (3, 0, 0)


def importer_of_parts(parts: list[tuple[int, int]]) -> None:
    cuda, driver = started()
    base = driver.parts.open(0, parts)
    pointer = driver.pointer(base + 5000)
    assert pointer is not None and pointer.device == 0
    driver.copy_on_device(0, base + 4200, base + 4000, 200)  # from two parts
    assert cuda.misuses == 0
    driver.parts.close(0, base, [size for _, size in parts])
    assert (cuda.open_handles, cuda.parts, cuda.depth) == (0, 0, 0)
    wrong = [(fd, size + 4096 * (index == 1)) for index, (fd, size) in enumerate(parts)]
    for given in (wrong, [*parts, (os.open("/dev/null", os.O_RDWR), 4096)]):
        with pytest.raises(DriverError):
            driver.parts.open(0, given)
    assert (cuda.open_handles, cuda.parts, cuda.depth) == (0, 0, 0), "what was done is undone"


def test_parts_of_a_range_in_another_process(apart: Try) -> None:
    apart(owner_of_parts)


def other_parts() -> None:
    cuda, driver = started()
    address = segment(cuda, 4096, 4096)
    assert driver.parts.cover(0, address + 100, 8000) and not driver.parts.cover(0, address + 100, 8192)
    assert driver.parts.at(0, address + 8192) is None, "nothing is mapped there"
    assert driver.parts.at(0, cuda.allocate(4096)) is None, "it is not mapped by parts"
    old = driver.parts.at(0, address)
    assert old is not None
    cuda.unmap_part(address, 4096)
    cuda.map_part(address, 4096)
    new = driver.parts.at(0, address)
    assert new is not None and new.handle != old.handle, "the old handle is kept, so no other has it"
    for part in (old, new):
        driver.parts.release(part.handle)
    assert (cuda.parts, cuda.depth, cuda.misuses) == (2, 0, 0)


def test_a_part_that_was_mapped_in_place_of_another(apart: Try) -> None:
    apart(other_parts)


def untold_parts() -> None:
    cuda, driver = started()
    address = segment(cuda, 4096, 4096)
    assert driver.parts.at(0, address) is None
    assert (cuda.parts, cuda.depth, cuda.misuses) == (2, 0, 0)


def test_a_driver_that_tells_no_parts_but_the_range(apart: Try) -> None:
    apart(untold_parts, IPC="reserved")


def refused() -> None:
    cuda, driver = started()
    pointer = driver.pointer(cuda.allocate(64))
    assert pointer is not None
    with pytest.raises(DriverError) as caught:
        driver.export(pointer)
    assert caught.value.function == "cuIpcGetMemHandle"
    assert (cuda.misuses, cuda.depth, cuda.parts) == (0, 0, 0)


def test_memory_that_cannot_be_exported(apart: Try) -> None:
    apart(refused, IPC="refuse")


def not_opened() -> None:
    cuda, driver = started()
    with pytest.raises(DriverError, match="CUDA_ERROR_MAP_FAILED"):
        driver.open(0, HANDLE_OF_NOBODY)
    assert (cuda.open_handles, cuda.depth) == (0, 0)


def test_a_handle_that_cannot_be_opened(apart: Try) -> None:
    apart(not_opened, IPC="refuse-open")


# --- memory of the host ------------------------------------------------------------------------------------


def pins() -> None:
    cuda, driver = started()
    memory = bytearray(1 << 20)
    at = cuda_driver._address(memoryview(memory))
    driver.register_host(0, at, len(memory))
    assert cuda.registered == 1
    with pytest.raises(DriverError, match=r"cuMemHostRegister_v2 failed: .*ALREADY_REGISTERED \(712\)"):
        driver.register_host(0, at + 4096, 100)
    driver.unregister_host(0, at)
    with pytest.raises(DriverError, match=r"NOT_REGISTERED \(713\)"):
        driver.unregister_host(0, at)
    assert (cuda.registered, cuda.depth) == (0, 0)


def test_pinned_memory(apart: Try) -> None:
    apart(pins)


def no_pins() -> None:
    cuda, driver = started()
    with pytest.raises(DriverError, match="CUDA_ERROR_NOT_PERMITTED"):
        driver.register_host(0, cuda_driver._address(memoryview(bytearray(100))), 100)
    assert (cuda.registered, cuda.misuses) == (0, 0)


def test_memory_that_cannot_be_pinned(apart: Try) -> None:
    apart(no_pins, REGISTER="refuse")


def logged() -> None:
    cuda, driver = started()
    driver.synchronize(0)
    print(os.getpid(), cuda.allocate(64))


def test_the_stand_in_tells_what_was_called(apart: Try, tmp_path: Path) -> None:
    pid, address = map(int, apart(logged, LOG=str(tmp_path / "log")).split())
    found = fake_cuda.calls(tmp_path / "log")
    assert [each.function for each in found if each.function != "cuDevicePrimaryCtxRetain"] == [
        "cuInit",
        "cuCtxSynchronize",
        "cuMemAlloc_v2",
    ]
    assert found[-1] == (pid, "cuMemAlloc_v2", 0, address, 64)
