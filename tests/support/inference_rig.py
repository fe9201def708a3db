"""An executor with a real host and workers, and models that echo, spin, and fail."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnx_dl import ModelHost
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.server.inference.executor import Executor
from onnx_dl.server.inference.limits import Limits
from onnx_dl.server.inference.statistics import Statistics
from onnx_dl.server.interfaces import Served, ServedTable, TensorInfo, VersionStatistics
from onnx_dl.server.repository import specs
from onnx_dl.server.repository.models import ModelTable
from onnx_dl.server.shm.regions import Regions
from onnx_dl.server.v2 import datatypes, text
from onnx_dl.server.v2.messages import (
    InferRequest,
    InferResponse,
    InputTensor,
    OutputTensor,
    RegionSlice,
    RequestedOutput,
)
from tests.support.waiting import DEADLINE, allowed

ONNX = {name: number for number, name in datatypes.ONNX.items()}
FOR_EVER = 1 << 40
"""Turns of the model that spins."""


def _info(name: str, kind: int, shape: list[Any]) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def _model(
    nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: list[Any] | None = None
) -> bytes:
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants or [])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = made.SerializeToString()
    return data


def echo(datatype: str, dimensions: int = 2) -> bytes:
    """y = x, of any size."""
    shape: list[Any] = [f"d{n}" for n in range(dimensions)]
    return _model(
        [helper.make_node("Identity", ["x"], ["y"])],
        [_info("x", ONNX[datatype], shape)],
        [_info("y", ONNX[datatype], shape)],
    )


def spin() -> bytes:
    """y = tanh of x, ``n`` times; x: float32[4], n: int64 scalar."""
    body = helper.make_graph(
        [
            helper.make_node("Tanh", ["state"], ["next"]),
            helper.make_node("Identity", ["go"], ["go_on"]),
        ],
        "body",
        [_info("turn", 7, []), _info("go", 9, []), _info("state", 1, [4])],
        [_info("go_on", 9, []), _info("next", 1, [4])],
    )
    return _model(
        [helper.make_node("Loop", ["n", "true", "x"], ["y"], body=body)],
        [_info("x", 1, [4]), _info("n", 7, [])],
        [_info("y", 1, [4])],
        [numpy_helper.from_array(np.array(True), "true")],
    )


def picky() -> bytes:
    """y = x as [3, n]: onnxruntime refuses what has no such shape."""
    return _model(
        [helper.make_node("Reshape", ["x", "shape"], ["y"])],
        [_info("x", 1, ["n"])],
        [_info("y", 1, [3, "m"])],
        [numpy_helper.from_array(np.array([3, -1], np.int64), "shape")],
    )


def plus(constant: float) -> bytes:
    """y = x + constant; float32[n, 4]."""
    return _model(
        [helper.make_node("Add", ["x", "c"], ["y"])],
        [_info("x", 1, ["n", 4])],
        [_info("y", 1, ["n", 4])],
        [numpy_helper.from_array(np.array([constant], np.float32), "c")],
    )


class InferenceRig:
    """The executor, what it is made of, and short ways to use it."""

    def __init__(self, folder: Path, host: ModelHost, limits: Limits) -> None:
        self.folder = folder
        self.host = host
        self.table = ModelTable(host)
        self.regions = Regions("copy")
        self.statistics = Statistics()
        self.limits = limits
        self.executor = Executor(self.table, self.regions, self.statistics, limits, host)
        self.served: dict[tuple[str, str], Served] = {}
        self.threads = ThreadPoolExecutor(64)

    def serve(self, name: str, model: bytes, version: str = "1", **fields: Any) -> Served:
        """Serves one more version, or another content of one.  ``inputs``, ``outputs``: in short,
        {"x": ("FP32", (-1,))}."""
        number = len(list(self.folder.iterdir()))
        path = self.folder / f"{name}-{version}-{number}.onnx"
        path.write_bytes(model)
        for which in ("inputs", "outputs"):
            short: dict[str, tuple[str, tuple[int, ...]]] = fields.get(which, {})
            fields[which] = tuple(TensorInfo(each, *of) for each, of in short.items())
        generation = specs.generation(str(path), {})
        slot = self.served[name, version].slot if (name, version) in self.served else len(self.served)
        entry = Served(name=name, version=version, path=str(path), generation=generation, slot=slot, **fields)
        self.served[name, version] = entry
        self.table.apply(ServedTable([self.served[key] for key in sorted(self.served)], [], True))
        return entry

    def infer(self, request: InferRequest, cancel: Deadline | None = None) -> InferResponse:
        """In this thread."""
        return self.executor.infer_blocking(request, cancel or Deadline(None, movable=True))

    def counts(self, name: str, version: str = "1") -> VersionStatistics:
        """The statistics of a version; zeros if it had no request."""
        found = [each for each in self.statistics.snapshot() if (each.name, each.version) == (name, version)]
        return found[0] if found else VersionStatistics(name=name, version=version)

    def worker(self, name: str, version: str = "1") -> int:
        """The process id of a version's worker."""
        path = self.served[name, version].path
        (pid,) = [each.pid for each in self.host.snapshot().models if each.model == path]
        assert pid is not None
        return pid

    def busy(self, name: str, version: str = "1") -> int:
        """Calls that its worker serves now."""
        path = self.served[name, version].path
        return sum(each.busy for each in self.host.snapshot().models if each.model == path)


@contextlib.contextmanager
def inference_rig(folder: Path, limits: Limits | None = None) -> Iterator[InferenceRig]:
    with ModelHost() as host:
        rig = InferenceRig(folder, host, limits or Limits(1 << 30))
        try:
            yield rig
        finally:
            rig.threads.shutdown(wait=True)
            rig.executor.close()
            rig.table.close()


def tensor(name: str, datatype: str, array: NDArray[Any], data: Any = None) -> InputTensor:
    """An input in binary form, or with other data."""
    return InputTensor(name, datatype, array.shape, binary(array) if data is None else data)


def binary(array: NDArray[Any]) -> bytes:
    return text.encode(array) if array.dtype == object else array.tobytes()


def request(
    model: str,
    *inputs: InputTensor,
    outputs: dict[str, RegionSlice | None] | None = None,
    version: str = "",
    timeout: float | None = None,
    parameters: dict[str, Any] | None = None,
) -> InferRequest:
    wanted = [RequestedOutput(name, region, True) for name, region in (outputs or {}).items()]
    return InferRequest(model, version, "an id", list(inputs), wanted, parameters or {}, timeout)


def spinning(turns: int = FOR_EVER, timeout: float | None = None) -> InferRequest:
    """A request of the model that spins."""
    x = np.array([0.5, 1, 2, 3], np.float32)
    return request("spin", tensor("x", "FP32", x), tensor("n", "INT64", np.array(turns)), timeout=timeout)


def only(response: InferResponse) -> OutputTensor:
    (output,) = response.outputs
    return output


async def until(happened: Callable[[], object], what: str) -> None:
    """Like ``eventually``, for coroutines."""
    began = time.monotonic()
    while not happened():
        waited = time.monotonic() - began
        assert waited < DEADLINE or waited < allowed(DEADLINE), f"never happened: {what}"
        await asyncio.sleep(0.002)
