"""Inputs and outputs in clients' shared memory, and memory that is given back after large requests."""

from __future__ import annotations

import asyncio
import gc
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_dl.client import connection, model_table
from onnx_dl.server.v2 import datatypes, text
from onnx_dl.server.v2.failures import RequestFailure
from onnx_dl.server.v2.messages import InferRequest, InferResponse, InputTensor, RegionSlice
from tests.conftest import _belongings as belongings
from tests.conftest import _left as left
from tests.support import inference_rig as rigs
from tests.support.inference_rig import InferenceRig, only, request, tensor, until
from tests.support.waiting import DEADLINE, allowed, eventually

Infer = Callable[[InferRequest], InferResponse]
SIZE = 1 << 20
BEGIN = 4096
"""Byte of the file at which the region begins."""
KEY = f"/odl-test-{os.getpid()}"


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> None:
    """In place of the count after each test: the host is the module's, which ends by that count."""


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceRig]:
    before = belongings()
    with rigs.inference_rig(tmp_path_factory.mktemp("models")) as rig:
        for datatype in ("FP32", "INT64", "BOOL", "FP16", "BF16", "BYTES"):
            ends = {"x": (datatype, (-1, -1))}
            rig.serve(f"echo{datatype}", rigs.echo(datatype), inputs=ends, outputs={"y": ends["x"]})
        yield rig
    eventually(lambda: gc.collect() >= 0 and not left(before), "the end of all")


@pytest.fixture
def shared(rig: InferenceRig) -> Iterator[memoryview]:
    """The bytes of a region called "r", as its client sees them."""
    path = Path("/dev/shm") / KEY[1:]
    path.write_bytes(bytes(BEGIN + SIZE))
    try:
        rig.regions.register("r", KEY, BEGIN, SIZE)
        with path.open("r+b") as file, mmap.mmap(file.fileno(), BEGIN + SIZE) as mapped:
            view = memoryview(mapped)[BEGIN:]
            yield view
            view.release()
    finally:
        rig.regions.unregister("r")
        path.unlink()
    assert rig.regions.status(None) == []


@pytest.fixture(params=["thread", "coroutine"])
def infer(request: pytest.FixtureRequest, rig: InferenceRig) -> Infer:
    if request.param == "thread":
        return rig.infer
    return lambda wanted: asyncio.run(rig.executor.infer(wanted))


def filled(datatype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    count = int(np.prod(shape))
    if datatype == "BYTES":
        array = np.empty(count, object)
        array[:] = ["é" * (n % 5) for n in range(count)]
        return array.reshape(shape)
    dtype = np.dtype(np.uint16 if datatype == "BF16" else datatypes.to_numpy(datatype))
    return (np.arange(count) % 2).astype(dtype).reshape(shape)


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (100, 200)])
@pytest.mark.parametrize("datatype", ["FP32", "INT64", "BOOL", "FP16", "BF16", "BYTES"])
def test_inputs_and_outputs_in_a_region(
    rig: InferenceRig, infer: Infer, shared: memoryview, datatype: str, shape: tuple[int, ...]
) -> None:
    sent = filled(datatype, shape)
    data = rigs.binary(sent)
    shared[64 : 64 + len(data)] = data
    middle = SIZE // 2
    place = RegionSlice("r", middle, SIZE - middle)
    wanted = request(
        f"echo{datatype}",
        InputTensor("x", datatype, shape, RegionSlice("r", 64, len(data))),
        outputs={"y": place},
    )
    for _ in range(2):
        shared[middle : middle + len(data)] = b"\xaa" * len(data)
        output = only(infer(wanted))
        assert (output.name, output.datatype, output.shape) == ("y", datatype, shape)
        assert output.array is None
        assert output.region == place
        assert bytes(shared[middle : middle + len(data)]) == data
        assert not any(shared[middle + len(data) : middle + len(data) + 64])
    # Mixed: the input in the region, the output in the answer, and the other way round.
    array = only(infer(request(f"echo{datatype}", wanted.inputs[0]))).array
    assert array is not None
    assert np.array_equal(array, sent)
    shared[middle : middle + len(data)] = bytes(len(data))
    infer(request(f"echo{datatype}", tensor("x", datatype, sent), outputs={"y": place}))
    assert bytes(shared[middle : middle + len(data)]) == data


@pytest.mark.parametrize(
    ("datatype", "where", "http"),
    [
        ("FP32", RegionSlice("gone", 0, 24), 404),
        ("FP32", RegionSlice("r", 0, 23), 400),
        ("FP32", RegionSlice("r", 0, 25), 400),
        ("FP32", RegionSlice("r", SIZE - 8, 24), 400),
        ("FP32", RegionSlice("r", -8, 24), 400),
        ("FP32", RegionSlice("r", 1 << 70, 24), 400),
        ("BF16", RegionSlice("r", SIZE - 8, 12), 400),
        ("BYTES", RegionSlice("r", 0, 23), 400),
        ("BYTES", RegionSlice("r", 0, SIZE + 1), 400),
        ("BYTES", RegionSlice("gone", 0, 24), 404),
    ],
)
def test_mistakes_about_inputs(
    infer: Infer, shared: memoryview, datatype: str, where: RegionSlice, http: int
) -> None:
    with pytest.raises(RequestFailure) as caught:
        infer(request(f"echo{datatype}", InputTensor("x", datatype, (2, 3), where)))
    assert caught.value.http == http


@pytest.mark.parametrize("datatype", ["FP32", "BF16", "BYTES"])
def test_an_output_that_does_not_fit_writes_nothing_and_says_its_size(
    infer: Infer, shared: memoryview, datatype: str
) -> None:
    sent = filled(datatype, (2, 3))
    needed = len(rigs.binary(sent))
    wanted = request(
        f"echo{datatype}", tensor("x", datatype, sent), outputs={"y": RegionSlice("r", 0, needed - 1)}
    )
    with pytest.raises(RequestFailure, match=f"at least {needed} bytes") as caught:
        infer(wanted)
    assert caught.value.http == 400
    assert not any(shared[:64])
    for where in (RegionSlice("r", SIZE, 8), RegionSlice("r", 8, SIZE), RegionSlice("gone", 0, 8)):
        with pytest.raises(RequestFailure):
            infer(request(f"echo{datatype}", tensor("x", datatype, sent), outputs={"y": where}))


def test_a_region_that_its_client_truncates_is_the_clients_mistake(
    rig: InferenceRig, infer: Infer, shared: memoryview
) -> None:
    wanted = request("echoFP32", InputTensor("x", "FP32", (100, 100), RegionSlice("r", 0, 40_000)))
    infer(wanted)
    os.truncate(f"/dev/shm{KEY}", BEGIN + 100)
    with pytest.raises(RequestFailure) as caught:
        infer(wanted)
    assert caught.value.http == 400
    os.truncate(f"/dev/shm{KEY}", BEGIN + SIZE)
    assert only(infer(wanted)).shape == (100, 100)


def test_text_in_a_region_is_read_as_long_as_it_is(infer: Infer, shared: memoryview) -> None:
    data = text.encode(np.array(["a", "bc"], object))
    shared[: len(data)] = data
    wanted = request("echoBYTES", InputTensor("x", "BYTES", (1, 2), RegionSlice("r", 0, len(data))))
    array = only(infer(wanted)).array
    assert array is not None
    assert array.tolist() == [["a", "bc"]]
    shared[:4] = b"\xff" * 4
    with pytest.raises(RequestFailure, match="claims 4294967295 bytes"):
        infer(wanted)


def test_memory_is_given_back_after_large_requests(
    rig: InferenceRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the front and of the worker: its blocks, and what onnxruntime keeps."""
    for module in (connection, model_table):
        monkeypatch.setattr(module, "TIDY_EVERY", 0.1)
    small = request("echoFP32", tensor("x", "FP32", np.zeros((1, 4), np.float32)))
    rig.infer(small)
    path = rig.served["echoFP32", "1"].path

    def taken() -> int:
        (usage,) = [each.usage for each in rig.host.snapshot().models if each.model == path]
        return usage.private + usage.shared

    before = taken()
    nbytes = 32 << 20

    def large(_: int) -> None:
        body = rig.executor.allocate(nbytes)
        np.frombuffer(body, np.uint8)[:] = 0
        rig.infer(request("echoFP32", InputTensor("x", "FP32", (1, nbytes // 4), body)))

    list(rig.threads.map(large, range(4)))
    gc.collect()
    assert rig.limits.bytes_in_flight == 0
    eventually(lambda: taken() < before + (8 << 20), "the end of what was for large requests")
    rig.infer(small)


@pytest.mark.parametrize("is_in_region", [False, True])
def test_an_event_loop_goes_on_while_many_texts_are_read(
    rig: InferenceRig, shared: memoryview, monkeypatch: pytest.MonkeyPatch, is_in_region: bool
) -> None:
    begun, goes_on = threading.Event(), threading.Event()
    decode = text.decode

    def slow(*arguments: Any) -> list[str]:
        begun.set()
        assert goes_on.wait(allowed(DEADLINE)), "the event loop waited"
        return decode(*arguments)

    monkeypatch.setattr(text, "decode", slow)
    data = bytes(4 * 20_000)
    shared[: len(data)] = data
    where = RegionSlice("r", 0, len(data)) if is_in_region else data

    async def run() -> None:
        wanted = request("echoBYTES", InputTensor("x", "BYTES", (1, 20_000), where))
        running = asyncio.create_task(rig.executor.infer(wanted))
        await until(begun.is_set, "the begin")
        goes_on.set()
        assert only(await running).shape == (1, 20_000)

    asyncio.run(run())


def test_a_caller_who_goes_while_his_texts_are_read_leaves_nothing(
    rig: InferenceRig, shared: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def slow(*_: Any) -> list[str]:
        begun.set()
        assert may_end.wait(allowed(DEADLINE))
        return [""] * 20_000

    monkeypatch.setattr(text, "decode", slow)
    where = RegionSlice("r", 0, 4 * 20_000)

    async def run() -> None:
        wanted = request("echoBYTES", InputTensor("x", "BYTES", (1, 20_000), where))
        running = asyncio.create_task(rig.executor.infer(wanted))
        await until(begun.is_set, "the begin")
        running.cancel()
        rig.regions.unregister("r")
        await asyncio.sleep(0)
        assert not running.done()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(run())
    # The thread of the step may have its result a moment longer.
    eventually(lambda: gc.collect() >= 0 and not rig.limits.bytes_in_flight, "free memory")
    assert rig.limits.pending(rig.served["echoBYTES", "1"]) == 0
