"""An HTTP listener in front of a stand-in server, with a loop of uvloop in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import ssl
import threading
import time
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import numpy as np
import uvloop

from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.server.http.limits import HttpLimits
from onnx_dl.server.http.listener import HttpListener
from onnx_dl.server.options import ServeOptions
from onnx_dl.server.v2 import datatypes
from onnx_dl.server.v2.failures import too_many
from onnx_dl.server.v2.messages import InferRequest, InferResponse, InputTensor, OutputTensor, RegionSlice
from tests.server import standin
from tests.support.waiting import DEADLINE, allowed

_Result = TypeVar("_Result")

# libuv opens a pipe with the first loop of a process and keeps it: here, and not within a test that counts.
uvloop.new_event_loop().close()


class Inference(standin.Inference):
    """Echoes as a coroutine."""

    def __init__(self, models: standin.Models) -> None:
        super().__init__(models)
        self.allocated: list[int] = []
        self.is_full = False
        self.cancelled = 0
        """Runs that were cancelled."""

    def allocate(self, nbytes: int) -> memoryview:
        if self.is_full:
            raise too_many("Too many bytes are in flight.", 2.5)
        self.allocated.append(nbytes)
        return memoryview(bytearray(nbytes))

    async def infer(self, request: InferRequest) -> InferResponse:
        began = time.monotonic()
        if self._goes_on(request, began):
            self.running += 1
            try:
                while self._goes_on(request, began):
                    await asyncio.sleep(0.005)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            finally:
                self.running -= 1
            kept = request.parameters.keys() - {"sleep", "hold"}
            parameters = {name: request.parameters[name] for name in kept}
            request = dataclasses.replace(request, parameters=parameters)
        return self.infer_blocking(request, Deadline(None, movable=True))

    def _output(self, tensor: InputTensor, data: Any, region: RegionSlice | None) -> OutputTensor:
        if isinstance(data, list):
            dtype = datatypes.to_numpy(tensor.datatype) or object
            array = np.array(data, dtype).reshape(tensor.shape)
            return OutputTensor(tensor.name, tensor.datatype, tensor.shape, array)
        return super()._output(tensor, data, region)


class HttpStandIn(standin.StandIn):
    """A server with a listener.  ``address`` is "host:port"."""

    def __init__(self, options: ServeOptions | None = None) -> None:
        super().__init__(options)
        self.inference: Inference = Inference(self.models)
        self.address = ""
        self.listener: HttpListener
        self.loop: asyncio.AbstractEventLoop

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def do(self, coroutine: Coroutine[Any, Any, _Result]) -> _Result:
        """Runs a coroutine on the listener's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(allowed(DEADLINE))

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=allowed(DEADLINE))


@contextlib.contextmanager
def listening(
    limits: HttpLimits | None = None,
    options: ServeOptions | None = None,
    context: ssl.SSLContext | None = None,
    *,
    metrics_only: bool = False,
    with_uvloop: bool = True,
) -> Iterator[HttpStandIn]:
    """A listener at a free port."""
    server = HttpStandIn(options)
    server.loop = loop = uvloop.new_event_loop() if with_uvloop else asyncio.new_event_loop()
    faults: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: faults.append(context))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> str:
        server.listener = HttpListener(server, limits)
        return await server.listener.start("127.0.0.1:0", context, metrics_only=metrics_only)

    try:
        server.address = server.do(start())
        yield server
        server.do(server.listener.close())
        assert not faults, faults
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
