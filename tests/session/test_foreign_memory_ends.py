"""Memory of a third process that is truncated, closed, or dropped while runs use it."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import signal
import subprocess
import sys
import threading

import psutil
import pytest

from onnx_dl import (
    DescriptorsExhausted,
    ForeignMemoryError,
    InferenceSessionProxy,
    RunTimeout,
    WorkerDied,
)
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.session import placed_runs
from onnx_dl.tensors.foreign import ForeignArray, ForeignMemory, ForeignPlace, Written, as_bytes
from onnx_dl.tensors.foreign_tables import MOST_NAMED, RESERVE
from tests.support.foreign import F4, FOR_EVER, LARGE, SMALL, TURNS, X, file, held, pid_of, run
from tests.support.slow import LONG, RUNS
from tests.support.waiting import DEADLINE, allowed, eventually


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
            eventually(lambda: process.cpu_times().user > before + RUNS, "the run")
            os.ftruncate(fd, 0)

        thread = threading.Thread(target=truncate)
        thread.start()
        with pytest.raises(WorkerDied if is_mapped else ForeignMemoryError) as caught:
            run(late, array, place, LONG)
        thread.join(allowed(DEADLINE))
        if is_mapped:
            assert isinstance(caught.value, WorkerDied) and caught.value.signal == signal.SIGBUS
        os.ftruncate(fd, 8 * LARGE)
        assert run(late, array, place) == Written(F4, X.shape)


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
            timer.join(allowed(DEADLINE))
            assert run(late, array, place) == Written(F4, X.shape)


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
            thread.join(allowed(DEADLINE))
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
            told, _ = process.communicate("\n", allowed(DEADLINE))
            assert told.strip() in (f"{{{2.0 * number}}}", f"{{np.float32({2.0 * number})}}")
    late.run(None, {"x": X[:8], "n": TURNS})


def test_a_worker_with_few_descriptors_left(late: InferenceSessionProxy, is_mapped: bool) -> None:
    """It refuses the memory, and nothing else; when it has more again, the same memory is taken."""
    late.run(None, {"x": X[:8], "n": TURNS})
    pid = pid_of(late)
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    few = len(os.listdir(f"/proc/{pid}/fd")) + RESERVE // 2
    with file(8 * LARGE, is_mapped=is_mapped) as (memory, _):
        array, place = ForeignArray(memory, 0, F4, X.shape), ForeignPlace(memory, 4 * LARGE, 4 * LARGE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (few, limits[1]))
        try:
            for _ in range(2):
                with pytest.raises(DescriptorsExhausted, match=str(pid)):
                    run(late, array, place)
                assert held(pid) == 0
                assert (late.run(None, {"x": X[:8], "n": TURNS})[0] == 2 * X[:8]).all()
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        assert run(late, array, place) == Written(F4, X.shape)
        assert pid_of(late) == pid
