"""A server whose models echo, for tests of one protocol without workers and hosts."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.server.interfaces import (
    Caller,
    DurationCount,
    IndexRow,
    ModelState,
    RegionStatus,
    Served,
    ServedModel,
    ServedTable,
    TensorInfo,
    VersionStatistics,
)
from onnx_dl.server.options import ServeOptions
from onnx_dl.server.v2 import datatypes
from onnx_dl.server.v2.failures import (
    RequestFailure,
    cancelled,
    forbidden,
    internal,
    invalid,
    not_found,
    passed,
    too_many,
)
from onnx_dl.server.v2.messages import InferRequest, InferResponse, InputTensor, OutputTensor, RegionSlice
from onnx_dl.server.v2.operations import Operation, Scope

TOKEN = "Bearer a-token"
CONFIG = {
    "name": "echo", "platform": "onnxruntime_onnx", "backend": "onnxruntime", "max_batch_size": 0,
    "version_policy": {"latest": {"num_versions": 1}},
    "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": ["-1"], "optional": True}],
    "output": [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1]}],
    "instance_group": [{"name": "echo_0", "kind": "KIND_CPU", "count": 1}],
    "parameters": {"onnx_dl.ttl": {"string_value": "5m"}},
    "a_field_of_tomorrow": 7,
}  # fmt: skip


def served(version: str) -> Served:
    tensor = (TensorInfo("x", "FP32", (-1,)),)
    return Served(
        name="echo", version=version, path="", generation="", inputs=tensor, outputs=tensor, config=CONFIG
    )


class Models:
    def __init__(self) -> None:
        self.table = ServedTable(
            [served(version) for version in ("1", "3")],
            [IndexRow("echo", "3", "READY"), IndexRow("gone", "1", "UNAVAILABLE", "unloaded")],
            True,
        )

    def find(self, name: str, version: str = "") -> Served:
        for entry in reversed(self.table.served):
            if entry.name == name and version in ("", entry.version):
                return entry
        raise not_found(f"Request for unknown model: '{name}' is not found")

    def check_ready(self, name: str, version: str = "") -> None:
        self.find(name, version)

    def versions(self, name: str) -> list[str]:
        return [entry.version for entry in self.table.served if entry.name == name]

    def use(self, name: str, version: str = "") -> contextlib.AbstractContextManager[ServedModel]:
        raise NotImplementedError


class Inference:
    """Answers with the inputs.  Parameters say what happens: ``fail``, ``busy``, ``sleep`` seconds, ``hold``:
    the run goes on until that word is in ``released``."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self.requests: list[InferRequest] = []
        self.ended = 0
        """Runs that ended because they were told to end."""
        self.running = 0
        self.owed = 0
        """Bytes of answers that wait."""
        self.sizes: list[int] = []
        """Bytes of messages that were noted."""
        self.released: set[str] = set()
        self.regions: dict[str, bytearray] = {}
        self.refusals: list[tuple[str, str, int, str]] = []
        """Model, version, status and reason of requests that were refused."""
        self._lock = threading.Lock()

    def allocate(self, nbytes: int) -> memoryview:
        return memoryview(bytearray(nbytes))

    def owe(self, nbytes: int) -> None:
        with self._lock:
            self.owed += nbytes

    def paid(self, nbytes: int) -> None:
        self.owe(-nbytes)

    def note_size(self, nbytes: int) -> None:
        self.sizes.append(nbytes)
        del self.sizes[:-100]

    def refused(self, model: str, version: str, failure: RequestFailure) -> None:
        self.refusals.append((model, version, failure.http, failure.reason))

    async def infer(self, request: InferRequest) -> InferResponse:
        raise NotImplementedError

    def infer_blocking(self, request: InferRequest, cancel: Deadline) -> InferResponse:
        entry = self._models.find(request.model, request.version)
        with self._lock:
            self.requests.append(request)
            del self.requests[:-100]
            self.running += 1
        try:
            self._obey(request, cancel)
            regions = {output.name: output.region for output in request.outputs}
            outputs = [
                self._output(tensor, tensor.data, regions.get(tensor.name)) for tensor in request.inputs
            ]
        finally:
            with self._lock:
                self.running -= 1
        return InferResponse(entry.name, entry.version, request.id, outputs)

    def _obey(self, request: InferRequest, cancel: Deadline) -> None:
        if "fail" in request.parameters:
            raise internal(request.parameters["fail"])
        if "busy" in request.parameters:
            raise too_many("the queue is full", 2.5)
        if "crash" in request.parameters:
            raise ZeroDivisionError("a fault of ours")
        began = time.monotonic()
        limit = None if request.timeout is None else time.monotonic() + request.timeout
        while self._goes_on(request, began):
            now = time.monotonic()
            if limit is not None and now > limit:
                raise passed("the deadline passed")
            if cancel.passed:
                with self._lock:
                    self.ended += 1
                raise cancelled()
            time.sleep(0.005)

    def _goes_on(self, request: InferRequest, began: float) -> bool:
        """Whether a run that began at this time lasts."""
        seconds, word = request.parameters.get("sleep", 0.0), request.parameters.get("hold")
        return time.monotonic() < began + seconds or (word is not None and word not in self.released)

    def _output(self, tensor: InputTensor, data: Any, region: RegionSlice | None) -> OutputTensor:
        name, datatype, shape = tensor.name, tensor.datatype, tensor.shape
        if isinstance(data, RegionSlice):
            data = memoryview(self.regions[data.region])[data.offset : data.offset + data.nbytes]
        if region is not None:
            self.regions[region.region][region.offset : region.offset + region.nbytes] = data
            return OutputTensor(name, datatype, shape, None, region)
        dtype = datatypes.to_numpy(datatype)
        if dtype is None and datatype == datatypes.BYTES:
            items, at, view = [], 0, bytes(data)
            while at < len(view):
                length = int.from_bytes(view[at : at + 4], "little")
                items.append(view[at + 4 : at + 4 + length])
                at += 4 + length
            array = np.empty(len(items), object)
            array[:] = items
        else:
            array = np.frombuffer(data, dtype or np.uint16)
        count = 1
        for size in shape:
            count *= size
        if count != array.size:
            raise invalid(f"input '{name}' has {array.size} items, and its shape {list(shape)} has {count}")
        return OutputTensor(name, datatype, shape, array.reshape(shape))


class Control:
    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.regions: dict[str, RegionStatus] = {}
        self.loading = 0
        """Loads that wait for ``can_load``."""
        self.can_load = threading.Event()
        self.can_load.set()

    async def load(self, name: str, parameters: dict[str, Any]) -> None:
        if name == "unknown":
            raise not_found("failed to load 'unknown', no version is available")
        self.loading += 1
        try:
            while not self.can_load.is_set():
                await asyncio.sleep(0.01)
        finally:
            self.loading -= 1
        self.asked.append(("load", name, parameters))

    async def unload(self, name: str, parameters: dict[str, Any]) -> None:
        self.asked.append(("unload", name, parameters))

    async def register_region(self, name: str, key: str, offset: int, byte_size: int) -> None:
        if name in self.regions:
            raise invalid(f"shared memory region '{name}' already in manager")
        self.regions[name] = RegionStatus(name, key, offset, byte_size)

    async def unregister_region(self, name: str | None) -> None:
        if name is None:
            self.regions.clear()
        else:
            self.regions.pop(name, None)

    async def region_status(self, name: str | None) -> list[RegionStatus]:
        if name is not None and name not in self.regions:
            raise not_found(f"Unable to find system shared memory region: '{name}'")
        return [region for region in self.regions.values() if name in (None, region.name)]

    async def statistics(self, name: str = "", version: str = "") -> list[VersionStatistics]:
        return [
            VersionStatistics(
                name="echo", version="3", last_inference_ms=1_700_000_000_000, inference_count=5,
                execution_count=4, success=DurationCount(4, 4000), fail=DurationCount(1, 9),
            )
        ]  # fmt: skip

    async def model_state(self, name: str, version: str = "") -> ModelState:
        raise NotImplementedError

    async def metrics(self, accept: str = "") -> tuple[bytes, str]:
        if not accept:
            raise NotImplementedError
        return b"text", accept


class Access:
    """With ``needs_token``, health alone is open."""

    def __init__(self) -> None:
        self.needs_token = False
        self.callers: list[tuple[Operation, Caller]] = []

    def check(self, operation: Operation, caller: Caller) -> None:
        self.callers.append((operation, caller))
        del self.callers[:-100]
        if self.needs_token and operation.scope is not Scope.HEALTH and caller.authorization != TOKEN:
            raise forbidden("a token of the scope is needed")

    def check_browser(self, host: str | None, origin: str | None) -> None:
        return None


class StandIn:
    """A ``Server``."""

    version = "1.2.3"
    extensions = ("model_repository", "statistics")

    def __init__(self, options: ServeOptions | None = None) -> None:
        self.options = options or ServeOptions(max_body=64 << 20)
        self.models = Models()
        self.inference = Inference(self.models)
        self.control = Control()
        self.access = Access()
        self.is_draining = False
        self.is_ready = True


@contextlib.contextmanager
def running_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


__all__ = ["TOKEN", "RequestFailure", "StandIn", "running_loop"]
