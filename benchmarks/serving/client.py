"""One client, as a process: ``python -m benchmarks.serving.client``.

Reads commands from stdin, one JSON object a line, and answers each with a line.  ``open`` makes a connection
and one call, and answers with the sum of the result; ``run`` calls for some seconds.  Inputs and JSON bodies
are made once, when it opens: what is timed is ``infer`` of tritonclient, and of JSON a POST whose answer is
read but not parsed, because Python would take longer for that than any server.
"""

from __future__ import annotations

import gc
import http.client
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

INPUT, OUTPUT, DATATYPE = "x", "y", "FP32"
_TIMEOUT = 120.0


class Call:
    """One way to call one model.  ``call`` makes a call; ``result`` is an array of the last one's answer."""

    def __init__(self, address: str, work: dict[str, Any], unique: str) -> None:
        self.address, self.name, self.unique = address, work["name"], unique
        self.shape, self.output_shape = list(work["shape"]), list(work["output_shape"])
        rng = np.random.default_rng(1)
        self.array = rng.standard_normal(self.shape, dtype=np.float32)
        self.open()

    def open(self) -> None:
        raise NotImplementedError

    def call(self) -> None:
        raise NotImplementedError

    def result(self) -> np.ndarray:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class Direct(Call):
    """tritonclient with the tensors in the messages."""

    module: str

    def open(self) -> None:
        import importlib

        self.library = library = importlib.import_module(self.module)
        self.client = library.InferenceServerClient(self.address, **self.timeouts())
        self.inputs = [library.InferInput(INPUT, self.shape, DATATYPE)]
        self.inputs[0].set_data_from_numpy(self.array)
        self.outputs = [library.InferRequestedOutput(OUTPUT)]

    def timeouts(self) -> dict[str, Any]:
        return {}

    def call(self) -> None:
        self.answer = self.client.infer(self.name, self.inputs, outputs=self.outputs)

    def result(self) -> np.ndarray:
        return self.answer.as_numpy(OUTPUT)

    def close(self) -> None:
        self.client.close()


class Http(Direct):
    module = "tritonclient.http"

    def timeouts(self) -> dict[str, Any]:
        return {"network_timeout": _TIMEOUT, "connection_timeout": _TIMEOUT}


class Grpc(Direct):
    module = "tritonclient.grpc"


class Shared(Direct):
    """tritonclient with the tensors in regions of system shared memory."""

    def open(self) -> None:
        super().open()
        import tritonclient.utils.shared_memory as shm

        self.shm = shm
        nbytes, self.output_nbytes = self.array.nbytes, 4 * int(np.prod(self.output_shape))
        self.regions = []
        for kind, size in (("in", nbytes), ("out", self.output_nbytes)):
            name = f"{self.unique}-{kind}"
            region = shm.create_shared_memory_region(name, f"/{name}", size)
            self.regions.append((name, region))
            self.client.register_system_shared_memory(name, f"/{name}", size)
        shm.set_shared_memory_region(self.regions[0][1], [self.array])
        self.inputs = [self.library.InferInput(INPUT, self.shape, DATATYPE)]
        self.inputs[0].set_shared_memory(self.regions[0][0], nbytes)
        self.outputs[0].set_shared_memory(self.regions[1][0], self.output_nbytes)

    def result(self) -> np.ndarray:
        return self.shm.get_contents_as_numpy(self.regions[1][1], np.float32, self.output_shape)

    def close(self) -> None:
        for name, _ in self.regions:
            self.client.unregister_system_shared_memory(name)
        self.remove()
        super().close()

    def remove(self) -> None:
        for _, region in self.regions:
            self.shm.destroy_shared_memory_region(region)


class HttpShared(Shared, Http):
    pass


class GrpcShared(Shared, Grpc):
    pass


class Json(Call):
    """JSON both ways, over a connection that stays open."""

    def open(self) -> None:
        tensor = {
            "name": INPUT,
            "shape": self.shape,
            "datatype": DATATYPE,
            "data": self.array.ravel().tolist(),
        }
        self.body = json.dumps({"inputs": [tensor], "outputs": [{"name": OUTPUT}]}).encode()
        self.connection = http.client.HTTPConnection(self.address, timeout=_TIMEOUT)
        self.path = f"/v2/models/{self.name}/infer"

    def call(self) -> None:
        try:
            answer = self._post()
        except ConnectionError:  # while others were called, the server closed it
            self.connection.close()
            answer = self._post()
        self.answer = answer.read()
        if answer.status != 200:
            raise RuntimeError(self.answer[:1000].decode())

    def _post(self) -> http.client.HTTPResponse:
        self.connection.request("POST", self.path, self.body, {"Content-Type": "application/json"})
        return self.connection.getresponse()

    def result(self) -> np.ndarray:
        (output,) = json.loads(self.answer)["outputs"]
        return np.array(output["data"], np.float32).reshape(self.output_shape)

    def close(self) -> None:
        self.connection.close()


WAYS: dict[str, type[Call]] = {
    "HTTP": Http, "HTTP + shm": HttpShared, "gRPC": Grpc, "gRPC + shm": GrpcShared, "JSON": Json,
}  # fmt: skip


class Client:
    """What the commands do."""

    def __init__(self) -> None:
        self._calls: dict[str, Call] = {}

    def open(self, key: str, way: str, address: str, work: dict[str, Any]) -> dict[str, Any]:
        call = WAYS[way](address, work, f"bench-{os.getpid()}-{len(self._calls)}")
        self._calls[key] = call
        call.call()
        found = call.result()
        assert list(found.shape) == call.output_shape, found.shape
        return {"sum": float(np.abs(found, dtype=np.float64).sum())}

    def run(self, key: str, seconds: float, at: float, most: int) -> dict[str, Any]:
        """Calls from the time ``at`` (of ``time.monotonic``) on, at least once.  ``times``: microseconds of
        each call.  ``cpu``: seconds of this process."""
        call = self._calls[key].call
        for _ in range(2):  # caches are cold
            call()
        gc.collect()
        time.sleep(max(0.0, at - time.monotonic()))
        cpu, times = time.process_time(), []
        now = time.monotonic()
        until = now + seconds
        while not times or (now < until and len(times) < most):
            call()
            ended = time.monotonic()
            times.append((ended - now) * 1e6)
            now = ended
        return {"times": times, "cpu": time.process_time() - cpu}

    def close(self, key: str) -> dict[str, Any]:
        self._calls.pop(key).close()
        return {}

    def end(self) -> None:
        """Removes regions that are left; their servers may have gone."""
        for call in self._calls.values():
            if isinstance(call, Shared):
                call.remove()


def main() -> None:
    client = Client()
    does: dict[str, Callable[..., dict[str, Any]]] = {
        "open": client.open, "run": client.run, "close": client.close,
    }  # fmt: skip
    for line in sys.stdin:
        command, arguments = json.loads(line)
        try:
            answer = does[command](**arguments)
        except Exception as error:  # it is told, and measured no further
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    client.end()


if __name__ == "__main__":
    main()
