"""What is called, in this order; each step is called with all four clients in turn.

A step returns plain data, or raises the client's exception.  Steps leave the server as they found it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import tritonclient.utils.shared_memory as shm

from tests.server.conformance.clients import Kit
from tests.server.conformance.models import TYPES
from tests.server.conformance.plain import post

Step = Callable[[Kit], Any]
STEPS: Final[dict[str, Step]] = {}


def step(function: Step) -> Step:
    STEPS[function.__name__.replace("_", " ")] = function
    return function


def _row(first: int = 0, rows: int = 1) -> np.ndarray:
    return np.arange(first, first + 16 * rows, dtype=np.int32).reshape(rows, 16)


def _pair(kit: Kit, rows: int = 1, **binary: bool) -> list[Any]:
    return [kit.input(f"INPUT{i}", _row(10 * i, rows), "INT32", **binary) for i in range(2)]


# --- health, metadata, configuration, statistics ------------------------------------------------------------


@step
def server_is_live(kit: Kit) -> Any:
    return kit.call("is_server_live")


@step
def server_is_ready(kit: Kit) -> Any:
    return kit.call("is_server_ready")


@step
def server_metadata(kit: Kit) -> Any:
    return kit.call("get_server_metadata")


@step
def model_is_ready(kit: Kit) -> Any:
    asked = [
        ("simple",),
        ("simple", "1"),
        ("versions", "1"),
        ("versions", "3"),
        ("versions", "2"),
        ("unknown",),
    ]
    return [kit.call("is_model_ready", *one) for one in asked]


@step
def model_metadata(kit: Kit) -> Any:
    return [kit.call("get_model_metadata", name) for name in ("simple", "versions", "types", "text")]


@step
def model_metadata_of_a_version(kit: Kit) -> Any:
    return kit.call("get_model_metadata", "versions", "1")


@step
def model_metadata_of_an_unknown_model(kit: Kit) -> Any:
    return kit.call("get_model_metadata", "unknown")


@step
def model_metadata_of_an_unknown_version(kit: Kit) -> Any:
    return kit.call("get_model_metadata", "versions", "2")


@step
def model_metadata_of_a_version_that_is_no_number(kit: Kit) -> Any:
    return kit.call("get_model_metadata", "versions", "first")


@step
def model_config(kit: Kit) -> Any:
    return kit.call("get_model_config", "simple")


@step
def model_config_of_an_unknown_model(kit: Kit) -> Any:
    return kit.call("get_model_config", "unknown")


@step
def statistics_of_a_model(kit: Kit) -> Any:
    kit.infer("simple", _pair(kit))
    return kit.call("get_inference_statistics", "simple")


@step
def statistics_of_all_models(kit: Kit) -> Any:
    found = kit.call("get_inference_statistics")
    return sorted((one["name"], one["version"]) for one in found["model_stats"])


@step
def statistics_count_rows_and_failures(kit: Kit) -> Any:
    def counts() -> tuple[int, int, int, int]:
        (one,) = kit.call("get_inference_statistics", "simple")["model_stats"]
        inferred, executed = one.get("inference_count", 0), one.get("execution_count", 0)
        stats = one["inference_stats"]
        counted = [int(stats.get(which, {}).get("count", 0)) for which in ("success", "fail")]
        return (int(inferred), int(executed), counted[0], counted[1])

    before = counts()
    kit.infer("simple", _pair(kit, 3))
    return [after - was for after, was in zip(counts(), before, strict=True)]


@step
def statistics_of_an_unknown_model(kit: Kit) -> Any:
    return kit.call("get_inference_statistics", "unknown")


# --- inference ----------------------------------------------------------------------------------------------


@step
def infer(kit: Kit) -> Any:
    return kit.infer("simple", _pair(kit))


@step
def infer_with_an_id(kit: Kit) -> Any:
    return kit.infer("simple", _pair(kit), request_id="my request")


@step
def infer_a_version(kit: Kit) -> Any:
    return [kit.infer("versions", _pair(kit), model_version=version) for version in ("1", "3", "")]


@step
def infer_some_outputs(kit: Kit) -> Any:
    return kit.infer("simple", _pair(kit), outputs=[kit.output("OUTPUT1")])


@step
def infer_a_batch(kit: Kit) -> Any:
    return kit.infer("simple", _pair(kit, 8))


@step
def infer_text(kit: Kit) -> Any:
    rows = np.array([["a"], ["ä β 漢"], [""]], dtype=np.object_)
    return kit.infer("text", [kit.input("INPUT", rows, "BYTES")])


def _values(datatype: str, shape: tuple[int, int]) -> np.ndarray:
    count = shape[0] * shape[1]
    if datatype == "BYTES":
        return np.array([f"t{i}" for i in range(count)], dtype=np.object_).reshape(shape)
    if datatype == "BOOL":
        return (np.arange(count) % 2 == 0).reshape(shape)
    kind = {"FP16": "float16", "FP32": "float32", "FP64": "float64"}.get(datatype, datatype.lower())
    values = np.arange(count, dtype=kind).reshape(shape)
    if np.issubdtype(values.dtype, np.integer):
        values.flat[-1:] = np.iinfo(values.dtype).max
        values.flat[:1] = np.iinfo(values.dtype).min
    return values


@step
def infer_all_datatypes(kit: Kit) -> Any:
    inputs = [kit.input(f"x_{name}", _values(name, (2, 3)), name) for name in TYPES]
    return kit.infer("types", inputs)


@step
def infer_empty_tensors(kit: Kit) -> Any:
    inputs = [kit.input(f"x_{name}", _values(name, (0, 3)), name) for name in TYPES]
    return kit.infer("types", inputs)


@step
def infer_json(kit: Kit) -> Any:
    if not kit.is_http:
        return None
    outputs = [kit.output(f"OUTPUT{i}", binary_data=False) for i in range(2)]
    return kit.infer("simple", _pair(kit, binary_data=False), outputs=outputs)


@step
def infer_json_and_binary_mixed(kit: Kit) -> Any:
    if not kit.is_http:
        return None
    inputs = [kit.input(f"INPUT{i}", _row(i), "INT32", binary_data=bool(i)) for i in range(2)]
    outputs = [kit.output("OUTPUT1", binary_data=False), kit.output("OUTPUT0", binary_data=True)]
    return kit.infer("simple", inputs, outputs=outputs)


@step
def infer_compressed(kit: Kit) -> Any:
    if not kit.is_http:
        return [kit.infer("simple", _pair(kit), compression_algorithm=how) for how in ("gzip", "deflate")]
    return [
        kit.infer("simple", _pair(kit), request_compression_algorithm=how, response_compression_algorithm=how)
        for how in ("gzip", "deflate")
    ]


@step
def infer_in_the_background(kit: Kit) -> Any:
    return None if kit.is_async else kit.async_infer("simple", _pair(kit))


@step
def infer_over_a_stream(kit: Kit) -> Any:
    return None if kit.is_http else kit.streamed("simple", _pair(kit), 3)


@step
def infer_an_error_over_a_stream(kit: Kit) -> Any:
    return None if kit.is_http else ["error" in one for one in kit.streamed("unknown", _pair(kit), 2)]


@step
def infer_by_a_body_that_the_client_makes(kit: Kit) -> Any:
    if not kit.is_http:
        return None
    kit.used |= {"generate_request_body", "parse_response_body"}
    kind = type(kit.client)
    body, length = kind.generate_request_body(_pair(kit))
    head = {} if length is None else {"Inference-Header-Content-Length": str(length)}
    status, headers, answer = post(kit.address, "/v2/models/simple/infer", body, head)
    length = headers.get("Inference-Header-Content-Length")
    result = kind.parse_response_body(answer, header_length=None if length is None else int(length))
    return [status, kit.told(result)]


@step
def infer_with_a_plugin(kit: Kit) -> Any:
    kit.used |= {"register_plugin", "unregister_plugin", "plugin"}
    kit.client.register_plugin(
        importlib.import_module(f"tritonclient.{kit.kind}.auth").BasicAuth("me", "word")
    )
    assert kit.client.plugin() is not None
    try:
        return kit.infer("simple", _pair(kit))
    finally:
        kit.client.unregister_plugin()


# --- mistakes -----------------------------------------------------------------------------------------------


@step
def infer_an_unknown_model(kit: Kit) -> Any:
    return kit.infer("unknown", _pair(kit))


@step
def infer_an_unknown_version(kit: Kit) -> Any:
    return kit.infer("versions", _pair(kit), model_version="2")


@step
def infer_without_an_input(kit: Kit) -> Any:
    return kit.infer("simple", _pair(kit)[:1])


@step
def infer_with_an_input_too_many(kit: Kit) -> Any:
    return kit.infer("simple", [*_pair(kit), kit.input("INPUT2", _row(), "INT32")])


@step
def infer_with_an_input_twice(kit: Kit) -> Any:
    return kit.infer("simple", [_pair(kit)[0]] * 2)


@step
def infer_with_an_unknown_input(kit: Kit) -> Any:
    return kit.infer("simple", [_pair(kit)[0], kit.input("OTHER", _row(), "INT32")])


@step
def infer_an_unknown_output(kit: Kit) -> Any:
    return kit.infer("simple", _pair(kit), outputs=[kit.output("OUTPUT2")])


@step
def infer_another_datatype(kit: Kit) -> Any:
    inputs = [kit.input(f"INPUT{i}", _row().astype(np.float32), "FP32") for i in range(2)]
    return kit.infer("simple", inputs)


@step
def infer_another_shape(kit: Kit) -> Any:
    return kit.infer("simple", [kit.input(f"INPUT{i}", _row()[:, :8], "INT32") for i in range(2)])


@step
def infer_another_number_of_dimensions(kit: Kit) -> Any:
    return kit.infer("simple", [kit.input(f"INPUT{i}", _row()[0], "INT32") for i in range(2)])


@step
def infer_too_many_rows(kit: Kit) -> Any:
    return kit.infer("simple", _pair(kit, 9))


@step
def infer_less_data_than_the_shape_says(kit: Kit) -> Any:
    inputs = _pair(kit)
    if kit.is_http:
        inputs[0]._raw_data = inputs[0]._raw_data[:-4]
        inputs[0]._parameters["binary_data_size"] -= 4
    else:
        inputs[0]._raw_content = inputs[0]._raw_content[:-4]
    return kit.infer("simple", inputs)


@step
def infer_a_huge_shape(kit: Kit) -> Any:
    inputs = _pair(kit)
    inputs[0].set_shape([8, 2**40])
    return kit.infer("simple", inputs)


# --- repository ---------------------------------------------------------------------------------------------


def _index(kit: Kit) -> list[dict[str, Any]]:
    found = kit.call("get_model_repository_index")
    rows = found if isinstance(found, list) else found.get("models", [])
    return sorted(rows, key=lambda row: (row["name"], row.get("version", "")))


@step
def index(kit: Kit) -> Any:
    return _index(kit)


@step
def unload_and_load(kit: Kit) -> Any:
    told: list[Any] = [kit.call("unload_model", "text"), kit.call("is_server_ready")]
    told += [kit.call("is_model_ready", "text"), kit.call("load_model", "text")]
    told += [kit.call("is_model_ready", "text"), [row for row in _index(kit) if row["name"] == "text"]]
    return told


@contextmanager
def _unloaded(kit: Kit) -> Iterator[None]:
    kit.call("unload_model", "text")
    try:
        yield
    finally:
        kit.call("load_model", "text")


@step
def metadata_of_an_unloaded_model(kit: Kit) -> Any:
    with _unloaded(kit):
        return kit.call("get_model_metadata", "text")


@step
def infer_an_unloaded_model(kit: Kit) -> Any:
    with _unloaded(kit):
        return kit.infer("text", [kit.input("INPUT", np.array([["a"]], np.object_), "BYTES")])


@step
def load_a_loaded_model(kit: Kit) -> Any:
    return [kit.call("load_model", "simple"), kit.call("is_model_ready", "simple")]


@step
def load_an_unknown_model(kit: Kit) -> Any:
    return kit.call("load_model", "unknown")


@step
def load_a_broken_model(kit: Kit) -> Any:
    return kit.call("load_model", "broken")


@step
def unload_an_unknown_model(kit: Kit) -> Any:
    return kit.call("unload_model", "unknown")


# --- shared memory ------------------------------------------------------------------------------------------


@contextmanager
def _region(size: int) -> Iterator[tuple[str, Any]]:
    key = f"/conformance-{os.getpid()}"
    region = shm.create_shared_memory_region("local", key, size)
    try:
        yield key, region
    finally:
        shm.destroy_shared_memory_region(region)


@step
def shm_status_of_none(kit: Kit) -> Any:
    return kit.call("get_system_shared_memory_status")


@step
def shm_register_and_unregister(kit: Kit) -> Any:
    with _region(8192) as (key, _):
        told = [kit.call("register_system_shared_memory", "data", key, 128, offset=4096)]
        status = kit.call("get_system_shared_memory_status")
        rows = status if isinstance(status, list) else list(status["regions"].values())
        told.append([{**row, "key": "key"} for row in rows])
        told.append(kit.call("unregister_system_shared_memory", "data"))
        told.append(kit.call("get_system_shared_memory_status"))
        return told


@step
def shm_register_an_offset_within_a_page(kit: Kit) -> Any:
    with _region(256) as (key, _):
        try:
            return kit.call("register_system_shared_memory", "data", key, 128, offset=64)
        finally:
            kit.call("unregister_system_shared_memory", "data")


@step
def shm_infer(kit: Kit) -> Any:
    with _region(256) as (key, region):
        shm.set_shared_memory_region(region, [_row(), _row(10)])
        kit.call("register_system_shared_memory", "data", key, 256)
        try:
            inputs = [kit.base.InferInput(f"INPUT{i}", [1, 16], "INT32") for i in range(2)]
            outputs = [kit.output(f"OUTPUT{i}") for i in range(2)]
            for i in range(2):
                inputs[i].set_shared_memory("data", 64, offset=64 * i)
                outputs[i].set_shared_memory("data", 64, offset=128 + 64 * i)
            response = kit.response(kit.raw("infer", "simple", inputs, outputs=outputs))
            found = shm.get_contents_as_numpy(region, np.int32, [4, 16])
            return [response, found[2:].tolist()]
        finally:
            kit.call("unregister_system_shared_memory", "data")


@step
def shm_register_twice(kit: Kit) -> Any:
    with _region(256) as (key, _):
        kit.call("register_system_shared_memory", "data", key, 256)
        try:
            return kit.call("register_system_shared_memory", "data", key, 256)
        finally:
            kit.call("unregister_system_shared_memory", "data")


@step
def shm_register_a_key_that_is_not_there(kit: Kit) -> Any:
    return kit.call("register_system_shared_memory", "data", "/conformance-missing", 256)


@step
def shm_register_more_than_there_is(kit: Kit) -> Any:
    with _region(256) as (key, _):
        try:
            return kit.call("register_system_shared_memory", "data", key, 1 << 20)
        finally:
            kit.call("unregister_system_shared_memory", "data")


@step
def shm_unregister_an_unknown_region(kit: Kit) -> Any:
    return kit.call("unregister_system_shared_memory", "unknown")


@step
def shm_unregister_all(kit: Kit) -> Any:
    return kit.call("unregister_system_shared_memory")


@step
def shm_status_of_an_unknown_region(kit: Kit) -> Any:
    return kit.call("get_system_shared_memory_status", "unknown")


@step
def shm_infer_an_unknown_region(kit: Kit) -> Any:
    inputs = _pair(kit)
    inputs[0].set_shared_memory("unknown", 64)
    return kit.infer("simple", inputs)


@step
def shm_infer_beyond_a_region(kit: Kit) -> Any:
    with _region(256) as (key, _):
        kit.call("register_system_shared_memory", "data", key, 256)
        try:
            inputs = _pair(kit)
            inputs[0].set_shared_memory("data", 64, offset=224)
            return kit.infer("simple", inputs)
        finally:
            kit.call("unregister_system_shared_memory", "data")


@step
def shm_infer_an_output_that_is_larger_than_its_place(kit: Kit) -> Any:
    with _region(256) as (key, _):
        kit.call("register_system_shared_memory", "data", key, 256)
        try:
            outputs = [kit.output("OUTPUT0")]
            outputs[0].set_shared_memory("data", 32)
            return kit.infer("simple", _pair(kit), outputs=outputs)
        finally:
            kit.call("unregister_system_shared_memory", "data")


@step
def cuda_shm_status(kit: Kit) -> Any:
    return kit.call("get_cuda_shared_memory_status")


@step
def cuda_shm_register(kit: Kit) -> Any:
    return kit.call("register_cuda_shared_memory", "data", b"x" * 64, 0, 256)


@step
def cuda_shm_unregister(kit: Kit) -> Any:
    return kit.call("unregister_cuda_shared_memory")


# --- settings -----------------------------------------------------------------------------------------------


@step
def trace_settings(kit: Kit) -> Any:
    return kit.call("get_trace_settings")


@step
def trace_settings_of_a_model(kit: Kit) -> Any:
    return kit.call("get_trace_settings", "simple")


@step
def trace_settings_changed(kit: Kit) -> Any:
    return kit.call("update_trace_settings", settings={"trace_rate": "1000"})


@step
def log_settings(kit: Kit) -> Any:
    return kit.call("get_log_settings")


@step
def log_settings_changed(kit: Kit) -> Any:
    return kit.call("update_log_settings", {"log_verbose_level": 0})
