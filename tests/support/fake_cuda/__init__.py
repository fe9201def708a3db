"""A stand-in for CUDA's driver, in C: ``fake_cuda.c`` tells what it checks and what makes it refuse.

A process that has loaded it once keeps it, so tests use it in processes of their own.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from ctypes import byref, c_int, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import NamedTuple

NAME = "libcuda.so.1"


def build(folder: Path) -> Path:
    """Compiles the stand-in into a folder, once; returns its path.  Skips the test without a C compiler."""
    import pytest  # not in the processes that use the stand-in

    if (path := folder / NAME).exists():
        return path
    if (cc := shutil.which("cc")) is None:
        pytest.skip("there is no C compiler (cc) to make a stand-in for libcuda with")
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-pthread"]
    source = Path(__file__).with_name("fake_cuda.c")
    subprocess.run([cc, *flags, f"-Wl,-soname,{NAME}", "-o", path, source], check=True)
    return path


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """Returns this process's environment with the folder of the stand-in first among those of libraries, and
    with variables of the stand-in: ``IPC="refuse"`` is ``FAKE_CUDA_IPC=refuse``."""
    folders = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    ours = {f"FAKE_CUDA_{name}": value for name, value in variables.items()}
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(folders), **ours}


class Call(NamedTuple):
    """A line of FAKE_CUDA_LOG."""

    process: int
    function: str
    result: int
    address: int
    size: int


def calls(log: Path) -> list[Call]:
    """Reads what processes have called so far."""
    lines = log.read_text().splitlines() if log.exists() else []
    words = [line.split() for line in lines]
    return [Call(int(pid), name, int(code), int(at), int(size)) for pid, name, code, at, size in words]


class FakeCuda:
    """The stand-in in this process, as an application has CUDA: it allocates memory of a device.

    ``FakeCuda(path, is_started=False)`` only loads it.
    """

    def __init__(self, library: Path | str = NAME, *, is_started: bool = True, device: int = 0) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.fake_view.restype = c_uint64
        self.library.fake_view.argtypes = [c_uint64, c_uint64]
        self._contexts: dict[int, c_void_p] = {}
        if is_started:
            self.start(device)

    def start(self, device: int = 0) -> None:
        """Starts the driver, and gives the device its primary context."""
        self.check(self.library.cuInit(0))
        self.activate(device)

    def activate(self, device: int) -> None:
        """Gives a device its primary context, once."""
        if device not in self._contexts:
            context = c_void_p()
            self.check(self.library.cuDevicePrimaryCtxRetain(byref(context), self.handle(device)))
            self._contexts[device] = context

    def reset(self, device: int = 0) -> None:
        """Ends the primary context, as cudaDeviceReset() does."""
        self.check(self.library.cuDevicePrimaryCtxReset_v2(self.handle(device)))
        del self._contexts[device]

    def handle(self, device: int) -> int:
        handle = c_int()
        self.check(self.library.cuDeviceGet(byref(handle), device))
        return handle.value

    def allocate(self, nbytes: int, device: int = 0, *, is_managed: bool = False) -> int:
        """Allocates memory of a device; returns its address, which the host may not touch."""
        address = c_uint64()
        self.activate(device)
        self._push(device)
        if is_managed:
            code = self.library.cuMemAllocManaged(byref(address), c_size_t(nbytes), 1)
        else:
            code = self.library.cuMemAlloc_v2(byref(address), c_size_t(nbytes))
        self._pop()
        self.check(code)
        return address.value

    def free(self, address: int, device: int = 0) -> None:
        self._push(device)
        code = self.library.cuMemFree_v2(c_uint64(address))
        self._pop()
        self.check(code)

    def reserve(self, nbytes: int) -> int:
        """Reserves addresses, as torch does for an expandable segment."""
        address = c_uint64()
        self.check(self.library.cuMemAddressReserve(byref(address), c_size_t(nbytes), 0, 0, 0))
        return address.value

    def map_part(self, address: int, nbytes: int, device: int = 0) -> None:
        """Maps new memory at reserved addresses; gives its handle back, so that unmapping frees it."""
        part, properties = c_uint64(), ctypes.create_string_buffer(64)
        self.activate(device)
        self._push(device)
        code = self.library.cuMemCreate(byref(part), c_size_t(nbytes), properties, c_uint64(0))
        self._pop()
        self.check(code)
        at, size = c_uint64(address), c_size_t(nbytes)
        self.check(self.library.cuMemMap(at, size, c_size_t(0), part, c_uint64(0)))
        access = (c_int * 3)(1, self.handle(device), 3)
        self.check(self.library.cuMemSetAccess(at, size, access, c_size_t(1)))
        self.check(self.library.cuMemRelease(part))

    def unmap_part(self, address: int, nbytes: int) -> None:
        self.check(self.library.cuMemUnmap(c_uint64(address), c_size_t(nbytes)))

    def view(self, address: int, nbytes: int) -> memoryview:
        """The bytes behind a device's address, to be read and written."""
        at = self.library.fake_view(address, nbytes)
        assert at, f"no memory of a device has {nbytes} bytes at {address:#x}"
        return memoryview((ctypes.c_ubyte * nbytes).from_address(at)).cast("B")

    def write(self, address: int, data: bytes) -> None:
        self.view(address, len(data))[:] = data

    def read(self, address: int, nbytes: int) -> bytes:
        return bytes(self.view(address, nbytes))

    @property
    def allocations(self) -> int:
        """Allocations of this process that were not freed."""
        return int(self.library.fake_allocations())

    @property
    def open_handles(self) -> int:
        """Allocations of other processes that this one has open."""
        return int(self.library.fake_open_handles())

    @property
    def registered(self) -> int:
        """Ranges of the host's memory that are pinned."""
        return int(self.library.fake_registered())

    @property
    def misuses(self) -> int:
        """Calls of this process with wrong arguments, or whose effect a GPU leaves undefined."""
        return int(self.library.fake_misuses())

    @property
    def depth(self) -> int:
        """Contexts on this thread's stack."""
        return int(self.library.fake_depth())

    @property
    def parts(self) -> int:
        """Allocations that are mapped by parts, or whose handles were not given back."""
        return int(self.library.fake_parts())

    def retained(self, device: int = 0) -> int:
        """How many hold the device's primary context."""
        return int(self.library.fake_retained(device))

    def check(self, code: int) -> None:
        assert code == 0, f"the stand-in for CUDA's driver returned {code}"

    def _push(self, device: int) -> None:
        self.check(self.library.cuCtxPushCurrent_v2(self._contexts[device]))

    def _pop(self) -> None:
        self.check(self.library.cuCtxPopCurrent_v2(None))
