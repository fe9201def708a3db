"""Runs with inputs and results in memory of a third process, which may do with it what it likes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from onnx_dl import (
    ForeignMemoryError,
    InferenceSessionProxy,
    ModelHost,
    PlaceTooSmall,
    RunTimeout,
    WorkerDied,
)
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.session import placed_runs
from onnx_dl.tensors.foreign import ForeignArray, ForeignMemory, ForeignPlace, Written, as_bytes
from onnx_dl.tensors.foreign_tables import MOST_NAMED
from onnx_dl.workers.sandbox import landlock
from tests.support.slow import identity_model, late_model
from tests.support.waiting import DEADLINE, eventually

F4 = np.dtype(np.float32)
LARGE = 1 << 16
"""Items; more bytes than this process copies itself."""
SMALL = 64
X = np.arange(LARGE, dtype=np.float32)
TURNS = np.array(3)
FOR_EVER = np.array(1 << 50)


@pytest.fixture(params=["copy", "map"])
def is_mapped(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "map")


@pytest.fixture
def late(module_host: ModelHost) -> Iterator[InferenceSessionProxy]:
    with InferenceSessionProxy(late_model(), host=module_host) as session:
        yield session


@contextlib.contextmanager
def file(nbytes: int, *, is_mapped: bool) -> Iterator[tuple[ForeignMemory, int]]:
    """A memory that is not sealed, and a descriptor of what its maker has."""
    fd = os.memfd_create("foreign-test")
    os.ftruncate(fd, nbytes)
    with contextlib.closing(ForeignMemory(os.dup(fd), nbytes, is_mapped=is_mapped)) as memory:
        try:
            yield memory, fd
        finally:
            os.close(fd)


def run(
    session: InferenceSessionProxy, array: ForeignArray, place: ForeignPlace, turns: NDArray[np.int64] = TURNS
) -> object:
    feed = {"x": array, "n": turns}
    (result,) = placed_runs.run(session, ["y"], feed, {"y": place}, Deadline(DEADLINE))
    return result


def pid_of(session: InferenceSessionProxy) -> int:
    (pid,) = [s.pid for s in session._handle.host.snapshot().models if s.key == session._handle.spec.key]
    assert pid is not None
    return pid


def held(pid: int) -> int:
    """Descriptors and mappings of such memories in a process."""
    found = 0
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found += "foreign-test" in os.readlink(f"/proc/{pid}/fd/{fd}")
    with open(f"/proc/{pid}/maps") as maps:
        return found + sum("foreign-test" in line for line in maps)


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


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_truncated_memory_is_an_error_of_the_call(
    late: InferenceSessionProxy, is_mapped: bool, size: int
) -> None:
    nbytes = 4 * size
    with file(2 * nbytes, is_mapped=is_mapped) as (memory, fd):
        array, place = ForeignArray(memory, 0, F4, (size,)), ForeignPlace(memory, nbytes, nbytes)
        for _ in range(2):
            run(late, array, place)
        pid = pid_of(late)
        for left in (nbytes - 1, nbytes, 0):  # the input is short; the place is; both are
            os.ftruncate(fd, left)
            with pytest.raises(ForeignMemoryError):
                run(late, array, place)
            assert os.fstat(fd).st_size == left, "a write has lengthened the maker's file"
        os.ftruncate(fd, 2 * nbytes)
        assert run(late, array, place) == Written(F4, (size,))
        assert pid_of(late) == pid


def test_truncated_while_the_engine_runs(late: InferenceSessionProxy, is_mapped: bool) -> None:
    """Mapped: the worker ends by SIGBUS, and the next call has another.  Copied: nothing happens."""
    with file(8 * LARGE, is_mapped=is_mapped) as (memory, fd):
        array, place = ForeignArray(memory, 0, F4, X.shape), ForeignPlace(memory, 4 * LARGE, 4 * LARGE)
        run(late, array, place)
        before = psutil.Process(pid_of(late)).cpu_times().user

        def truncate() -> None:
            process = psutil.Process(pid_of(late))
            eventually(lambda: process.cpu_times().user > before + 0.05, "the run")
            os.ftruncate(fd, 0)

        thread = threading.Thread(target=truncate)
        thread.start()
        with pytest.raises(WorkerDied if is_mapped else ForeignMemoryError) as caught:
            run(late, array, place, np.array(400_000))
        thread.join(DEADLINE)
        if is_mapped:
            assert isinstance(caught.value, WorkerDied) and caught.value.signal == signal.SIGBUS
        os.ftruncate(fd, 8 * LARGE)
        assert run(late, array, place) == Written(F4, X.shape)


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


def test_a_closed_memory_leaves_the_worker(late: InferenceSessionProxy, is_mapped: bool) -> None:
    """With the next call of any kind; a call that repeats is usually only a number."""
    plain = {"x": X[:8], "n": TURNS}
    for _ in range(3):
        late.run(None, plain)
    for _ in range(2):
        with file(8 * LARGE, is_mapped=is_mapped) as (memory, _):
            array, place = ForeignArray(memory, 0, F4, X.shape), ForeignPlace(memory, 4 * LARGE, 4 * LARGE)
            for _ in range(3):
                run(late, array, place)
            assert held(pid_of(late)) == 1 + is_mapped
        with pytest.raises(ForeignMemoryError, match="not registered any more"):
            run(late, array, place)
        for _ in range(3):
            assert (late.run(None, plain)[0] == 2 * X[:8]).all()
        assert held(pid_of(late)) == 0
    assert held(os.getpid()) == 0


def test_a_memory_leaves_an_idle_worker(late: InferenceSessionProxy, is_mapped: bool) -> None:
    with file(8 * LARGE, is_mapped=is_mapped) as (memory, _):
        array, place = ForeignArray(memory, 0, F4, X.shape), ForeignPlace(memory, 4 * LARGE, 4 * LARGE)
        for _ in range(3):
            run(late, array, place)
    assert held(pid_of(late)) == 1 + is_mapped
    model = late._handle.in_use()
    assert model is not None
    pool = model.worker.pool  # type: ignore[attr-defined]
    pool.tidy(0.0)  # what the connection does every few seconds
    assert held(pid_of(late)) == 0


def test_a_memory_that_nobody_closed(late: InferenceSessionProxy) -> None:
    with file(8 * LARGE, is_mapped=False) as (_, fd):
        memory = ForeignMemory(os.dup(fd), 8 * LARGE, is_mapped=False)
        run(late, ForeignArray(memory, 0, F4, X.shape), ForeignPlace(memory, 4 * LARGE, 4 * LARGE))
        assert held(pid_of(late)) == 1
        del memory
        late.run(None, {"x": X[:8], "n": TURNS})
        assert held(pid_of(late)) == 0


def test_many_memories_one_after_another(late: InferenceSessionProxy) -> None:
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(file(8 * LARGE, is_mapped=False)) for _ in range(MOST_NAMED + 8)]
        for _ in range(2):
            for memory, fd in files:
                os.pwrite(fd, bytes(as_bytes(X)), 0)
                run(late, ForeignArray(memory, 0, F4, X.shape), ForeignPlace(memory, 4 * LARGE, 4 * LARGE))
                assert os.pread(fd, 4 * LARGE, 4 * LARGE) == bytes(as_bytes(2 * X))
        assert held(pid_of(late)) == MOST_NAMED
    late.run(None, {"x": X[:8], "n": TURNS})
    assert held(pid_of(late)) == 0


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


def test_another_thread_ends_a_run(late: InferenceSessionProxy, is_mapped: bool) -> None:
    with file(8 * LARGE, is_mapped=is_mapped) as (memory, _):
        array, place = ForeignArray(memory, 0, F4, X.shape), ForeignPlace(memory, 4 * LARGE, 4 * LARGE)
        feed = {"x": array, "n": FOR_EVER}
        for _ in range(3):
            run(late, array, place)
        for _ in range(2):
            deadline = Deadline(None, movable=True)
            timer = threading.Timer(0.1, deadline.end)
            timer.start()
            with pytest.raises(RunTimeout):
                placed_runs.run(late, ["y"], feed, {"y": place}, deadline)
            timer.join(DEADLINE)
            assert run(late, array, place) == Written(F4, X.shape)


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


def test_closed_while_calls_use_it(late: InferenceSessionProxy) -> None:
    """A call that has begun ends with its result; a later one is refused.  Nothing else comes of it."""
    done = itertools.count()
    for _ in range(10):
        with file(8 * LARGE, is_mapped=False) as (memory, _):
            array, place = ForeignArray(memory, 0, F4, X.shape), ForeignPlace(memory, 4 * LARGE, 4 * LARGE)

            def work(array: ForeignArray = array, place: ForeignPlace = place) -> None:
                with contextlib.suppress(ForeignMemoryError):
                    while True:
                        assert run(late, array, place) == Written(F4, X.shape)
                        next(done)

            threads = [threading.Thread(target=work) for _ in range(3)]
            for thread in threads:
                thread.start()
            enough = next(done) + 20
            eventually(lambda enough=enough: next(done) > enough, "some calls")
        for thread in threads:
            thread.join(DEADLINE)
            assert not thread.is_alive()
    for _ in range(8):  # on each lane
        late.run(None, {"x": X[:8], "n": TURNS})
    late._handle.in_use().worker.pool.tidy(0.0)  # type: ignore[union-attr]
    pid = pid_of(late)
    eventually(lambda: held(pid) == 0, "the end of the lanes that are not needed")


def test_a_worker_that_was_unloaded(late: InferenceSessionProxy, is_mapped: bool) -> None:
    with file(8 * LARGE, is_mapped=is_mapped) as (memory, _):
        array, place = ForeignArray(memory, 0, F4, X.shape), ForeignPlace(memory, 4 * LARGE, 4 * LARGE)
        for _ in range(3):
            assert run(late, array, place) == Written(F4, X.shape)
            late.unload()


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


def test_memory_of_two_other_processes(late: InferenceSessionProxy, is_mapped: bool) -> None:
    """Each makes a file, writes an input, and reads the result when it is told to."""
    program = (
        "import mmap, os, sys, numpy as np\n"
        f"fd = os.memfd_create('foreign-test'); os.ftruncate(fd, {8 * LARGE}); view = mmap.mmap(fd, 0)\n"
        f"x = np.frombuffer(view, 'f4', {LARGE}); x[:] = int(sys.argv[1])\n"
        "print(fd, flush=True); sys.stdin.readline()\n"
        f"print(set(np.frombuffer(view, 'f4', {LARGE}, {4 * LARGE})), flush=True)"
    )
    with contextlib.ExitStack() as stack:
        made: list[tuple[subprocess.Popen[str], ForeignMemory]] = []
        for number in (3, 4):
            command = [sys.executable, "-c", program, str(number)]
            process = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            assert process.stdout is not None
            fd = os.open(f"/proc/{process.pid}/fd/{process.stdout.readline().strip()}", os.O_RDWR)
            memory = stack.enter_context(
                contextlib.closing(ForeignMemory(fd, 8 * LARGE, is_mapped=is_mapped))
            )
            made.append((process, memory))
        for _, memory in made * 3:
            run(late, ForeignArray(memory, 0, F4, X.shape), ForeignPlace(memory, 4 * LARGE, 4 * LARGE))
        for number, (process, _) in zip((3, 4), made, strict=True):
            told, _ = process.communicate("\n", DEADLINE)
            assert told.strip() in (f"{{{2.0 * number}}}", f"{{np.float32({2.0 * number})}}")
    late.run(None, {"x": X[:8], "n": TURNS})
