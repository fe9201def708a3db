"""The four clients of tritonclient behind one way to call them."""

from __future__ import annotations

import asyncio
import importlib
import queue
from collections.abc import AsyncIterator, Callable
from types import ModuleType
from typing import Any, Final

import numpy as np
from tritonclient.utils import InferenceServerException

from tests.support.waiting import DEADLINE, allowed

KINDS: Final = ("http", "http.aio", "grpc", "grpc.aio")


class Kit:
    """One client.  ``call`` waits for coroutines; what it returns is plain data."""

    def __init__(self, kind: str, address: str) -> None:
        self.kind = kind
        self.is_http = kind.startswith("http")
        self.is_async = kind.endswith("aio")
        self.library: ModuleType = importlib.import_module(f"tritonclient.{kind}")
        self.base: ModuleType = importlib.import_module(f"tritonclient.{kind.split('.')[0]}")
        self._loop = asyncio.new_event_loop() if self.is_async else None
        self.address = address
        self.used: set[str] = set()
        """Names of the methods that were called."""
        if self._loop is None:
            self.client = self.library.InferenceServerClient(address)
        else:
            self.client = self._loop.run_until_complete(self._open())

    async def _open(self) -> Any:
        return self.library.InferenceServerClient(self.address)

    def raw(self, method: str, *args: Any, **more: Any) -> Any:
        """What a method returns."""
        self.used.add(method)
        found = getattr(self.client, method)(*args, **more)
        return found if self._loop is None else self._loop.run_until_complete(_bounded(found))

    def call(self, method: str, *args: Any, **more: Any) -> Any:
        """The same as plain data."""
        if not self.is_http and method.startswith(("get_", "update_")):
            more["as_json"] = True
        return self.raw(method, *args, **more)

    def input(self, name: str, array: np.ndarray, datatype: str, **binary: bool) -> Any:
        made = self.base.InferInput(name, list(array.shape), datatype)
        made.set_data_from_numpy(array, **binary)
        return made

    def output(self, name: str, **binary: bool) -> Any:
        return self.base.InferRequestedOutput(name, **binary)

    def infer(self, model: str, inputs: list[Any], **more: Any) -> dict[str, Any]:
        """The response and the data of its outputs."""
        return self.told(self.raw("infer", model, inputs, **more))

    def response(self, result: Any) -> dict[str, Any]:
        """The message itself."""
        message = result.get_response() if self.is_http else result.get_response(as_json=True)
        message.pop("raw_output_contents", None)
        return dict(message)

    def told(self, result: Any) -> dict[str, Any]:
        response = self.response(result)
        data = {}
        for output in response.get("outputs", []):
            array = result.as_numpy(output["name"])
            data[output["name"]] = None if array is None else [_item(item) for item in array.ravel().tolist()]
            output.pop("data", None)
        return {"response": response, "data": data}

    def streamed(self, model: str, inputs: list[Any], count: int) -> list[dict[str, Any]]:
        """The answers of ``count`` requests over one stream of gRPC."""
        if self._loop is not None:
            self.used.add("stream_infer")
            return self._loop.run_until_complete(_bounded(self._astreamed(model, inputs, count)))
        found: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()
        self.raw("start_stream", callback=lambda result, error: found.put((result, error)))
        try:
            for i in range(count):
                self.raw("async_stream_infer", model, inputs, request_id=str(i))
            answers = [found.get(timeout=allowed(DEADLINE)) for _ in range(count)]
        finally:
            self.raw("stop_stream")
        return [self._streamed_told(*answer) for answer in answers]

    async def _astreamed(self, model: str, inputs: list[Any], count: int) -> list[dict[str, Any]]:
        async def requests() -> AsyncIterator[dict[str, Any]]:
            for i in range(count):
                yield {"model_name": model, "inputs": inputs, "request_id": str(i)}

        answers = self.client.stream_infer(requests())
        return [self._streamed_told(*answer) async for answer in answers]

    def _streamed_told(self, result: Any, error: Exception | None) -> dict[str, Any]:
        return self.told(result) if error is None else {"error": str(error)}

    def async_infer(self, model: str, inputs: list[Any]) -> dict[str, Any]:
        """By ``async_infer`` of the clients with threads."""
        if self.is_http:
            return self.told(self.raw("async_infer", model, inputs).get_result())
        found: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()
        self.raw("async_infer", model, inputs, callback=lambda result, error: found.put((result, error)))
        return self._streamed_told(*found.get(timeout=allowed(DEADLINE)))

    def close(self) -> None:
        self.raw("close")
        if self._loop is not None:
            self._loop.close()


async def _bounded(awaitable: Any) -> Any:
    return await asyncio.wait_for(awaitable, allowed(DEADLINE))


def _item(value: Any) -> Any:
    """As JSON has it."""
    return value.decode() if isinstance(value, bytes) else value


def outcome(step: Callable[[Kit], Any], kit: Kit) -> dict[str, Any]:
    """What a step returned, or the status and words of the error."""
    try:
        return {"answer": step(kit)}
    except InferenceServerException as error:
        return {"status": error.status(), "message": error.message()}
