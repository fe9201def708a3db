"""Runs with a deadline that another thread may end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnx_dl import InferenceSessionProxy, ModelHost, RunTimeout, UnsupportedValueError
from onnx_dl.client.cancellation import GRACE
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.session import placed_runs, typed_runs
from onnx_dl.tensors.foreign import ForeignArray, ForeignPlace
from tests.support.foreign import F4, LARGE, file
from tests.support.slow import identity_model, spin_model
from tests.support.waiting import DEADLINE, allowed, eventually

X = np.arange(8, dtype=np.float32)
FOR_EVER = {"x": np.ones((64, 64), np.float32), "n": np.array(1 << 40)}
SOON = {"x": np.ones((64, 64), np.float32), "n": np.array(1)}


@pytest.fixture
def identity(module_host: ModelHost) -> Iterator[InferenceSessionProxy]:
    with InferenceSessionProxy(identity_model(), host=module_host) as session:
        yield session


@pytest.fixture
def spin(module_host: ModelHost) -> Iterator[InferenceSessionProxy]:
    with InferenceSessionProxy(spin_model(), host=module_host) as session:
        session.run(None, SOON)
        yield session


def is_free(session: InferenceSessionProxy) -> bool:
    session.run(None, SOON, timeout=allowed(DEADLINE))
    return True


def test_a_run_without_places_is_a_run(identity: InferenceSessionProxy) -> None:
    (y,) = placed_runs.run(identity, ["y"], {"x": X}, {}, Deadline(DEADLINE, movable=True))
    assert (y == X).all()
    (y,) = asyncio.run(placed_runs.arun(identity, None, {"x": X}, {}, None))
    assert (y == X).all()


def test_another_thread_ends_a_run(spin: InferenceSessionProxy) -> None:
    deadline = Deadline(None, movable=True)
    ended: list[float] = []

    def end() -> None:
        ended.append(time.monotonic())
        deadline.end()

    timer = threading.Timer(0.2, end)
    timer.start()
    with pytest.raises(RunTimeout):
        placed_runs.run(spin, None, FOR_EVER, {}, deadline)
    assert time.monotonic() - ended[0] < allowed(GRACE + 1.5)
    timer.join(allowed(DEADLINE))
    assert is_free(spin)


def test_a_cancelled_coroutine_ends_its_run(spin: InferenceSessionProxy) -> None:
    async def cancelled() -> None:
        run = asyncio.ensure_future(placed_runs.arun(spin, None, FOR_EVER, {}, None))
        await asyncio.sleep(0.1)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run

    asyncio.run(cancelled())
    eventually(lambda: is_free(spin), "the end of the run")


def test_a_coroutine_has_its_time(spin: InferenceSessionProxy) -> None:
    with pytest.raises(RunTimeout):
        asyncio.run(placed_runs.arun(spin, None, FOR_EVER, {}, 0.1))
    assert is_free(spin)


def test_an_error_of_the_worker_is_not_a_reason_to_run_again(
    identity: InferenceSessionProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors of builtin classes are rebuilt as such; none of them may look like our own."""
    runs: list[str] = []

    def fails(*_: object) -> NoReturn:
        runs.append("there")
        raise BufferError("of the engine")

    monkeypatch.setattr(placed_runs, "_run_there", fails)
    monkeypatch.setattr(placed_runs, "_run_here", lambda *_: runs.append("here"))
    with file(8 * LARGE, is_mapped=False) as (memory, _):
        array, place = ForeignArray(memory, 0, F4, (LARGE,)), ForeignPlace(memory, 4 * LARGE, 4 * LARGE)
        with pytest.raises(BufferError, match="of the engine"):
            placed_runs.run(identity, ["y"], {"x": array}, {"y": place}, Deadline(DEADLINE))
    assert runs == ["there"]


def test_names_of_outputs_are_asked_for_when_the_model_is_loaded(
    module_host: ModelHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load that they need has the deadline of the run."""
    get_outputs, loaded = InferenceSessionProxy.get_outputs, []

    def asked(proxy: InferenceSessionProxy) -> list[Any]:
        loaded.append(placed_runs.in_use(proxy))
        return get_outputs(proxy)

    monkeypatch.setattr(InferenceSessionProxy, "get_outputs", asked)
    with (
        InferenceSessionProxy(identity_model(), host=module_host) as session,
        file(64, is_mapped=False) as (memory, _),
    ):
        session.unload()
        feed, places = {"x": ForeignArray(memory, 0, F4, (8,))}, {"y": ForeignPlace(memory, 32, 32)}
        placed_runs.run(session, None, feed, places, Deadline(DEADLINE))
    assert loaded == [True]


def cast_model(element_type: int) -> bytes:
    """y = x as another type, z = x; x: float32[N]."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["y"], to=element_type),
            helper.make_node("Identity", ["x"], ["z"]),
        ],
        "cast",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"])],
        [
            helper.make_tensor_value_info("y", element_type, ["N"]),
            helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N"]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("element_type", "dtype"),
    [
        (TensorProto.BFLOAT16, np.uint16),
        (TensorProto.FLOAT8E4M3FN, np.uint8),
        (TensorProto.FLOAT8E5M2, np.uint8),
    ],
)
@pytest.mark.parametrize("size", [0, 3])
def test_results_of_types_that_numpy_lacks(
    module_host: ModelHost, element_type: int, dtype: type[np.generic], size: int
) -> None:
    with InferenceSessionProxy(cast_model(element_type), host=module_host) as session:
        feed = {"x": np.ones(size, np.float32)}
        y, z = typed_runs.run(session, ["y", "z"], feed, {}, Deadline(DEADLINE))
        assert y.dtype == dtype and y.shape == z.shape == (size,)


def test_packed_results_are_refused_before_the_run(module_host: ModelHost) -> None:
    with InferenceSessionProxy(cast_model(TensorProto.INT4), host=module_host) as session:
        feed = {"x": np.ones(3, np.float32)}
        with pytest.raises(UnsupportedValueError, match=r"'y' is a tensor\(int4\)"):
            typed_runs.run(session, ["z", "y"], feed, {}, Deadline(DEADLINE))
        (z,) = typed_runs.run(session, ["z"], feed, {}, Deadline(DEADLINE))
        assert (z == 1).all()
