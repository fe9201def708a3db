"""Calls about shared memory.  Regions of CUDA are not built: there are none, and none can be registered."""

from __future__ import annotations

from typing import Final

from onnx_dl.server.grpc.calls import UnaryCall, Wait
from onnx_dl.server.grpc.messages import Message, message
from onnx_dl.server.interfaces import Server
from onnx_dl.server.v2.failures import RequestFailure, not_found
from onnx_dl.server.v2.operations import Operation

_Status: Final = message("inference.SystemSharedMemoryStatusResponse")


def _status(server: Server, request: Message, wait: Wait) -> Message:
    found = wait(server.control.region_status(request.name or None))
    return _Status(
        regions={
            region.name: _Status.RegionStatus(
                name=region.name, key=region.key, offset=region.offset, byte_size=region.byte_size
            )
            for region in found
        }
    )


def _register(server: Server, request: Message, wait: Wait) -> Message:
    wait(server.control.register_region(request.name, request.key, request.offset, request.byte_size))
    return message("inference.SystemSharedMemoryRegisterResponse")()


def _unregister(server: Server, request: Message, wait: Wait) -> Message:
    wait(server.control.unregister_region(request.name or None))
    return message("inference.SystemSharedMemoryUnregisterResponse")()


def _cuda_status(server: Server, request: Message, wait: Wait) -> Message:
    if request.name:
        raise not_found(f"Unable to find cuda shared memory region: '{request.name}'")
    return message("inference.CudaSharedMemoryStatusResponse")()


def _cuda_register(server: Server, request: Message, wait: Wait) -> Message:
    raise RequestFailure(400, "UNIMPLEMENTED", "this server does not support CUDA shared memory")


def _cuda_unregister(server: Server, request: Message, wait: Wait) -> Message:
    return message("inference.CudaSharedMemoryUnregisterResponse")()


_SYSTEM: Final = "inference.SystemSharedMemory"
_CUDA: Final = "inference.CudaSharedMemory"
CALLS: Final = {
    "SystemSharedMemoryStatus": UnaryCall(Operation.SHM_STATUS, message(f"{_SYSTEM}StatusRequest"), _status),
    "SystemSharedMemoryRegister": UnaryCall(
        Operation.SHM_REGISTER, message(f"{_SYSTEM}RegisterRequest"), _register
    ),
    "SystemSharedMemoryUnregister": UnaryCall(
        Operation.SHM_UNREGISTER, message(f"{_SYSTEM}UnregisterRequest"), _unregister
    ),
    "CudaSharedMemoryStatus": UnaryCall(Operation.SHM_STATUS, message(f"{_CUDA}StatusRequest"), _cuda_status),
    "CudaSharedMemoryRegister": UnaryCall(
        Operation.SHM_REGISTER, message(f"{_CUDA}RegisterRequest"), _cuda_register
    ),
    "CudaSharedMemoryUnregister": UnaryCall(
        Operation.SHM_UNREGISTER, message(f"{_CUDA}UnregisterRequest"), _cuda_unregister
    ),
}
