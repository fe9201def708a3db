"""Runs with inputs and results in memory of a third process."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from onnx import TensorProto, helper

from onnx_dl import (
    ForeignMemoryError,
    InferenceSessionProxy,
    ModelHost,
    PlaceTooSmall,
    RunTimeout,
)
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.session import placed_runs
from onnx_dl.tensors.foreign import ForeignArray, ForeignMemory, ForeignPlace, Written, as_bytes
from onnx_dl.tensors.foreign_tables import MOST_NAMED
from onnx_dl.workers.sandbox import landlock
from tests.support.foreign import F4, FOR_EVER, LARGE, SMALL, TURNS, X, file, held, pid_of, run
from tests.support.slow import identity_model, late_model
from tests.support.waiting import DEADLINE


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_runs_again_and_again(late: InferenceSessionProxy, is_mapped: bool, size: int) -> None:
    """The first call is unbound, the next ones are bound to the same places, then to others."""
    nbytes = 4 * size
    with file(6 * nbytes + 1, is_mapped=is_mapped) as (memory, fd):
        for turn, offset in enumerate([0, 0, 0, nbytes, 0, 2 * nbytes, 2 * nbytes + 1, 2 * nbytes + 4]):
            x = X[:size] + turn
            os.pwrite(fd, bytes(as_bytes(x)), offset)
            place = ForeignPlace(memory, 4 * nbytes + offset % 8, nbytes)
            assert run(late, ForeignArray(memory, offset, F4, (size,)), place) == Written(F4, (size,))
            y = np.frombuffer(os.pread(fd, nbytes, place.offset), F4)
            assert (y == 2 * x).all()


def test_bound_runs_with_no_other_inputs(module_host: ModelHost, is_mapped: bool) -> None:
    with (
        InferenceSessionProxy(identity_model(), host=module_host) as session,
        file(16 * LARGE, is_mapped=is_mapped) as (memory, fd),
    ):
        for turn, place in enumerate([8 * LARGE, 8 * LARGE, 8 * LARGE, 4 * LARGE, 4 * LARGE + 4]):
            x = X + turn
            os.pwrite(fd, bytes(as_bytes(x)), 0)
            (y,) = placed_runs.run(
                session,
                None,
                {"x": ForeignArray(memory, 0, F4, (LARGE,))},
                {"y": ForeignPlace(memory, place, 4 * LARGE)},
                Deadline(DEADLINE),
            )
            assert y == Written(F4, (LARGE,))
            assert os.pread(fd, 4 * LARGE, place) == bytes(as_bytes(x))
        # Other sizes, and a result that no longer fits the place that it had.
        for size in (LARGE // 2, LARGE, LARGE // 2, LARGE):
            array, place = (
                ForeignArray(memory, 0, F4, (size,)),
                ForeignPlace(memory, 8 * LARGE, 2 * LARGE + 8),
            )
            with pytest.raises(PlaceTooSmall) if size == LARGE else contextlib.nullcontext():
                placed_runs.run(session, None, {"x": array}, {"y": place}, Deadline(DEADLINE))


def test_a_result_that_lies_on_its_input(module_host: ModelHost, is_mapped: bool) -> None:
    """Half on it: the engine must not write there while it reads."""
    graph = helper.make_graph(
        [helper.make_node("CumSum", ["x", "axis"], ["y"], reverse=1)],
        "sums",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])],
        [helper.make_tensor("axis", TensorProto.INT64, [], [0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    ones = np.ones(LARGE, np.float32)
    with (
        InferenceSessionProxy(model.SerializeToString(), host=module_host) as session,
        file(8 * LARGE, is_mapped=is_mapped) as (memory, fd),
    ):
        for _ in range(4):
            os.pwrite(fd, bytes(as_bytes(ones)), 0)
            place = ForeignPlace(memory, 256, 4 * LARGE)
            feed = {"x": ForeignArray(memory, 0, F4, (LARGE,))}
            placed_runs.run(session, None, feed, {"y": place}, Deadline(DEADLINE))
            y = np.frombuffer(os.pread(fd, 4 * LARGE, 256), F4)
            assert (y == np.arange(LARGE, 0, -1)).all()


def test_only_the_input_or_only_the_result_lies_there(late: InferenceSessionProxy, is_mapped: bool) -> None:
    with file(8 * LARGE, is_mapped=is_mapped) as (memory, fd):
        os.pwrite(fd, bytes(as_bytes(X)), 0)
        array, place = ForeignArray(memory, 0, F4, X.shape), ForeignPlace(memory, 4 * LARGE, 4 * LARGE)
        for _ in range(3):
            (y,) = placed_runs.run(late, None, {"x": array, "n": TURNS}, {}, Deadline(DEADLINE))
            assert isinstance(y, np.ndarray) and (y == 2 * X).all()
            shared = late.empty(X.shape)
            shared[:] = X + 1
            for x in (X + 1, shared):
                feed = {"x": x, "n": TURNS}
                assert placed_runs.run(late, None, feed, {"y": place}, Deadline(DEADLINE)) == [
                    Written(F4, X.shape)
                ]
                assert os.pread(fd, 4 * LARGE, 4 * LARGE) == bytes(as_bytes(2 * (X + 1)))


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_result_that_does_not_fit_is_not_written(
    late: InferenceSessionProxy, is_mapped: bool, size: int
) -> None:
    nbytes = 4 * size
    with file(2 * nbytes, is_mapped=is_mapped) as (memory, fd):
        os.pwrite(fd, b"\1" * 2 * nbytes, 0)
        array = ForeignArray(memory, 0, F4, (size,))
        for _ in range(3):
            with pytest.raises(
                PlaceTooSmall, match=rf"'y' has {nbytes} bytes, .* has {nbytes - 1}"
            ) as caught:
                run(late, array, ForeignPlace(memory, nbytes, nbytes - 1))
            error = caught.value
            assert (error.output, error.needed, error.available) == ("y", nbytes, nbytes - 1)
            assert os.pread(fd, nbytes, nbytes) == b"\1" * nbytes
        assert run(late, array, ForeignPlace(memory, nbytes, nbytes)) == Written(F4, (size,))


def test_a_hole_has_zeros_and_gets_results(late: InferenceSessionProxy, is_mapped: bool) -> None:
    with file(8 * LARGE, is_mapped=is_mapped) as (memory, fd):
        os.pwrite(fd, b"\1" * 4 * LARGE, 4 * LARGE)
        os.ftruncate(fd, 4 * LARGE)
        os.ftruncate(fd, 8 * LARGE)
        for _ in range(3):
            run(late, ForeignArray(memory, 0, F4, X.shape), ForeignPlace(memory, 4 * LARGE, 4 * LARGE))
        assert os.pread(fd, 8 * LARGE, 0) == bytes(8 * LARGE)


def test_slices_beyond_their_memory_and_odd_dtypes(late: InferenceSessionProxy, is_mapped: bool) -> None:
    with file(8 * LARGE, is_mapped=is_mapped) as (memory, _):
        place = ForeignPlace(memory, 4 * LARGE, 4 * LARGE)
        for array in (
            ForeignArray(memory, 4 * LARGE + 1, F4, X.shape),
            ForeignArray(memory, -1, F4, X.shape),
            ForeignArray(memory, 0, F4, (1 << 40, 1 << 40)),
            ForeignArray(memory, 0, F4, (-1, LARGE)),
            ForeignArray(memory, 0, np.dtype(object), (LARGE,)),
        ):
            with pytest.raises(ForeignMemoryError):
                run(late, array, place)
        good = ForeignArray(memory, 0, F4, X.shape)
        for wrong in (ForeignPlace(memory, 4 * LARGE + 1, 4 * LARGE), ForeignPlace(memory, -1, 4 * LARGE)):
            with pytest.raises(ForeignMemoryError):
                run(late, good, wrong)
        with pytest.raises(Exception, match="Unexpected input data type"):
            run(late, ForeignArray(memory, 0, np.dtype(np.int32), X.shape), place)
        assert run(late, good, place) == Written(F4, X.shape)


def test_what_is_no_file() -> None:
    ends = os.pipe()
    for fd in ends:
        with pytest.raises(ForeignMemoryError, match="not a regular file"):
            ForeignMemory(fd, 0, is_mapped=False)
    with pytest.raises(ForeignMemoryError, match="has 8 bytes, not 9"), file(8, is_mapped=False) as (_, fd):
        ForeignMemory(os.dup(fd), 9, is_mapped=False)


def test_text_and_places_of_nothing(module_host: ModelHost) -> None:
    """Text is no bytes: it is returned.  A place of an output that is not asked for is ignored."""
    graph = helper.make_graph(
        [helper.make_node("Identity", ["t"], ["u"]), helper.make_node("Identity", ["x"], ["y"])],
        "both",
        [
            helper.make_tensor_value_info("t", TensorProto.STRING, ["N"]),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M"]),
        ],
        [
            helper.make_tensor_value_info("u", TensorProto.STRING, ["N"]),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M"]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    text = np.array(["a", "b"], object)
    with (
        InferenceSessionProxy(model.SerializeToString(), host=module_host) as session,
        file(12 * LARGE, is_mapped=False) as (memory, fd),
    ):
        os.pwrite(fd, bytes(as_bytes(X)), 0)
        places = {name: ForeignPlace(memory, 4 * LARGE, 4 * LARGE) for name in ("u", "y", "none")}
        feed = {"t": text, "x": ForeignArray(memory, 0, F4, X.shape)}
        for _ in range(3):
            u, y = placed_runs.run(session, None, feed, places, Deadline(DEADLINE))
            assert u.tolist() == ["a", "b"] and y == Written(F4, X.shape)
            y, u = placed_runs.run(session, ["y", "u"], feed, places, Deadline(DEADLINE))
            assert u.tolist() == ["a", "b"] and y == Written(F4, X.shape)
        assert os.pread(fd, 4 * LARGE, 4 * LARGE) == bytes(as_bytes(X))


@pytest.mark.parametrize("count", [MOST_NAMED - 1, MOST_NAMED, MOST_NAMED + 1])
def test_many_memories_in_one_call(module_host: ModelHost, count: int) -> None:
    names = [f"x{number}" for number in range(count)]
    graph = helper.make_graph(
        [helper.make_node("Sum", names, ["y"])],
        "sum",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"]) for name in names],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with (
        contextlib.ExitStack() as stack,
        InferenceSessionProxy(model.SerializeToString(), host=module_host) as session,
    ):
        files = [stack.enter_context(file(4 * LARGE, is_mapped=False)) for _ in names]
        for _, fd in files:
            os.pwrite(fd, bytes(as_bytes(X)), 0)
        feed = {n: ForeignArray(memory, 0, F4, X.shape) for n, (memory, _) in zip(names, files, strict=True)}
        place = ForeignPlace(files[0][0], 0, 4 * LARGE)
        expected = X
        for _ in range(3):
            placed_runs.run(session, None, feed, {"y": place}, Deadline(DEADLINE))
            expected = expected + (count - 1) * X
            assert os.pread(files[0][1], 4 * LARGE, 0) == bytes(as_bytes(expected))


def test_awaited_runs(late: InferenceSessionProxy, is_mapped: bool) -> None:
    async def work(memory: ForeignMemory, fd: int, size: int) -> None:
        array, place = ForeignArray(memory, 0, F4, (size,)), ForeignPlace(memory, 4 * LARGE, 4 * size)
        feed, places = {"x": array, "n": TURNS}, {"y": place}
        for names in (["y"], ["y"], None):
            (y,) = await placed_runs.arun(late, names, feed, places, DEADLINE)
            assert y == Written(F4, (size,))
            assert os.pread(fd, 4 * size, 4 * LARGE) == bytes(as_bytes(2 * X[:size]))
        with pytest.raises(PlaceTooSmall):
            await placed_runs.arun(late, ["y"], feed, {"y": place._replace(nbytes=8)}, DEADLINE)
        with pytest.raises(RunTimeout):
            await placed_runs.arun(late, ["y"], feed | {"n": FOR_EVER}, places, 0.1)
        task = asyncio.ensure_future(placed_runs.arun(late, ["y"], feed | {"n": FOR_EVER}, places, None))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        (y,) = await placed_runs.arun(late, ["y"], feed, places, DEADLINE)  # the worker is free again

    with file(8 * LARGE, is_mapped=is_mapped) as (memory, fd):
        os.pwrite(fd, bytes(as_bytes(X)), 0)
        for size in (SMALL, LARGE):
            asyncio.run(work(memory, fd, size))


def test_one_memory_in_many_calls_at_once(late: InferenceSessionProxy, is_mapped: bool) -> None:
    count = 8
    with file(8 * LARGE * count, is_mapped=is_mapped) as (memory, fd):

        def work(number: int) -> None:
            at = 8 * LARGE * number
            for turn in range(20):
                x = X + number + turn
                os.pwrite(fd, bytes(as_bytes(x)), at)
                run(
                    late,
                    ForeignArray(memory, at, F4, X.shape),
                    ForeignPlace(memory, at + 4 * LARGE, 4 * LARGE),
                )
                assert os.pread(fd, 4 * LARGE, at + 4 * LARGE) == bytes(as_bytes(2 * x))

        with ThreadPoolExecutor(count) as threads:
            list(threads.map(work, range(count)))
    late.run(None, {"x": X[:8], "n": TURNS})


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize(
    "how",
    [
        {"isolation": False},
        pytest.param(
            {"sandbox": True},
            marks=pytest.mark.skipif(not landlock.version(), reason="this kernel has no Landlock"),
        ),
    ],
    ids=["in-process", "sandbox"],
)
def test_where_no_worker_may_have_it(
    module_host: ModelHost, is_mapped: bool, size: int, how: dict[str, bool]
) -> None:
    make = functools.partial(InferenceSessionProxy, late_model(), host=module_host)
    with make(**how) as session, file(8 * LARGE, is_mapped=is_mapped) as (memory, fd):
        os.pwrite(fd, bytes(as_bytes(X)), 0)
        array, place = ForeignArray(memory, 0, F4, (size,)), ForeignPlace(memory, 4 * LARGE, 4 * size)
        feed, places = {"x": array, "n": TURNS}, {"y": place}
        for _ in range(3):
            assert run(session, array, place) == Written(F4, (size,))
            (y,) = asyncio.run(placed_runs.arun(session, ["y"], feed, places, DEADLINE))
            assert y == Written(F4, (size,))
            assert os.pread(fd, 4 * size, 4 * LARGE) == bytes(as_bytes(2 * X[:size]))
        with pytest.raises(PlaceTooSmall):
            run(session, array, place._replace(nbytes=8))
        os.ftruncate(fd, 0)
        with pytest.raises(ForeignMemoryError):
            run(session, array, place)
        if "sandbox" in how:
            assert held(pid_of(session)) == 0
