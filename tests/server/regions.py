"""Clients of a server that use shared memory: tritonclient in both protocols, and their regions."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
import tritonclient.utils.shared_memory as shm
from onnx import TensorProto, helper
from tritonclient.utils import InferenceServerException

from tests.support.serving import Serving
from tests.support.sharing import belonging
from tests.support.waiting import is_process

LARGE = 1_250_000
"""Items of float32: 5 MB."""
SMALL = 64
PREFIX = f"odl-test-{os.getpid()}"


def text_model() -> bytes:
    """u = t; text[N]."""
    ends = [helper.make_tensor_value_info(name, TensorProto.STRING, ["N"]) for name in "tu"]
    graph = helper.make_graph([helper.make_node("Identity", ["t"], ["u"])], "text", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def mixed_model() -> bytes:
    """y = b + x; bfloat16[N], float32[N]."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["b"], ["c"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["c", "x"], ["y"]),
        ],
        "mixed",
        [
            helper.make_tensor_value_info("b", TensorProto.BFLOAT16, ["N"]),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


class Client:
    """tritonclient in one of its protocols."""

    def __init__(self, module: Any, address: str) -> None:
        self.module = module
        self.triton = module.InferenceServerClient(address)

    def echo(
        self, size: int, *, offset: int = 0, out: str = "out", room: int | None = None, model: str = "echo"
    ) -> Any:
        """Has the model read ``in`` and write ``out``."""
        nbytes = 4 * size
        x = self.module.InferInput("x", [size], "FP32")
        x.set_shared_memory("in", nbytes, offset=offset)
        y = self.module.InferRequestedOutput("y")
        y.set_shared_memory(out, nbytes if room is None else room)
        return self.triton.infer(model, [x], outputs=[y])

    def late(self, size: int, turns: int) -> Any:
        x = self.module.InferInput("x", [size], "FP32")
        x.set_shared_memory("in", 4 * size)
        n = self.module.InferInput("n", [], "INT64")
        n.set_data_from_numpy(np.array(turns))
        y = self.module.InferRequestedOutput("y")
        y.set_shared_memory("out", 4 * size)
        return self.triton.infer("late", [x, n], outputs=[y])


@contextlib.contextmanager
def closing_client(server: Serving, kind: str) -> Iterator[Client]:
    module, address = (over_http, server.http) if kind == "http" else (over_grpc, server.grpc)
    made = Client(module, address)
    with contextlib.closing(made.triton):
        yield made


@contextlib.contextmanager
def region(client: Client, name: str, nbytes: int) -> Iterator[Any]:
    """A registered region, and tritonclient's handle of it."""
    key = f"/{PREFIX}-{name}"
    handle = shm.create_shared_memory_region(name, key, nbytes)
    try:
        client.triton.register_system_shared_memory(name, key, nbytes)
        yield handle
    finally:
        client.triton.unregister_system_shared_memory(name)
        shm.destroy_shared_memory_region(handle)


@contextlib.contextmanager
def both(client: Client, nbytes: int) -> Iterator[tuple[Any, Any]]:
    with region(client, "in", nbytes) as given, region(client, "out", nbytes) as out:
        yield given, out


def path(name: str) -> str:
    return f"/dev/shm/{PREFIX}-{name}"


def worker(server: Serving, model: str) -> psutil.Process:
    """The process of a model that is loaded."""
    (found,) = [
        process
        for process in belonging(server.runtime)
        if is_process(process, "worker") and model in " ".join(process.cmdline())
    ]
    return found


def held(server: Serving) -> int:
    """Descriptors and mappings of our regions in all processes of the server, its host and its workers."""
    found = 0
    for process in belonging(server.runtime):
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            for fd in os.listdir(f"/proc/{process.pid}/fd"):
                with contextlib.suppress(FileNotFoundError):
                    found += PREFIX in os.readlink(f"/proc/{process.pid}/fd/{fd}")
            found += Path(f"/proc/{process.pid}/maps").read_text().count(PREFIX)
    return found


def refused(work: Any, *words: str, status: str = "400 INVALID_ARGUMENT") -> None:
    """Expects an error of the client with these words."""
    with pytest.raises(InferenceServerException) as caught:
        work()
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert str(caught.value.status()).removeprefix("StatusCode.") in status.split()
