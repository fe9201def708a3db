"""gRPC with the clients that people have: every call, by tritonclient and by raw bytes."""

from __future__ import annotations

import asyncio
import functools
import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc")

import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

from onnx_dl.server.grpc.messages import HEALTH, message
from onnx_dl.server.v2.messages import RegionSlice
from onnx_dl.server.v2.operations import Operation
from tests.server.grpc_rig import Rig, code_of, listening, raw_request
from tests.support.waiting import DEADLINE, allowed, eventually


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with listening() as rig:
        yield rig


@pytest.fixture(scope="module")
def client(rig: Rig) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(rig.address) as client:
        assert client.is_server_live()  # connected before a test counts descriptors
        yield client


def an_input(array: np.ndarray[Any, Any], datatype: str = "FP32") -> triton.InferInput:
    tensor = triton.InferInput("x", list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return tensor


def test_health(client: triton.InferenceServerClient, rig: Rig) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("echo")
    assert client.is_model_ready("echo", "1")
    assert not client.is_model_ready("echo", "2")
    assert not client.is_model_ready("another")
    rig.server.is_ready = False
    try:
        assert client.is_server_live()
        assert not client.is_server_ready()
    finally:
        rig.server.is_ready = True


def test_metadata(client: triton.InferenceServerClient) -> None:
    server = client.get_server_metadata(as_json=True)
    assert server == {
        "name": "onnx-dl", "version": "1.2.3", "extensions": ["model_repository", "statistics"],
    }  # fmt: skip
    model = client.get_model_metadata("echo", as_json=True)
    assert model == {
        "name": "echo", "versions": ["1", "3"], "platform": "onnxruntime_onnx",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": ["-1"]}],
        "outputs": [{"name": "x", "datatype": "FP32", "shape": ["-1"]}],
    }  # fmt: skip
    assert client.get_model_metadata("echo", "1").versions == ["1"]
    with pytest.raises(InferenceServerException, match="Request for unknown model") as caught:
        client.get_model_metadata("another")
    assert caught.value.status() == "StatusCode.NOT_FOUND"


def test_configuration(client: triton.InferenceServerClient) -> None:
    config = client.get_model_config("echo").config
    assert (config.name, config.backend, config.version_policy.latest.num_versions) == (
        "echo",
        "onnxruntime",
        1,
    )
    assert [(x.name, x.data_type, list(x.dims), x.optional) for x in config.input] == [("x", 11, [-1], True)]
    assert config.instance_group[0].kind == config.instance_group[0].KIND_CPU
    assert config.parameters["onnx_dl.ttl"].string_value == "5m"


def test_statistics(client: triton.InferenceServerClient) -> None:
    (stats,) = client.get_inference_statistics("echo").model_stats
    assert (stats.name, stats.version, stats.inference_count, stats.execution_count) == ("echo", "3", 5, 4)
    assert stats.last_inference == 1_700_000_000_000
    assert (stats.inference_stats.success.count, stats.inference_stats.success.ns) == (4, 4000)
    assert stats.inference_stats.fail.count == 1


def test_repository(client: triton.InferenceServerClient, rig: Rig) -> None:
    index = client.get_model_repository_index()
    assert [(m.name, m.version, m.state, m.reason) for m in index.models] == [
        ("echo", "3", "READY", ""), ("gone", "1", "UNAVAILABLE", "unloaded"),
    ]  # fmt: skip
    ready = rig.unary(
        "RepositoryIndex", message("inference.RepositoryIndexRequest")(ready=True).SerializeToString()
    )
    (only,) = message("inference.RepositoryIndexResponse").FromString(ready).models
    assert only.name == "echo"
    client.load_model("echo", config='{"max_batch_size":"16"}', files={"file:1/model.onnx": b"\x00\x01"})
    client.unload_model("echo", unload_dependents=True)
    assert rig.server.control.asked[-2:] == [
        ("load", "echo", {"config": '{"max_batch_size":"16"}', "file:1/model.onnx": b"\x00\x01"}),
        ("unload", "echo", {"unload_dependents": True}),
    ]
    with pytest.raises(InferenceServerException, match="failed to load 'unknown'"):
        client.load_model("unknown")
    data = message("inference.RepositoryModelLoadRequest")(repository_name="r", model_name="echo")
    with pytest.raises(grpc.RpcError) as caught:
        rig.unary("RepositoryModelLoad", data.SerializeToString())
    assert code_of(caught.value) == "UNIMPLEMENTED"


def test_system_shared_memory(client: triton.InferenceServerClient) -> None:
    client.register_system_shared_memory("r", "/key", 4096, offset=64)
    region = client.get_system_shared_memory_status("r").regions["r"]
    assert (region.name, region.key, region.offset, region.byte_size) == ("r", "/key", 64, 4096)
    with pytest.raises(InferenceServerException, match="already in manager"):
        client.register_system_shared_memory("r", "/key", 4096)
    client.unregister_system_shared_memory("r")
    client.unregister_system_shared_memory("r")
    with pytest.raises(InferenceServerException, match="Unable to find"):
        client.get_system_shared_memory_status("r")
    client.register_system_shared_memory("r", "/key", 4096)
    client.unregister_system_shared_memory()
    assert not client.get_system_shared_memory_status().regions


def test_cuda_shared_memory_is_refused(client: triton.InferenceServerClient) -> None:
    assert not client.get_cuda_shared_memory_status().regions
    client.unregister_cuda_shared_memory()
    with pytest.raises(InferenceServerException, match="does not support CUDA") as caught:
        client.register_cuda_shared_memory("r", b"aGFuZGxl", 0, 64)
    assert caught.value.status() == "StatusCode.UNIMPLEMENTED"
    with pytest.raises(InferenceServerException, match="Unable to find"):
        client.get_cuda_shared_memory_status("r")


def test_settings_are_answered_and_not_changed(client: triton.InferenceServerClient) -> None:
    trace = client.get_trace_settings()
    assert list(trace.settings["trace_level"].value) == ["OFF"]
    assert client.get_trace_settings("echo") == trace
    logging = client.get_log_settings()
    assert logging.settings["log_info"].bool_param is True
    assert logging.settings["log_verbose_level"].WhichOneof("parameter_choice") == "uint32_param"
    with pytest.raises(InferenceServerException, match="cannot be changed") as caught:
        client.update_trace_settings(settings={"trace_level": ["TIMESTAMPS"]})
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    with pytest.raises(InferenceServerException, match="cannot be changed"):
        client.update_log_settings({"log_verbose_level": 1})
    with pytest.raises(InferenceServerException, match="Request for unknown model"):
        client.get_trace_settings("another")


@pytest.mark.parametrize("size", [3, 20_000, 2_000_000])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_infer(client: triton.InferenceServerClient, size: int, compression: str | None) -> None:
    array = np.arange(size, dtype=np.float32).reshape(1, size)
    result = client.infer("echo", [an_input(array)], request_id="é7", compression_algorithm=compression)
    np.testing.assert_array_equal(result.as_numpy("x"), array)
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == ("é7", "echo", "3")


@pytest.mark.parametrize(
    ("datatype", "array"),
    [
        ("BOOL", np.array([True, False])), ("INT8", np.int8([-1])), ("UINT16", np.uint16([7, 8])),
        ("INT64", np.int64([-(1 << 60)])), ("FP16", np.float16([[1.5]])), ("FP64", np.zeros((0, 3))),
        ("BYTES", np.array([b"", "né".encode()], object)),
    ],
)  # fmt: skip
def test_datatypes(client: triton.InferenceServerClient, datatype: str, array: np.ndarray[Any, Any]) -> None:
    result = client.infer("echo", [an_input(array, datatype)]).as_numpy("x")
    np.testing.assert_array_equal(result, array)
    assert result.shape == array.shape


def test_version_parameters_and_regions_reach_the_inference(
    client: triton.InferenceServerClient, rig: Rig
) -> None:
    rig.server.inference.regions["r"] = bytearray(np.float32([1, 2, 3, 4]).tobytes())
    tensor = triton.InferInput("x", [2], "FP32")
    tensor.set_shared_memory("r", 8, offset=8)
    output = triton.InferRequestedOutput("x")
    output.set_shared_memory("r", 8)
    result = client.infer(
        "echo",
        [tensor],
        model_version="1",
        outputs=[output],
        timeout=5_000_000,
        priority=3,
        parameters={"a": 1},
    )
    assert result.get_response().model_version == "1"
    assert list(result.get_response().raw_output_contents) == [b""]
    request = rig.server.inference.requests[-1]
    assert request.parameters == {"timeout": 5_000_000, "priority": 3, "a": 1}
    assert request.outputs[0].region == RegionSlice("r", 0, 8)
    assert rig.server.inference.regions["r"][:8] == np.float32([3, 4]).tobytes()


def test_sizes_of_messages_are_noted(rig: Rig) -> None:
    request = raw_request(np.zeros((1, 1000), np.float32))
    answer = rig.unary("ModelInfer", request)
    assert rig.server.inference.sizes[-2:] == [len(request), len(answer)]


def test_failures_have_codes_and_texts(client: triton.InferenceServerClient, rig: Rig) -> None:
    tensor = an_input(np.float32([1]))
    with pytest.raises(InferenceServerException, match="Request for unknown model") as caught:
        client.infer("another", [tensor])
    assert caught.value.status() == "StatusCode.NOT_FOUND"
    with pytest.raises(InferenceServerException, match="it broke") as caught:
        client.infer("echo", [tensor], parameters={"fail": "it broke"})
    assert caught.value.status() == "StatusCode.INTERNAL"
    with pytest.raises(grpc.RpcError) as refused:
        rig.unary("ModelInfer", raw_request(busy=True))
    assert code_of(refused.value) == "RESOURCE_EXHAUSTED"
    assert ("grpc-retry-pushback-ms", "2500") in refused.value.trailing_metadata()
    long = "x" * 100_000
    with pytest.raises(InferenceServerException, match=r"xxx \.\.\."):
        client.infer("echo", [tensor], parameters={"fail": long})


def test_faults_of_ours_are_internal_and_go_on(
    client: triton.InferenceServerClient, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InferenceServerException, match="ModelInfer failed: ZeroDivisionError") as caught:
        client.infer("echo", [an_input(np.float32([1]))], parameters={"crash": True})
    assert caught.value.status() == "StatusCode.INTERNAL"
    assert "a fault of ours" in caplog.text  # the traceback is ours to read
    assert client.is_server_live()


def test_callbacks(client: triton.InferenceServerClient) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    for index in range(20):
        client.async_infer(
            "echo",
            [an_input(np.float32([index]))],
            functools.partial(lambda index, result, error: answers.put((index, error or result)), index),
        )
    got = dict(answers.get(timeout=allowed(DEADLINE)) for _ in range(20))
    assert {index: result.as_numpy("x")[0] for index, result in got.items()} == {n: n for n in range(20)}


def test_many_threads(rig: Rig) -> None:
    data = [raw_request(np.full(index * 3000, index, np.float32)) for index in range(16)]

    def one(index: int) -> bool:
        return all(len(rig.unary("ModelInfer", data[index])) >= index * 12_000 for _ in range(10))

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(16)))
    eventually(lambda: rig.places.taken == 0, "places that are free")
    assert rig.places.unsent == 0


def test_asyncio(rig: Rig) -> None:
    async def calls() -> None:
        async with triton_aio.InferenceServerClient(rig.address) as client:
            assert await client.is_server_ready()
            assert (await client.get_server_metadata()).name == "onnx-dl"
            arrays = [np.float32([index, 1]) for index in range(10)]
            results = await asyncio.gather(*(client.infer("echo", [an_input(array)]) for array in arrays))
            for array, result in zip(arrays, results, strict=True):
                np.testing.assert_array_equal(result.as_numpy("x"), array)

            async def requests() -> Any:
                for index in range(5):
                    yield {
                        "model_name": "echo" if index != 2 else "another",
                        "inputs": [an_input(arrays[index])],
                    }

            got = [
                error or result.as_numpy("x")[0] async for result, error in client.stream_infer(requests())
            ]
            assert got[:2] + got[3:] == [0, 1, 3, 4]
            assert "Request for unknown model" in str(got[2])

    asyncio.run(asyncio.wait_for(calls(), allowed(DEADLINE)))


def test_the_caller_is_known(rig: Rig) -> None:
    rig.unary("ModelInfer", raw_request(), metadata=(("authorization", "Bearer t"),))
    operation, caller = rig.server.access.callers[-1]
    assert (operation, caller.authorization, caller.is_loopback, caller.certificate) == (
        Operation.INFER, "Bearer t", True, None,
    )  # fmt: skip


def health_check(rig: Rig, service: str) -> str:
    request = message("grpc.health.v1.HealthCheckRequest")(service=service)
    answer = rig.channel.unary_unary(f"/{HEALTH}/Check")(
        request.SerializeToString(), timeout=allowed(DEADLINE)
    )
    return status_of(answer)


def status_of(answer: bytes) -> str:
    kind = message("grpc.health.v1.HealthCheckResponse")
    return str(kind.ServingStatus.Name(kind.FromString(answer).status))


def test_the_health_of_grpc(rig: Rig) -> None:
    assert health_check(rig, "") == health_check(rig, "inference.GRPCInferenceService") == "SERVING"
    with pytest.raises(grpc.RpcError) as caught:
        health_check(rig, "another")
    assert code_of(caught.value) == "NOT_FOUND"


def test_watchers_of_the_health_hear_each_change(rig: Rig) -> None:
    request = message("grpc.health.v1.HealthCheckRequest")().SerializeToString()
    watching = rig.channel.unary_stream(f"/{HEALTH}/Watch")(request, timeout=allowed(DEADLINE))
    assert status_of(next(watching)) == "SERVING"
    rig.server.is_ready = False
    try:
        assert status_of(next(watching)) == "NOT_SERVING"
    finally:
        rig.server.is_ready = True
    assert status_of(next(watching)) == "SERVING"
    watching.cancel()
    unknown = message("grpc.health.v1.HealthCheckRequest")(service="another").SerializeToString()
    watching = rig.channel.unary_stream(f"/{HEALTH}/Watch")(unknown, timeout=allowed(DEADLINE))
    assert status_of(next(watching)) == "SERVICE_UNKNOWN"
    watching.cancel()
