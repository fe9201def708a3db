"""HTTP as clients use it: Triton's client, sync and asyncio, and curl, against ``onnx-dl serve``."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tritonclient.http")
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from tests.server.http_models import TYPES, repository, values, x_of
from tests.server.raw_http import request
from tests.support.serving import Serving, serving
from tests.support.waiting import DEADLINE, allowed, eventually

SIZES = [(2, 3), (1, 1), (0, 4), (90, 60)]
KINDS = [kind for kind in TYPES if kind != "FP16"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    root = repository(tmp_path_factory.mktemp("repository"))
    with serving(
        "--repository", root, "--model-control", "explicit", "--load-model", "*", "--client-shm", "copy"
    ) as running:
        with triton.InferenceServerClient(running.http) as client:
            for name in ("identity", "spin", "typed"):
                eventually(lambda name=name: client.is_model_ready(name), f"the load of {name}")
        yield running


@pytest.fixture
def client(server: Serving) -> Iterator[Any]:
    with triton.InferenceServerClient(server.http) as made:
        yield made


def given(kind: str, array: np.ndarray, *, binary: bool = True) -> Any:
    """An input of ``typed``."""
    made = triton.InferInput(kind, list(array.shape), kind)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def wanted(name: str, *, binary: bool) -> Any:
    return triton.InferRequestedOutput(name, binary_data=binary)


def spin(turns: int) -> list[Any]:
    """The inputs of ``spin``."""
    state = triton.InferInput("x", [64, 64], "FP32")
    state.set_data_from_numpy(np.ones((64, 64), np.float32))
    number = triton.InferInput("n", [], "INT64")
    number.set_data_from_numpy(np.array(turns, np.int64))
    return [state, number]


def curl(server: Serving, path: str, *arguments: str) -> tuple[int, bytes]:
    """The status and the body of what curl gets."""
    command = ["curl", "-sS", "-m", str(allowed(DEADLINE)), "-w", "\n%{http_code}", *arguments]
    done = subprocess.run([*command, f"{server.url}/{path}"], capture_output=True, check=True)
    body, _, status = done.stdout.rpartition(b"\n")
    return int(status), body


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("in_binary", [True, False])
@pytest.mark.parametrize("out_binary", [True, False])
def test_every_datatype_comes_back(
    client: Any, size: tuple[int, int], in_binary: bool, out_binary: bool
) -> None:
    feed = {kind: values(kind, *size) for kind in TYPES}
    inputs = [given(kind, array, binary=in_binary or kind == "FP16") for kind, array in feed.items()]
    outputs = [wanted(f"{kind}_out", binary=out_binary or kind == "FP16") for kind in TYPES]
    result = client.infer("typed", inputs, outputs=outputs)
    for kind, array in feed.items():
        got = result.as_numpy(f"{kind}_out")
        assert got.shape == array.shape
        if kind == "BYTES":
            encoded = [item if isinstance(item, bytes) else item.encode() for item in got.ravel().tolist()]
            assert encoded == array.ravel().tolist()
        else:
            assert got.dtype == array.dtype and got.tobytes() == array.tobytes()


def test_outputs_of_both_forms_in_one_answer(client: Any) -> None:
    feed = {kind: values(kind, 3, 5) for kind in TYPES}
    inputs = [given(kind, array, binary=number % 2 == 0) for number, (kind, array) in enumerate(feed.items())
              if kind != "FP16"] + [given("FP16", feed["FP16"])]  # fmt: skip
    outputs = [
        wanted("FP64_out", binary=False),
        wanted("FP16_out", binary=True),
        wanted("INT8_out", binary=False),
    ]
    result = client.infer("typed", inputs, outputs=outputs, request_id="an id")
    assert [entry["name"] for entry in result.get_response()["outputs"]] == [
        "FP64_out",
        "FP16_out",
        "INT8_out",
    ]
    for kind in ("FP64", "FP16", "INT8"):
        assert result.as_numpy(f"{kind}_out").tobytes() == feed[kind].tobytes()
    assert result.get_response()["id"] == "an id"


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
@pytest.mark.parametrize("length", [5, 100_000])
def test_compressed_requests_and_answers(client: Any, algorithm: str, length: int) -> None:
    x = np.arange(length, dtype=np.float32)
    result = client.infer(
        "identity", x_of(x), request_compression_algorithm=algorithm, response_compression_algorithm=algorithm
    )
    assert np.array_equal(result.as_numpy("y"), x)


def test_large_tensors(client: Any) -> None:
    x = np.random.default_rng(0).standard_normal(16 << 20).astype(np.float32)
    for _ in range(2):
        assert np.array_equal(client.infer("identity", x_of(x)).as_numpy("y"), x)


def test_requests_side_by_side(server: Serving) -> None:
    with triton.InferenceServerClient(server.http, concurrency=8) as client:
        asked = [
            client.async_infer("identity", x_of(np.full(20_000, number, np.float32))) for number in range(40)
        ]
        for number, one in enumerate(asked):
            assert (one.get_result(timeout=allowed(DEADLINE)).as_numpy("y") == number).all()


def test_the_asyncio_client(server: Serving) -> None:
    async def use() -> None:
        async with triton_aio.InferenceServerClient(server.http) as client:
            assert await client.is_server_ready() and await client.is_model_ready("identity", "1")
            x = np.arange(30_000, dtype=np.float32)
            results = await asyncio.gather(
                *[client.infer("identity", x_of(x + number, binary=number != 3)) for number in range(8)]
            )
            for number, result in enumerate(results):
                assert np.array_equal(result.as_numpy("y"), x + number)
            with pytest.raises(InferenceServerException, match="unknown model"):
                await client.infer("nothing", x_of(x))

    asyncio.run(use())


def test_questions_about_server_and_models(client: Any) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("identity") and not client.is_model_ready("broken")
    assert not client.is_model_ready("identity", "7")
    assert client.get_server_metadata()["name"] == "onnx-dl"
    metadata = client.get_model_metadata("identity", "1")
    assert metadata["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1]}]
    assert client.get_model_config("identity")["input"][0]["name"] == "x"
    rows = {row["name"]: row for row in client.get_model_repository_index()}
    assert rows["identity"]["state"] == "READY" and rows["broken"]["reason"]
    assert client.get_trace_settings()["trace_level"] == ["OFF"] and client.get_log_settings()["log_info"]
    assert client.get_cuda_shared_memory_status() == []


def test_statistics_have_what_was_answered(client: Any) -> None:
    def counts() -> dict[str, Any]:
        (found,) = client.get_inference_statistics("identity")["model_stats"]
        return {"runs": found["execution_count"], "failed": found["inference_stats"]["fail"]["count"]}

    before = counts()
    for _ in range(3):
        client.infer("identity", x_of(np.zeros(3, np.float32)))
    with pytest.raises(InferenceServerException):
        client.infer("identity", [given("FP32", np.zeros((1, 1), np.float32))])
    assert counts() == {"runs": before["runs"] + 3, "failed": before["failed"] + 1}


def test_models_are_loaded_and_unloaded(client: Any) -> None:
    client.unload_model("spin")
    assert not client.is_model_ready("spin") and client.is_server_ready()
    with pytest.raises(InferenceServerException, match="unknown model"):
        client.infer("spin", spin(1))
    client.load_model("spin")
    assert client.is_model_ready("spin")
    assert client.infer("spin", spin(1)).as_numpy("y").shape == (64, 64)
    with pytest.raises(InferenceServerException, match="failed to load"):
        client.load_model("nothing")


def test_shared_memory(client: Any) -> None:
    x = np.arange(50_000, dtype=np.float32)
    key = f"odl_http_{os.getpid()}"
    # By hand: the client's own functions start a process of Python's that stays.
    path = Path("/dev/shm") / key
    path.write_bytes(x.tobytes() + bytes(x.nbytes))
    path.chmod(0o600)
    try:
        client.register_system_shared_memory("region", f"/{key}", 2 * x.nbytes)
        assert [row["name"] for row in client.get_system_shared_memory_status()] == ["region"]
        source = triton.InferInput("x", [x.size], "FP32")
        source.set_shared_memory("region", x.nbytes)
        place = triton.InferRequestedOutput("y", binary_data=True)
        place.set_shared_memory("region", x.nbytes, offset=x.nbytes)
        result = client.infer("identity", [source], outputs=[place])
        assert "parameters" not in result.get_output("y") and "data" not in result.get_output("y")
        assert np.array_equal(np.frombuffer(path.read_bytes(), np.float32)[x.size :], x)
        client.unregister_system_shared_memory("region")
        assert client.get_system_shared_memory_status() == []
        with pytest.raises(InferenceServerException, match="region"):
            client.infer("identity", [source])
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"shape": [1 << 20, 1 << 20]}, "shape"),
        ({"shape": [1 << 40]}, "items"),
        ({"shape": [-1]}, "negative"),
        ({"shape": [2, 1]}, "shape"),
        ({"datatype": "FP64"}, "data-type"),
        ({"datatype": "FLOAT"}, "data-type"),
        ({"name": "z"}, "unexpected"),
        ({"data": [1, "2"]}, "numbers"),
        ({"data": [1, True]}, "numbers"),
        ({"data": [[1], 2]}, "lists"),
        ({"data": [1, None]}, "numbers"),
        ({"data": [1, 1e300]}, "range"),
        ({"data": [1, 2, 3]}, "items"),
    ],
)
def test_a_mistake_is_told_and_the_server_goes_on(
    server: Serving, change: dict[str, Any], sentence: str
) -> None:
    tensor = {"name": "x", "shape": [2], "datatype": "FP32", "data": [1, 2], **change}
    status, body = curl(server, "v2/models/identity/infer", "-d", json.dumps({"inputs": [tensor]}))
    assert status == 400 and sentence in json.loads(body)["error"]
    assert curl(server, "v2/health/ready")[0] == 200


def test_what_json_lacks_is_refused_with_the_way_out(client: Any) -> None:
    x = np.array([1, np.nan, np.inf], np.float32)
    with pytest.raises(InferenceServerException, match="binary_data"):
        client.infer("identity", x_of(x), outputs=[wanted("y", binary=False)])
    got = client.infer("identity", x_of(x), outputs=[wanted("y", binary=True)]).as_numpy("y")
    assert got.tobytes() == x.tobytes()


def test_curl_with_json_text_and_a_body_that_waits_to_continue(server: Serving, tmp_path: Path) -> None:
    tensor = {"name": "x", "shape": [3], "datatype": "FP32", "data": [0.1, 2, -3e-5]}
    status, body = curl(server, "v2/models/identity/versions/1/infer", "-d", json.dumps({"inputs": [tensor]}))
    assert status == 200
    assert np.array_equal(
        np.array(json.loads(body)["outputs"][0]["data"], np.float32), np.array([0.1, 2, -3e-5], np.float32)
    )
    array = np.random.default_rng(1).standard_normal(500_000).astype(np.float32)
    text = json.dumps(
        {
            "inputs": [{"name": "x", "shape": [array.size], "datatype": "FP32",
                        "parameters": {"binary_data_size": array.nbytes}}],
            "parameters": {"binary_data_output": True},
        }
    ).encode()  # fmt: skip
    (tmp_path / "body").write_bytes(text + array.tobytes())
    arguments = (
        "--data-binary", f"@{tmp_path / 'body'}", "-H", f"Inference-Header-Content-Length: {len(text)}",
        "-H", "Expect: 100-continue",
    )  # fmt: skip
    for more in ((), ("-H", "Transfer-Encoding: chunked")):
        status, body = curl(server, "v2/models/identity/infer", *arguments, *more)
        assert status == 200 and body.endswith(array.tobytes())


def test_a_raw_request_is_the_bytes_of_the_input(server: Serving, tmp_path: Path) -> None:
    array = np.arange(7, dtype=np.float32)
    (tmp_path / "raw").write_bytes(array.tobytes())
    arguments = ("--data-binary", f"@{tmp_path / 'raw'}", "-H", "Inference-Header-Content-Length: 0")
    status, body = curl(server, "v2/models/identity/infer", *arguments)
    assert status == 200 and body.endswith(array.tobytes())
    status, body = curl(server, "v2/models/typed/infer", *arguments)
    assert status == 400 and b"inputs" in body


def test_metrics_and_the_state_of_a_model(server: Serving, client: Any) -> None:
    client.infer("identity", x_of(np.zeros(3, np.float32)))
    status, text = curl(server, "metrics")
    assert status == 200 and b'nv_inference_request_success{model="identity",version="1"}' in text
    status, body = curl(server, "v2/onnx_dl/models/identity")
    assert status == 200 and json.loads(body)["pid"]
    assert curl(server, "v2/onnx_dl/models/nothing")[0] == 404


def test_time_that_passes_is_408(server: Serving, client: Any) -> None:
    client.infer("spin", spin(1))
    with pytest.raises(InferenceServerException) as caught:
        client.infer("spin", spin(100_000_000), timeout=200_000)
    assert caught.value.status() == "408"
    with pytest.raises(InferenceServerException) as caught:
        client.infer("spin", spin(100_000_000), headers={"X-Request-Timeout-Ms": "200"})
    assert caught.value.status() == "408"
    client.infer("spin", spin(1))


def test_who_closes_ends_the_run_in_the_worker(server: Serving, client: Any) -> None:
    client.infer("spin", spin(1))
    body, length = triton.InferenceServerClient.generate_request_body(spin(1_000_000_000))
    sent = request("/v2/models/spin/infer", "POST", body, Inference_Header_Content_Length=length)
    host, _, port = server.http.partition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(sent)
        eventually(lambda: pending(client, "spin") == 1, "a run")
    eventually(lambda: pending(client, "spin") == 0, "the end of the run")
    client.infer("spin", spin(1))


def pending(client: Any, name: str) -> float:
    """Requests of a model that wait or run, by the metrics."""
    text = client._get("metrics", None, None).read().decode()
    prefix = f'nv_inference_pending_request_count{{model="{name}"'
    return float(next(line for line in text.splitlines() if line.startswith(prefix)).split()[-1])


def test_the_server_is_a_page_of_no_other_site(server: Serving) -> None:
    assert curl(server, "v2", "-H", "Host: evil.example")[0] == 421
    assert curl(server, "v2", "-H", "Origin: http://evil.example")[0] == 403
    assert curl(server, "v2")[0] == 200
