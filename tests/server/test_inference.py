"""Inferences by the executor with a real host and workers."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.server.inference import runs
from onnx_dl.server.inference.limits import Limits
from onnx_dl.server.v2 import datatypes
from onnx_dl.server.v2.failures import RequestFailure, not_found, too_many
from onnx_dl.server.v2.messages import InferRequest, InferResponse, InputTensor
from onnx_dl.tensors.block import home_of
from tests.conftest import _belongings as belongings
from tests.conftest import _left as left
from tests.support import inference_rig as rigs
from tests.support.inference_rig import InferenceRig, only, request, spinning, tensor, until
from tests.support.waiting import DEADLINE, allowed, eventually

SHAPES: list[tuple[int, ...]] = [(2, 3), (0, 3), (1, 0), (300, 300)]
Infer = Callable[[InferRequest], InferResponse]


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> None:
    """In place of the count after each test: the host is the module's, which ends by that count."""


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceRig]:
    before = belongings()
    with rigs.inference_rig(tmp_path_factory.mktemp("models")) as rig:
        for datatype in [*datatypes.SIZES, "BYTES"]:
            ends = {"x": (datatype, (-1, -1))}
            rig.serve(f"echo{datatype}", rigs.echo(datatype), inputs=ends, outputs={"y": ends["x"]})
        rig.serve(
            "spin", rigs.spin(), outputs={"y": ("FP32", (4,))},
            inputs={"x": ("FP32", (4,)), "n": ("INT64", ())},
        )  # fmt: skip
        rig.serve("picky", rigs.picky(), inputs={"x": ("FP32", (-1,))}, outputs={"y": ("FP32", (3, -1))})
        rig.serve("plus", rigs.plus(1), **PLUS)
        yield rig
    eventually(lambda: gc.collect() >= 0 and not left(before), "the end of all")


PLUS: dict[str, Any] = {
    "inputs": {"x": ("FP32", (-1, 4))}, "outputs": {"y": ("FP32", (-1, 4))}, "max_batch_size": 64,
}  # fmt: skip


@pytest.fixture(params=["thread", "coroutine"])
def infer(request: pytest.FixtureRequest, rig: InferenceRig) -> Infer:
    """One inference in either way."""
    if request.param == "thread":
        return rig.infer
    return lambda wanted: asyncio.run(rig.executor.infer(wanted))


@pytest.fixture(autouse=True)
def _nothing_leaks(rig: InferenceRig) -> Iterator[None]:
    """After each test nothing is counted as pending or in flight."""
    yield
    for entry in rig.served.values():
        assert rig.limits.pending(entry) == 0
    assert [each.name for each in rig.statistics.snapshot() if each.pending] == []
    await_free_memory(rig)


def await_free_memory(rig: InferenceRig) -> None:
    """Returns when no byte is in flight: the thread of a step may have its result a moment longer."""
    eventually(lambda: gc.collect() >= 0 and not rig.limits.bytes_in_flight, "free memory")


def filled(datatype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    count = int(np.prod(shape))
    if datatype == "BYTES":
        array = np.empty(count, object)
        array[:] = [("é\0" if n % 2 else "text ") * (n % 5) for n in range(count)]
        return array.reshape(shape)
    dtype = np.dtype(np.uint16 if datatype == "BF16" else datatypes.to_numpy(datatype))
    return (np.arange(count) % (2 if datatype == "BOOL" else 100)).astype(dtype).reshape(shape)


# --- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("datatype", [*datatypes.SIZES, "BYTES"])
def test_every_datatype_and_size_comes_back(rig: InferenceRig, infer: Infer, datatype: str) -> None:
    before = rig.counts(f"echo{datatype}")
    for shape in SHAPES * 2:  # the second time it is a call like one before
        sent = filled(datatype, shape)
        response = infer(request(f"echo{datatype}", tensor("x", datatype, sent)))
        output = only(response)
        assert (response.model, response.version, response.id) == (f"echo{datatype}", "1", "an id")
        assert (output.name, output.datatype, output.shape) == ("y", datatype, shape)
        assert output.array is not None
        assert output.array.flags.c_contiguous
        assert np.array_equal(output.array, sent)
    after = rig.counts(f"echo{datatype}")
    assert after.inference_count - before.inference_count == len(SHAPES) * 2


@pytest.mark.parametrize(
    ("datatype", "items"), [("FP32", [1, 2.5]), ("INT8", [-128, 127]), ("BOOL", [True, False]),
                            ("BYTES", ["a", "é"]), ("UINT64", [0, 2**64 - 1])],
)  # fmt: skip
def test_json(infer: Infer, datatype: str, items: list[Any]) -> None:
    for data in (items, [items]):
        output = only(infer(request(f"echo{datatype}", InputTensor("x", datatype, (1, 2), data))))
        assert output.array is not None
        assert output.array.tolist() == [items]


def test_a_scalar(infer: Infer) -> None:
    output = only(infer(spinning(0)))
    assert output.array is not None
    assert output.array.tolist() == [0.5, 1, 2, 3]


def test_outputs_that_are_asked_for(infer: Infer) -> None:
    x = tensor("x", "FP32", np.zeros((1, 4), np.float32))
    assert [each.name for each in infer(request("plus", x, outputs={"y": None})).outputs] == ["y"]


def test_large_tensors_are_not_copied_between_body_and_worker(rig: InferenceRig, infer: Infer) -> None:
    nbytes = 5 << 20
    for _ in range(3):
        body = rig.executor.allocate(nbytes + 64)
        data = body[64:]
        array = np.frombuffer(data, np.float32)
        array[:] = np.arange(array.size)
        response = infer(request("echoFP32", InputTensor("x", "FP32", (1, array.size), data)))
        output = only(response)
        assert output.array is not None
        assert np.array_equal(output.array[0], array)
        assert home_of(output.array) is not None  # a view of the worker's block
        del body, data, array, response, output
    with rig.table.use("echoFP32") as model:
        pool = model.proxy._handle.model().worker.pool  # type: ignore[attr-defined]
        assert pool is not None
        lanes = [lane for lanes in pool.idle.values() for lane in lanes]
    assert lanes
    for lane in lanes:  # what a call copies lies in the scratch block
        scratch = lane.arena.current_scratch
        assert scratch is None or scratch.size < 1 << 20


# --- statistics --------------------------------------------------------------------------------------------


def test_rows_and_durations_are_counted_before_the_answer(rig: InferenceRig, infer: Infer) -> None:
    before = rig.counts("plus")
    began = time.perf_counter_ns()
    infer(request("plus", tensor("x", "FP32", np.zeros((5, 4), np.float32))))
    took = time.perf_counter_ns() - began
    after = rig.counts("plus")
    assert after.inference_count - before.inference_count == 5
    assert after.execution_count - before.execution_count == 1
    assert after.success.count - before.success.count == 1
    assert after.last_inference_ms >= time.time() * 1000 - 60_000
    parts = [
        getattr(after, name).ns - getattr(before, name).ns
        for name in ("queue", "compute_input", "compute_infer", "compute_output")
    ]
    assert all(part >= 0 for part in parts)
    assert 0 < sum(parts) <= after.success.ns - before.success.ns <= took


def test_the_wait_for_a_load_is_time_in_the_queue(rig: InferenceRig, infer: Infer) -> None:
    with rig.table.use("plus") as model:
        model.proxy.unload()
    before = rig.counts("plus")
    infer(request("plus", tensor("x", "FP32", np.zeros((1, 4), np.float32))))
    after = rig.counts("plus")
    queue = after.queue.ns - before.queue.ns
    assert queue > 1_000_000  # no process starts in a millisecond


# --- mistakes of clients -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "words", "http"),
    [
        (request("gone"), "Request for unknown model: 'gone'", 404),
        (request("plus", version="9"), "Request for unknown model: 'plus' version 9", 404),
        (request("plus"), "missing required", 400),
        (request("echoFP32", InputTensor("x", "FP32", (2**20, 2**20), bytes(16))), "byte size mismatch", 400),
        (request("plus", InputTensor("x", "FP32", (1, 4), [1.0])), "has 1 items", 400),
        (request("plus", InputTensor("x", "FP32", (65, 4), b"\0" * 1040)), "batch-size must be <= 64", 400),
        (request("picky", tensor("x", "FP32", np.zeros(4, np.float32))), "refused the request", 400),
        (request("echoFP32", tensor("x", "FP32", np.zeros((1, 1), np.float32)), outputs={"z": None}),
         "unexpected inference output 'z'", 400),
        (request("plus", parameters={"sequence_id": 7}), "sequences", 400),
    ],
)  # fmt: skip
def test_mistakes_are_refused_and_counted(
    rig: InferenceRig, infer: Infer, wanted: InferRequest, words: str, http: int
) -> None:
    before = rig.counts(wanted.model)
    with pytest.raises(RequestFailure, match=re.escape(words)) as caught:
        infer(wanted)
    assert caught.value.http == http
    after = rig.counts(wanted.model)
    is_known = http != 404
    assert after.fail.count - before.fail.count == is_known
    assert after.failures.get("OTHER", 0) - before.failures.get("OTHER", 0) == is_known
    assert after.inference_count == before.inference_count


# --- deadlines and callers who go --------------------------------------------------------------------------


def ready_to_spin(rig: InferenceRig, *, is_warm: bool) -> None:
    """Returns when the model is loaded, and no call is counted as busy: that ends a moment after the answer.

    ``is_warm``: the next call is like the last, so that it takes the short way.
    """
    for _ in range(4 if is_warm else 1):
        rig.infer(spinning(1))
    eventually(lambda: not rig.busy("spin"), "the end of the calls")


def test_a_timeout_is_the_clients_and_ends_the_run(rig: InferenceRig, infer: Infer) -> None:
    ready_to_spin(rig, is_warm=True)
    before = rig.counts("spin")
    with pytest.raises(RequestFailure, match="longer than its timeout") as caught:
        infer(spinning(timeout=0.1))
    assert (caught.value.http, caught.value.grpc) == (408, "DEADLINE_EXCEEDED")
    assert rig.counts("spin").failures.get("CANCELED", 0) - before.failures.get("CANCELED", 0) == 1
    eventually(lambda: not rig.busy("spin"), "the end of the run")


class EarlyLoop(asyncio.SelectorEventLoop):
    """An event loop whose timers fire early, as those of uvloop may by a millisecond."""

    def call_at(self, when: float, *arguments: Any, **more: Any) -> asyncio.TimerHandle:
        return super().call_at(when - 0.1, *arguments, **more)


def test_a_timeout_that_ends_early_is_the_clients(rig: InferenceRig) -> None:
    ready_to_spin(rig, is_warm=True)
    with (
        asyncio.Runner(loop_factory=EarlyLoop) as runner,
        pytest.raises(RequestFailure, match="longer than its timeout") as caught,
    ):
        runner.run(rig.executor.infer(spinning(timeout=0.3)))
    assert caught.value.http == 408
    eventually(lambda: not rig.busy("spin"), "the end of the run")


def test_the_parameter_timeout_counts_too(infer: Infer) -> None:
    wanted = spinning(timeout=60)
    wanted.parameters["timeout"] = 50_000
    with pytest.raises(RequestFailure, match="longer than its timeout"):
        infer(wanted)


def test_a_timeout_includes_the_load(rig: InferenceRig, infer: Infer) -> None:
    with rig.table.use("spin") as model:
        model.proxy.unload()
    with pytest.raises(RequestFailure, match="longer than its timeout") as caught:
        infer(spinning(1, timeout=0.0005))
    assert caught.value.http == 408
    rig.infer(spinning(1))


@pytest.mark.parametrize("is_warm", [False, True])
def test_a_thread_whose_caller_goes_returns_and_frees_its_place(rig: InferenceRig, is_warm: bool) -> None:
    ready_to_spin(rig, is_warm=is_warm)
    cancel, before = Deadline(None, movable=True), rig.counts("spin")
    running = rig.threads.submit(rig.infer, spinning(), cancel)
    eventually(lambda: rig.busy("spin"), "the run")
    cancel.end()
    with pytest.raises(RequestFailure) as caught:
        running.result(allowed(DEADLINE))
    assert (caught.value.http, caught.value.grpc, caught.value.reason) == (499, "CANCELLED", "CANCELED")
    assert rig.counts("spin").failures.get("CANCELED", 0) - before.failures.get("CANCELED", 0) == 1
    eventually(lambda: not rig.busy("spin"), "the end of the run")


@pytest.mark.parametrize("is_warm", [False, True])
def test_a_coroutine_that_is_cancelled_ends_its_run_and_frees_its_place(
    rig: InferenceRig, is_warm: bool
) -> None:
    ready_to_spin(rig, is_warm=is_warm)

    async def main() -> None:
        task = asyncio.create_task(rig.executor.infer(spinning()))
        await until(lambda: rig.busy("spin"), "the run")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert rig.limits.pending(rig.served["spin", "1"]) == 0
        await until(lambda: not rig.busy("spin"), "the end of the run")

    before = rig.counts("spin")
    asyncio.run(main())
    assert rig.counts("spin").failures.get("CANCELED", 0) - before.failures.get("CANCELED", 0) == 1


@pytest.fixture
def busy_threads() -> Iterator[Callable[[], None]]:
    """Has something else hold all default threads of the running event loop."""
    may_end = threading.Event()
    pool = ThreadPoolExecutor(1)

    def hold() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(pool)
        pool.submit(may_end.wait, 4 * DEADLINE)
        # asyncio.run() would wait for it otherwise.
        loop.call_later(3 * DEADLINE, may_end.set)

    yield hold
    may_end.set()
    pool.shutdown()


@pytest.mark.parametrize("is_warm", [False, True])
def test_a_cancelled_run_ends_though_all_threads_of_the_loop_are_held(
    rig: InferenceRig, busy_threads: Callable[[], None], is_warm: bool
) -> None:
    ready_to_spin(rig, is_warm=is_warm)

    async def main() -> None:
        task = asyncio.create_task(rig.executor.infer(spinning()))
        await until(lambda: rig.busy("spin"), "the run")
        busy_threads()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not rig.busy("spin"), "the end of the run")
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))

    asyncio.run(main())


def test_bfloat16_runs_though_all_threads_of_the_loop_are_held(
    rig: InferenceRig, busy_threads: Callable[[], None]
) -> None:
    sent = filled("BF16", (2, 3))

    async def main() -> None:
        busy_threads()
        async with asyncio.timeout(allowed(DEADLINE)):
            response = await rig.executor.infer(request("echoBF16", tensor("x", "BF16", sent)))
        assert np.array_equal(only(response).array, sent)
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))

    rig.infer(request("echoBF16", tensor("x", "BF16", sent)))
    asyncio.run(main())


def test_a_cancelled_wait_for_a_load_leaves_the_load_to_others(rig: InferenceRig) -> None:
    with rig.table.use("spin") as model:
        model.proxy.unload()

    async def main() -> None:
        tasks = [asyncio.create_task(rig.executor.infer(spinning(1))) for _ in range(20)]
        await asyncio.sleep(0)
        for task in tasks[:19]:
            task.cancel()
        results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), allowed(DEADLINE))
        assert [type(result) for result in results[:19]] == [asyncio.CancelledError] * 19
        assert isinstance(results[19], InferResponse)

    asyncio.run(main())


# --- full queues and memory --------------------------------------------------------------------------------


def test_a_full_queue_refuses_and_others_go_on(rig: InferenceRig, infer: Infer) -> None:
    rig.serve(
        "spin", rigs.spin(), outputs={"y": ("FP32", (4,))}, max_queue_size=2,
        inputs={"x": ("FP32", (4,)), "n": ("INT64", ())},
    )  # fmt: skip
    entry, before = rig.served["spin", "1"], rig.counts("spin")
    cancel = Deadline(None, movable=True)
    running = [rig.threads.submit(rig.infer, spinning(), cancel) for _ in range(2)]
    try:
        eventually(lambda: rig.limits.pending(entry) == 2, "two requests")
        with pytest.raises(RequestFailure, match="2 requests of model 'spin'") as caught:
            infer(spinning(1))
        assert (caught.value.http, caught.value.retry_after) == (429, 1.0)
        infer(request("plus", tensor("x", "FP32", np.zeros((1, 4), np.float32))))
    finally:
        cancel.end()
        for each in running:
            with pytest.raises(RequestFailure):
                each.result(allowed(DEADLINE))
    assert rig.counts("spin").failures["REJECTED"] - before.failures.get("REJECTED", 0) == 1
    infer(spinning(1))


def test_a_body_is_in_flight_until_no_view_of_it_is_left(rig: InferenceRig, infer: Infer) -> None:
    body = rig.executor.allocate(1 << 20)
    assert body.nbytes == 1 << 20
    assert rig.limits.bytes_in_flight == 1 << 20
    wanted = request("echoUINT8", InputTensor("x", "UINT8", (1, 1 << 20), body[:]))
    wanted.nbytes = 1 << 20  # a protocol may tell it: it is not counted twice
    infer(wanted)
    assert rig.limits.bytes_in_flight == 1 << 20
    del wanted
    view = body[5:9]
    del body
    assert rig.limits.bytes_in_flight == 1 << 20
    del view
    await_free_memory(rig)


def test_bytes_beyond_the_bound_are_refused(rig: InferenceRig, tmp_path: Path) -> None:
    with rigs.inference_rig(tmp_path, Limits(1 << 20)) as small:
        first = small.executor.allocate(768 << 10)
        with pytest.raises(RequestFailure) as caught:
            small.executor.allocate(512 << 10)
        assert caught.value.http == 429
        with pytest.raises(RequestFailure) as caught:
            small.executor.allocate(2 << 20)
        assert caught.value.http == 413
        del first
        gc.collect()
        assert small.executor.allocate(1 << 20).nbytes == 1 << 20
        # Bodies that a protocol has in memory of its own count while the request is there.
        entry = small.serve("plus", rigs.plus(1), **PLUS)
        wanted = request("plus", tensor("x", "FP32", np.zeros((1, 4), np.float32)))
        wanted.nbytes = 2 << 20
        with pytest.raises(RequestFailure) as caught:
            small.infer(wanted)
        assert caught.value.http == 413
        assert small.limits.pending(entry) == 0


def test_answers_that_wait_keep_new_inferences_out(rig: InferenceRig, infer: Infer) -> None:
    infer(spinning(0))
    rig.executor.owe(rig.limits.max_bytes + 1)
    try:
        with pytest.raises(RequestFailure) as caught:
            infer(spinning(0))
        assert caught.value.http == 429
    finally:
        rig.executor.paid(rig.limits.max_bytes + 1)
    infer(spinning(0))


def test_a_refusal_is_counted_once_and_for_a_known_model_only(rig: InferenceRig, infer: Infer) -> None:
    before = rig.counts("plus")
    with pytest.raises(RequestFailure) as caught:
        infer(request("plus"))
    rig.executor.refused("plus", "", caught.value)
    assert rig.counts("plus").fail.count - before.fail.count == 1
    early = too_many("no room")
    for _ in range(2):
        rig.executor.refused("plus", "1", early)
    after = rig.counts("plus")
    assert after.fail.count - before.fail.count == 2
    assert after.failures["REJECTED"] - before.failures.get("REJECTED", 0) == 1
    rig.executor.refused("unknown", "", not_found("no"))
    assert not any(each.name == "unknown" for each in rig.statistics.snapshot())


def test_what_json_does_not_have_is_a_failure_and_no_success(rig: InferenceRig, infer: Infer) -> None:
    for datatype, sent in (("FP32", np.full((1, 1), np.nan, np.float32)), ("FP16", np.ones((1, 1), "f2"))):
        name = f"echo{datatype}"
        infer(request(name, tensor("x", datatype, sent)))
        before = rig.counts(name)
        wanted = request(name, tensor("x", datatype, sent))
        wanted.is_binary = False
        with pytest.raises(RequestFailure, match="Ask for binary_data") as caught:
            infer(wanted)
        assert caught.value.http == 400
        after = rig.counts(name)
        assert (after.success.count, after.fail.count) == (before.success.count, before.fail.count + 1)


# --- failures of ours --------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_warm", [False, True])
def test_a_crash_is_ours_and_the_next_request_works(rig: InferenceRig, infer: Infer, is_warm: bool) -> None:
    ready_to_spin(rig, is_warm=is_warm)
    before = rig.counts("spin")
    running = rig.threads.submit(infer, spinning())
    eventually(lambda: rig.busy("spin"), "the run")
    os.kill(rig.worker("spin"), signal.SIGKILL)
    with pytest.raises(RequestFailure, match="'spin' failed") as caught:
        running.result(allowed(DEADLINE))
    assert (caught.value.http, caught.value.grpc) == (500, "INTERNAL")
    assert rig.counts("spin").failures.get("BACKEND", 0) - before.failures.get("BACKEND", 0) == 1
    eventually(lambda: works_again(infer), "the next load")


def works_again(infer: Infer) -> bool:
    """True if it works; False if the host still waits after several crashes in a row, which it says."""
    try:
        infer(spinning(1))
    except RequestFailure as failure:
        assert failure.http == 503
        assert failure.retry_after is not None
        return False
    return True


def test_a_worker_that_left_between_two_requests_is_not_noticed(rig: InferenceRig, infer: Infer) -> None:
    wanted = request("plus", tensor("x", "FP32", np.ones((1, 4), np.float32)))
    for _ in range(4):
        infer(wanted)
        with rig.table.use("plus") as model:
            model.proxy.unload()
    infer(wanted)
    infer(wanted)
    os.kill(rig.worker("plus"), signal.SIGKILL)
    infer(wanted)


def test_a_file_that_does_not_load_is_ours(rig: InferenceRig, infer: Infer) -> None:
    rig.serve("broken", b"no model at all", **PLUS)
    try:
        wanted = request("broken", tensor("x", "FP32", np.zeros((1, 4), np.float32)))
        with pytest.raises(RequestFailure, match=r"^failed to load 'broken': ") as caught:
            infer(wanted)
        assert (caught.value.http, caught.value.grpc) == (503, "UNAVAILABLE")
        assert caught.value.retry_after is not None
        assert rig.counts("broken").failures["BACKEND"] >= 1
    finally:
        del rig.served["broken", "1"]
        rig.serve("plus", rigs.plus(1), **PLUS)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, KeyError, GeneratorExit])
def test_whatever_is_raised_leaks_no_count(
    rig: InferenceRig, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def fail(*args: object) -> Any:
        raise error("a test")

    async def afail(*args: object) -> Any:
        raise error("a test")

    wanted = request("plus", tensor("x", "FP32", np.zeros((1, 4), np.float32)))
    rig.infer(wanted)
    monkeypatch.setattr(runs, "run", fail)
    monkeypatch.setattr(runs, "arun", afail)
    before = rig.counts("plus")
    expected = RequestFailure if issubclass(error, Exception) else error
    with pytest.raises(expected):
        rig.infer(wanted)
    with pytest.raises(expected):
        coroutine = rig.executor.infer(wanted)
        coroutine.send(None)
    after = rig.counts("plus")
    assert after.fail.count - before.fail.count == 2
    # The fixture looks for counts that are left.


def test_a_version_is_replaced_under_traffic_without_a_failure(rig: InferenceRig) -> None:
    ended = threading.Event()
    wanted = request("plus", tensor("x", "FP32", np.zeros((1, 4), np.float32)))
    seen: set[float] = set()

    def call(infer: Infer) -> int:
        calls = 0
        while not ended.is_set():
            output = only(infer(wanted))
            assert output.array is not None
            seen.add(float(output.array[0, 0]))
            calls += 1
        return calls

    async def awaited() -> int:
        calls = 0
        while not ended.is_set():
            await rig.executor.infer(wanted)
            calls += 1
        return calls

    failed = rig.counts("plus").fail.count
    callers = [rig.threads.submit(call, rig.infer) for _ in range(2)]
    callers.append(rig.threads.submit(lambda: asyncio.run(awaited())))
    try:
        for constant in range(2, 8):
            rig.serve("plus", rigs.plus(constant), **PLUS)
            eventually(lambda wanted=constant: float(wanted) in seen, f"answers of {constant}")  # type: ignore[misc]
    finally:
        ended.set()
        calls = [caller.result(allowed(DEADLINE)) for caller in callers]
    assert min(calls) > 0
    assert rig.counts("plus").fail.count == failed


def test_many_requests_at_once(rig: InferenceRig) -> None:
    rig.serve("plus", rigs.plus(1), max_queue_size=500, **PLUS)

    async def one(n: int) -> float:
        x = np.full((1 + n % 3, 4), n, np.float32)
        output = only(await rig.executor.infer(request("plus", tensor("x", "FP32", x))))
        assert output.array is not None
        return float(output.array[0, 0])

    async def main() -> list[float]:
        return await asyncio.gather(*(one(n) for n in range(300)))

    others = [rig.threads.submit(rig.infer, request("plus", tensor("x", "FP32", np.full((2, 4), n, "f4"))))
              for n in range(100)]  # fmt: skip
    assert asyncio.run(main()) == [n + 1 for n in range(300)]
    for n, other in enumerate(others):
        array = only(other.result(allowed(DEADLINE))).array
        assert array is not None
        assert array.tolist() == [[n + 1] * 4] * 2


def test_the_process_never_imports_onnxruntime(tmp_path: Path) -> None:
    """Also not for text, bfloat16, and errors of a run and of a load."""
    (tmp_path / "picky.onnx").write_bytes(rigs.picky())
    (tmp_path / "bf16.onnx").write_bytes(rigs.echo("BF16"))
    (tmp_path / "text.onnx").write_bytes(rigs.echo("BYTES"))
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    (tmp_path / "models").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:8:2] == ["bf16 ok", "text ok", "picky 400", "broken 503"]


_PROGRAM = """
import sys
from pathlib import Path
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.protocol.failures import keep_engine_out
from onnx_dl.server.v2.failures import RequestFailure, not_found, too_many
from onnx_dl.server.v2.messages import InferRequest, InputTensor
from onnx_dl import ModelHost
from onnx_dl.server.inference.executor import Executor
from onnx_dl.server.inference.limits import Limits
from onnx_dl.server.inference.statistics import Statistics
from onnx_dl.server.interfaces import Served, ServedTable, TensorInfo
from onnx_dl.server.repository import specs
from onnx_dl.server.repository.models import ModelTable
from onnx_dl.server.shm.regions import Regions

keep_engine_out()
folder = Path(sys.argv[1])
inputs = {
    "bf16": InputTensor("x", "BF16", (1, 2), b"abcd"),
    "text": InputTensor("x", "BYTES", (1, 1), ["a"]),
    "picky": InputTensor("x", "FP32", (4,), [1.0] * 4),
    "broken": InputTensor("x", "FP32", (1,), [1.0]),
}

def served(name, tensor):
    path = str(folder / f"{name}.onnx")
    inputs = (TensorInfo("x", tensor.datatype, (-1,) * len(tensor.shape)),)
    outputs = (TensorInfo("y", tensor.datatype, (-1, -1)),)
    generation = specs.generation(path, {})
    return Served(name=name, version="1", path=path, generation=generation, inputs=inputs, outputs=outputs)

with ModelHost() as host:
    table = ModelTable(host)
    table.apply(ServedTable([served(*each) for each in sorted(inputs.items())], [], True))
    executor = Executor(table, Regions("off"), Statistics(), Limits(), host)
    for name, tensor in inputs.items():
        for _ in range(2):
            try:
                request = InferRequest(name, "", "", [tensor], [], {})
                executor.infer_blocking(request, Deadline(None, movable=True))
                print(name, "ok")
            except RequestFailure as failure:
                print(name, failure.http)
    table.close()
assert "onnxruntime" not in sys.modules
"""
