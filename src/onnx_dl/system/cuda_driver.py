"""CUDA's driver in this process, by ctypes: no other module names its functions, but for their types
(:mod:`onnx_dl.system.cuda_calls`).

It is asked only where somebody else has loaded and started it: a process in which nobody uses CUDA never gets
a context from here, and its forked children can use CUDA.  Each call makes the primary context of its device
current in the calling thread, and the previous one again.  Devices have their ordinals in this process.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
from collections.abc import Iterable
from ctypes import byref, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Final

from onnx_dl import linux_only
from onnx_dl.concurrency.forking import Guard, importing
from onnx_dl.system.cuda_calls import Calls
from onnx_dl.system.cuda_parts import MappedParts
from onnx_dl.system.cuda_types import DevicePointer, DriverError, IpcHandle, Uuid

_LIBRARY: Final = "libcuda.so.1"
_INVALID_VALUE, _INVALID_CONTEXT, _DESTROYED = 1, 201, 709
"""CUDA_ERROR_INVALID_VALUE, _INVALID_CONTEXT, _CONTEXT_IS_DESTROYED."""
_ATTRIBUTES: Final = (c_int * 4)(2, 8, 9, 7)
"""CU_POINTER_ATTRIBUTE_MEMORY_TYPE, _IS_MANAGED, _DEVICE_ORDINAL, _BUFFER_ID."""
_BUFFER_ID: Final = 7
"""CU_POINTER_ATTRIBUTE_BUFFER_ID."""
_ON_DEVICE: Final = 2
"""CU_MEMORYTYPE_DEVICE."""
_ENABLES_PEERS: Final = 1
"""CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, the only flag with which a handle may be opened."""
_PORTABLE: Final = 1
"""CU_MEMHOSTREGISTER_PORTABLE: pinned for all contexts."""


class _Contexts:
    """Devices of this process and their primary contexts: shared where others have made them, never made."""

    def __init__(self, call: Calls) -> None:
        self._call = call
        self._push = call.plain("cuCtxPushCurrent_v2")
        self._pop = call.plain("cuCtxPopCurrent_v2")
        self._popped = byref(c_void_p())
        """Memory for what nobody reads, of all threads."""
        self._guard = Guard()
        self._retained: dict[int, int] = {}
        """Contexts by device, each retained once and until the process ends."""
        self._handles: dict[int, int] = {}

    def count(self) -> int:
        count = c_int()
        self._call("cuDeviceGetCount", byref(count))
        return count.value

    def handle(self, device: int) -> int:
        """The CUdevice of an ordinal."""
        if (known := self._handles.get(device)) is not None:
            return known
        handle = c_int()
        self._call("cuDeviceGet", byref(handle), device)
        return self._handles.setdefault(device, handle.value)

    def any_active(self) -> int | None:
        """A device with an active primary context; None: there is none, also because nobody has started the
        driver, or only the process that forked this one."""
        with contextlib.suppress(DriverError):
            for device in list(self._retained):  # that is quicker than to count
                if self._is_active(device):
                    return device
            return next((device for device in range(self.count()) if self._is_active(device)), None)
        return None

    @property
    def last(self) -> int | None:
        """A device that this process has used; None: none yet, or the last one was reset."""
        return next(iter(list(self._retained)), None)

    def current(self, device: int) -> _CurrentContext:
        """The device's primary context is this thread's, for the block."""
        return _CurrentContext(self, device)

    def push(self, device: int) -> None:
        """Makes the device's primary context this thread's, until :meth:`pop`."""
        if (context := self._retained.get(device)) is None:
            context = self._context(device)
        if code := self._push(context):
            if code not in (_INVALID_CONTEXT, _DESTROYED):
                raise self._call.error(code, "cuCtxPushCurrent_v2")
            self._retained.pop(device, None)  # the application has reset the device
            self._call("cuCtxPushCurrent_v2", self._context(device))

    def pop(self) -> None:
        """Makes the context before :meth:`push` this thread's again."""
        if code := self._pop(self._popped):
            raise self._call.error(code, "cuCtxPopCurrent_v2")

    def _context(self, device: int) -> int:
        if (found := self._retained.get(device)) is not None:
            return found
        with self._guard:
            if device not in self._retained:
                if not self._is_active(device):
                    raise self._call.error(_INVALID_CONTEXT, "cuDevicePrimaryCtxGetState")
                context = c_void_p()
                self._call("cuDevicePrimaryCtxRetain", byref(context), self.handle(device))
                self._retained[device] = context.value or 0
            return self._retained[device]

    def _is_active(self, device: int) -> bool:
        flags, active = c_uint(), c_int()
        self._call("cuDevicePrimaryCtxGetState", self.handle(device), byref(flags), byref(active))
        return bool(active.value)


class _CurrentContext:
    """Context manager that a generator would make twice as slow."""

    __slots__ = ("_contexts", "_device")

    def __init__(self, contexts: _Contexts, device: int) -> None:
        self._contexts = contexts
        self._device = device

    def __enter__(self) -> None:
        self._contexts.push(self._device)

    def __exit__(self, *_: object) -> None:
        self._contexts.pop()


class _Answer:
    """Memory for the driver's answers to one question: a thread may interrupt itself and ask, too."""

    __slots__ = ("buffer", "targets", "values")

    def __init__(self) -> None:
        self.values = (c_uint64 * 4)()
        """Answers: 1, 4 or 8 bytes of each are written, always as many of the same one; the others stay 0."""
        self.buffer = byref(self.values, 24)
        start = ctypes.addressof(self.values)
        self.targets = (c_void_p * 4)(start, start + 8, start + 16, start + 24)


def _taken(spare: collections.deque[_Answer]) -> _Answer:
    """One that nobody uses, which whoever takes it gives back."""
    try:
        return spare.pop()
    except IndexError:
        return _Answer()


class CudaDriver:
    """The driver that this process uses.  From any thread.  All methods raise DriverError."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._call = Calls(library)
        self._contexts = _Contexts(self._call)
        self._current = self._contexts.current
        self.parts = MappedParts(self._call, self._current, self._contexts.handle)
        """Memory that is mapped by parts."""
        self._wait = self._call.plain("cuCtxSynchronize")
        self._ask = self._call.plain("cuPointerGetAttribute")
        self._ask_all = self._call.plain("cuPointerGetAttributes")
        self._answers: collections.deque[_Answer] = collections.deque()
        """Spare ones."""
        self._uuids: dict[int, bytes] = {}

    def is_in_use(self) -> bool:
        """True if this process has a primary context on a device."""
        return self._contexts.any_active() is not None

    # --- devices and addresses --------------------------------------------------------------------------

    def pointer(self, address: int) -> DevicePointer | None:
        """Describes an address on a device; None: it is the host's, or unknown to the driver.

        Managed memory counts as the host's, which may touch it.
        """
        if (used := self._contexts.last) is not None:
            try:
                return self._described(used, address)
            except DriverError:  # the application may have reset it
                pass
        asked = self._contexts.any_active()
        return None if asked is None else self._described(asked, address)

    def _described(self, asked: int, address: int) -> DevicePointer | None:
        with self._current(asked):
            kind, is_managed, device, buffer = self._attributes(address)
            if kind != _ON_DEVICE or is_managed:
                return None
            if device == asked:
                return DevicePointer(device, buffer, *self._range(address))
        try:
            with self._current(device):
                return DevicePointer(device, buffer, *self._range(address))
        except DriverError:  # it belongs to a context that is no primary one
            return DevicePointer(device, buffer, address, 0)

    def _attributes(self, address: int) -> tuple[int, int, int, int]:
        """Values of the attributes; zeros: the driver does not know the address."""
        answer = _taken(self._answers)
        try:
            code = self._ask_all(4, _ATTRIBUTES, answer.targets, address)
            kind, is_managed, device, buffer = answer.values
        finally:
            self._answers.append(answer)
        if not code:
            return kind, is_managed, device, buffer
        if code not in (_INVALID_VALUE, _INVALID_CONTEXT):
            raise self._call.error(code, "cuPointerGetAttributes")
        return 0, 0, 0, 0

    def _range(self, address: int) -> tuple[int, int]:
        """Base and size of an allocation."""
        base, size = c_uint64(), c_size_t()
        try:
            self._call("cuMemGetAddressRange_v2", byref(base), byref(size), address)
        except DriverError:
            return address, 0
        return base.value, size.value

    def uuid(self, device: int) -> bytes:
        """Returns the 16 bytes that name a device, or a MIG instance, in all processes."""
        if (known := self._uuids.get(device)) is not None:
            return known
        self._call("cuDeviceGetUuid_v2", byref(found := Uuid()), self._contexts.handle(device))
        return self._uuids.setdefault(device, bytes(found.data))

    def device_of(self, uuid: bytes) -> int | None:
        """Returns the device with this UUID; None: this process does not see it."""
        return next((each for each in range(self._contexts.count()) if self.uuid(each) == uuid), None)

    def synchronize(self, device: int) -> None:
        """Waits until all work that this process has given to the device is done."""
        contexts = self._contexts
        contexts.push(device)
        try:
            code = self._wait()
        finally:
            contexts.pop()
        if code:
            raise self._call.error(code, "cuCtxSynchronize")

    def is_settled(self, device: int, known: Iterable[tuple[int, int]]) -> bool:
        """Does :meth:`synchronize`.  Tells whether at each address there is still the allocation that had
        this number (:attr:`DevicePointer.buffer`); False also where the driver refuses, never an error."""
        contexts, answer = self._contexts, _taken(self._answers)
        values, target = answer.values, answer.buffer
        try:
            contexts.push(device)
            try:
                if self._wait():
                    return False
                ask = self._ask
                for address, buffer in known:
                    if ask(target, _BUFFER_ID, address) or values[3] != buffer:
                        return False
                return True
            finally:
                contexts.pop()
        except DriverError:
            return False
        finally:
            self._answers.append(answer)

    # --- memory of other processes ----------------------------------------------------------------------

    def export(self, pointer: DevicePointer) -> bytes:
        """Returns a handle of the allocation of ``pointer``, with which another process opens it.

        Memory that was mapped by parts has no handle (see :attr:`parts`), nor has that of asynchronous pools.
        """
        handle = IpcHandle()
        with self._current(pointer.device):
            self._call("cuIpcGetMemHandle", byref(handle), pointer.base)
        return bytes(handle.data)

    def open(self, device: int, handle: bytes) -> int:
        """Opens another process's allocation; returns the address of its base here.

        An allocation may be open once in a process.  Whoever owns it must not free it before :meth:`close`.
        """
        with self._current(device):
            address = c_uint64()
            given = IpcHandle.from_buffer_copy(handle)
            self._call("cuIpcOpenMemHandle_v2", byref(address), given, _ENABLES_PEERS)
            return address.value

    def close(self, device: int, address: int) -> None:
        """Closes what :meth:`open` has returned."""
        with self._current(device):
            self._call("cuIpcCloseMemHandle", address)

    # --- copies: what they write is there when they return, for all streams and processes ------------------

    def copy_to_host(self, device: int, target: memoryview, address: int) -> None:
        """Fills ``target``, which must be contiguous, from ``address``."""
        if target.nbytes:
            with self._current(device):
                self._call("cuMemcpyDtoH_v2", _address(target), address, target.nbytes)

    def copy_to_device(self, device: int, address: int, data: memoryview) -> None:
        """Copies contiguous ``data`` to ``address``."""
        if data.nbytes:
            with self._current(device):
                self._call("cuMemcpyHtoD_v2", address, _address(data), data.nbytes)
                self._call("cuStreamSynchronize", None)

    def copy_on_device(self, device: int, target: int, source: int, nbytes: int) -> None:
        """Copies from address to address of one device."""
        if nbytes:
            with self._current(device):
                self._call("cuMemcpyDtoD_v2", target, source, nbytes)
                self._call("cuStreamSynchronize", None)

    # --- memory of the host -----------------------------------------------------------------------------

    def register_host(self, device: int, address: int, nbytes: int) -> None:
        """Pins memory of the host, so that devices copy from it and to it at full speed."""
        with self._current(device):
            self._call("cuMemHostRegister_v2", address, nbytes, _PORTABLE)

    def unregister_host(self, device: int, address: int) -> None:
        """Takes :meth:`register_host` back; must come before the memory is unmapped."""
        with self._current(device):
            self._call("cuMemHostUnregister", address)


_found: tuple[int, CudaDriver] | None = None
"""The driver in use, and the process that uses it: a forked child cannot."""


def loaded() -> CudaDriver | None:
    """Returns the driver if this process uses it: it is loaded, started, and has a context on a device.

    Loads and starts nothing.  Takes about 30 µs where the driver is not loaded.
    """
    global _found
    process = os.getpid()
    if _found is not None:  # in a child, the driver may answer as in its parent, and does not work
        return _found[1] if _found[0] == process else None
    if (library := linux_only.library_if_loaded(_LIBRARY)) is not None:
        driver = CudaDriver(library)
        if driver.is_in_use():
            _found = process, driver
            return driver
    return None


def _address(view: memoryview) -> int:
    return int(importing("numpy").frombuffer(view, "u1").__array_interface__["data"][0])
