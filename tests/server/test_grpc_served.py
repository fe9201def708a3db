"""gRPC before workers: large tensors, cancelling, deadlines, shared memory, the end of the server."""

from __future__ import annotations

import os
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest

pytest.importorskip("tritonclient.grpc")

import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException, shared_memory

from onnx_dl.server.grpc.messages import INFERENCE, message
from tests.server.grpc_rig import UNLIMITED, code_of
from tests.support.serving import Serving, serving
from tests.support.slow import identity_model, spin_model
from tests.support.waiting import DEADLINE, allowed, eventually

FOREVER = 1 << 40


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    resource_tracker.ensure_running()  # a process that Triton's shared memory starts, and that stays
    folder: Path = tmp_path_factory.mktemp("models")
    paths = {"echo": identity_model(), "spin": spin_model()}
    for name, data in paths.items():
        (folder / f"{name}.onnx").write_bytes(data)
    models = [word for name in paths for word in ("--model", f"{name}={folder / name}.onnx")]
    with serving(*models, "--client-shm", "copy") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Serving) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.grpc) as client:
        spin(client, 1)  # loaded, and connected
        yield client


def an_input(name: str, array: np.ndarray[Any, Any], datatype: str = "FP32") -> triton.InferInput:
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return tensor


def spin(client: triton.InferenceServerClient, turns: int, **keywords: Any) -> Any:
    inputs = [an_input("x", np.zeros((64, 64), np.float32)), an_input("n", np.array(turns), "INT64")]
    return client.infer("spin", inputs, **keywords)


def failures(client: triton.InferenceServerClient) -> int:
    (stats,) = client.get_inference_statistics("spin").model_stats
    return int(stats.inference_stats.fail.count)


def pending(server: Serving) -> int:
    """Requests of ``spin`` that have begun and not ended."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=allowed(DEADLINE)) as response:
        text = response.read().decode()
    found = re.search(r'^nv_inference_pending_request_count{.*"spin".*} (\S+)$', text, re.MULTILINE)
    return 0 if found is None else int(float(found[1]))


@pytest.mark.parametrize("size", [0, 1, 16_383, 16_384, 2_000_001])
def test_tensors_of_any_size(client: triton.InferenceServerClient, size: int) -> None:
    array = np.random.default_rng(size).random(size, np.float32)
    for request_id in ("", "x", "xy", "xyz"):  # so that the tensor begins anywhere in the message
        result = client.infer("echo", [an_input("x", array)], request_id=request_id)
        np.testing.assert_array_equal(result.as_numpy("y"), array)


def test_many_clients_get_their_own_answers(client: triton.InferenceServerClient) -> None:
    def one(index: int) -> bool:
        array = np.full(100_000 * (index % 4) + index, index, np.float32)
        return all(
            np.array_equal(client.infer("echo", [an_input("x", array)]).as_numpy("y"), array)
            for _ in range(10)
        )

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(one, range(12)))


def test_typed_contents(server: Serving) -> None:
    request = message("inference.ModelInferRequest")(model_name="echo")
    request.inputs.add(name="x", datatype="FP32", shape=[2], contents={"fp32_contents": [1.5, -2.0]})
    with grpc.insecure_channel(server.grpc, UNLIMITED) as channel:
        data = channel.unary_unary(f"/{INFERENCE}/ModelInfer")(
            request.SerializeToString(), timeout=allowed(DEADLINE)
        )
        answer = message("inference.ModelInferResponse").FromString(data)
        assert list(answer.raw_output_contents) == [np.float32([1.5, -2.0]).tobytes()]
        request.inputs[0].contents.int_contents.append(1)
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(f"/{INFERENCE}/ModelInfer")(
                request.SerializeToString(), timeout=allowed(DEADLINE)
            )
        assert code_of(caught.value) == "INVALID_ARGUMENT"


def test_large_messages_leave_no_memory(server: Serving, client: triton.InferenceServerClient) -> None:
    def private() -> int:
        used: int = psutil.Process(server.pid).memory_full_info().uss
        return used

    before = private()
    tensor = an_input("x", np.ones(8 << 20, np.float32))
    for _ in range(3):
        assert client.infer("echo", [tensor]).as_numpy("y")[-1] == 1
    eventually(lambda: private() < before + (16 << 20), "memory that is given back")


def test_cancelling_a_call_frees_the_model(server: Serving, client: triton.InferenceServerClient) -> None:
    before = failures(client)
    ended = threading.Event()
    inputs = [an_input("x", np.zeros((64, 64), np.float32)), an_input("n", np.array(FOREVER), "INT64")]
    call = client.async_infer("spin", inputs, lambda result, error: ended.set())
    eventually(lambda: pending(server) == 1, "a run")
    call.cancel()
    eventually(lambda: failures(client) == before + 1, "the end of the run")
    assert ended.wait(allowed(DEADLINE))
    spin(client, 1)


@pytest.mark.parametrize("keywords", [{"client_timeout": 1.0}, {"timeout": 300_000}])
def test_a_deadline_frees_the_model(client: triton.InferenceServerClient, keywords: dict[str, Any]) -> None:
    before = failures(client)
    began = time.monotonic()
    with pytest.raises(InferenceServerException) as caught:
        spin(client, FOREVER, **keywords)
    assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    assert time.monotonic() - began > 0.2
    eventually(lambda: failures(client) == before + 1, "the end of the run")
    spin(client, 1)


def test_a_stream_that_is_cancelled_frees_the_model(
    server: Serving, client: triton.InferenceServerClient
) -> None:
    before = failures(client)
    inputs = [an_input("x", np.zeros((64, 64), np.float32)), an_input("n", np.array(FOREVER), "INT64")]
    client.start_stream(lambda result, error: None)
    for _ in range(3):
        client.async_stream_infer("spin", inputs)
    eventually(lambda: pending(server) == 3, "runs")
    client.stop_stream(cancel_requests=True)
    eventually(lambda: failures(client) == before + 3, "the end of the runs")
    spin(client, 1)


def test_shared_memory(client: triton.InferenceServerClient) -> None:
    array = np.arange(50_000, dtype=np.float32)
    key = f"/odl_grpc_served_{os.getpid()}"
    region = shared_memory.create_shared_memory_region("grpc_served", key, 2 * array.nbytes)
    try:
        shared_memory.set_shared_memory_region(region, [array])
        client.register_system_shared_memory("grpc_served", key, 2 * array.nbytes)
        tensor = triton.InferInput("x", [array.size], "FP32")
        tensor.set_shared_memory("grpc_served", array.nbytes)
        output = triton.InferRequestedOutput("y")
        output.set_shared_memory("grpc_served", array.nbytes, offset=array.nbytes)
        result = client.infer("echo", [tensor], outputs=[output])
        assert list(result.get_response().raw_output_contents) == [b""]
        answer = result.get_output("y")
        assert (answer.datatype, list(answer.shape)) == ("FP32", [array.size])
        got = shared_memory.get_contents_as_numpy(region, np.float32, [array.size], offset=array.nbytes)
        np.testing.assert_array_equal(got, array)
        client.unregister_system_shared_memory("grpc_served")
        with pytest.raises(InferenceServerException):
            client.infer("echo", [tensor])
    finally:
        shared_memory.destroy_shared_memory_region(region)
