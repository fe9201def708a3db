"""What a worker may use: it is replaced between two calls, and ended during one."""

from __future__ import annotations

import concurrent.futures
import copy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_dl import (
    ConfigError,
    EventType,
    ExecutionSession,
    InferenceSessionProxy,
    MemoryLimitExceeded,
    ModelEvent,
    ModelHost,
)
from tests.contract.both import CPU, I64, F, model, node, scaled, tensor
from tests.support.mlir import Compile, compiler
from tests.support.waiting import DEADLINE, allowed, eventually, is_gone, wait_for, worker_pid

pytestmark = pytest.mark.slow

MB = 1_000_000
CAP, LEAK = 300 * MB, 10 * MB
"""Bytes: what a worker may have after a call, and what each run of leak.c keeps."""
SLACK = 5 * MB
"""Bytes: code that the first runs touch, and a stack and a lane for each thread."""
EVER = 1 << 40


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    return compiler(tmp_path_factory.mktemp("caps"))


def own_memory(pid: int) -> int:
    """Bytes that are the process's own, as a worker counts them."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (kilobytes,) = [line.split()[1] for line in lines if line.startswith("RssAnon")]
    return int(kilobytes) * 1024


# --- between two calls -------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 4])
def test_a_leak_of_10_mb_per_run_under_a_cap_of_300(host: ModelHost, library: Compile, threads: int) -> None:
    """100 runs: nobody sees an error, and no worker has more than the cap and what is under way.

    A leak only grows, so a worker has the most when nothing runs any more; that is when its memory is
    measured for the event of its end.  What of that is pages of files is known from its beginning.
    """
    told: dict[EventType, list[ModelEvent]] = {kind: [] for kind in EventType}
    host.on_event(lambda event: told[event.type].append(event))
    gone = told[EventType.UNLOADED]
    session = ExecutionSession(library("leak"), host=host, max_memory="300MB")
    session.load()
    (fresh,) = host.snapshot().models
    at_first = own_memory(fresh.pid or 0)
    files = fresh.usage.rss - at_first

    def calls(thread: int) -> list[bool]:
        fed = [np.array([thread, turn], np.float32) for turn in range(100 // threads)]
        return [np.array_equal(session.run([x])[0], x) for x in fed]

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        assert [right for found in pool.map(calls, range(threads)) for right in found] == [True] * 100
    with session.session():  # the last run may have been the one too many for its worker
        (status,) = host.snapshot().models
    # Not by status.loads: a host forgets a model that is unloaded before its caller asks for it again.
    eventually(lambda: len(gone) == len(told[EventType.READY]) - 1, "all ends are told")
    assert {event.reason for event in gone} == {"recycled"}
    runs_each = (CAP - at_first) // LEAK + 1
    assert 100 // (runs_each + threads) <= len(gone) <= 100 // (runs_each - 1)
    for event in gone:
        assert CAP < (event.rss or 0) - files <= CAP + threads * LEAK + SLACK
    assert own_memory(status.pid or 0) <= CAP + threads * LEAK + SLACK


def test_the_caps_of_one_model_are_those_of_its_worker(host: ModelHost, library: Compile) -> None:
    """Who asks for others has another worker; the same, said otherwise, are the same."""
    given: list[dict] = [
        {},
        {"max_runs": 5},
        {"max_memory": "300MB"},
        {"max_memory": CAP},
        {"max_memory_hard": "300MB"},
        {"max_memory": "300MB", "max_memory_hard": "300MB"},
    ]
    sessions = [ExecutionSession(library("leak"), host=host, **terms) for terms in given]
    for session in sessions:
        session.load()
    assert sorted(status.leases for status in host.snapshot().models) == [1, 1, 2, 2]


@pytest.mark.parametrize("terms", [{"max_runs": 0}, {"max_memory_hard": "much"}, {"pin": True, "ttl": -2}])
def test_terms_that_cannot_be(host: ModelHost, library: Compile, terms: dict) -> None:
    with pytest.raises(ConfigError):
        ExecutionSession(library("leak"), host=host, **terms)


# --- during a call -----------------------------------------------------------------------------------------


def growing() -> bytes:
    """y = the sum of cos(sin(1)), ``size`` times, and of x after ``turns`` turns of a loop: 0 for x = 0."""
    body = helper.make_graph(
        [node("Sin", ["v"], ["w"]), node("Identity", ["go"], ["on"])],
        "body",
        [tensor("i", I64, []), tensor("go", TensorProto.BOOL, []), tensor("v", F, [])],
        [tensor("on", TensorProto.BOOL, []), tensor("w", F, [])],
    )
    nodes = [
        node("Expand", ["one", "size"], ["large"]),
        node("Sin", ["large"], ["s"]),
        node("Cos", ["s"], ["c"]),
        node("ReduceSum", ["c"], ["sum"], keepdims=0),
        node("Loop", ["turns", "", "x"], ["z"], body=body),
        node("Add", ["sum", "z"], ["y"]),
    ]
    inputs = [tensor("size", I64, [1]), tensor("turns", I64, []), tensor("x", F, [])]
    return model(nodes, inputs, [tensor("y", F, [])], [numpy_helper.from_array(np.float32([1]), "one")])


def grow(proxy: InferenceSessionProxy, size: int, turns: int = 0) -> float:
    feed = {"size": np.array([size]), "turns": np.array(turns), "x": np.float32(0)}
    return float(proxy.run(None, {name: np.asarray(value) for name, value in feed.items()})[0])


SMALL, LARGE = 4, 100 * MB
"""Elements: a run that takes nothing, and one that takes 400 MB and more."""
RIGHT = pytest.approx(SMALL * np.cos(np.sin(1.0)))


def test_max_memory_alone_ends_no_run(host: ModelHost) -> None:
    """However much it takes: its worker is replaced afterwards."""
    proxy = InferenceSessionProxy(growing(), providers=CPU, host=host, max_memory="75MB")
    assert grow(proxy, SMALL) == RIGHT
    pid = worker_pid(host)
    with host.events() as events:
        assert grow(proxy, LARGE) == pytest.approx(LARGE * np.cos(np.sin(1.0)), rel=0.2)  # summed in float32
        gone = wait_for(events, EventType.UNLOADED)
    assert (gone.reason, gone.pid) == ("recycled", pid)
    assert grow(proxy, SMALL) == RIGHT


def test_a_run_that_takes_too_much_is_ended(host: ModelHost) -> None:
    proxy = InferenceSessionProxy(growing(), providers=CPU, host=host, max_memory_hard="150MB")
    assert grow(proxy, SMALL) == RIGHT
    pid = worker_pid(host)
    with host.events() as events:
        with pytest.raises(MemoryLimitExceeded, match=r"max_memory_hard is 150\.0 MB") as caught:
            grow(proxy, LARGE)
        failed = wait_for(events, EventType.FAILED)
    error = caught.value
    assert (error.pid, error.limit, error.retry_after) == (pid, 150 * MB, 0)
    assert error.used > error.limit
    assert isinstance(error, MemoryError)
    assert failed.detail and "max_memory_hard" in failed.detail
    assert is_gone(pid)
    assert grow(proxy, SMALL) == RIGHT


def test_calls_of_others_in_that_worker_end_with_it(host: ModelHost) -> None:
    """A thread that computes gets the same error, from the same figures."""
    proxy = InferenceSessionProxy(growing(), providers=CPU, host=host, max_memory_hard="150MB")
    assert grow(proxy, SMALL) == RIGHT
    # A call is busy for a moment after its answer.
    eventually(lambda: not host.snapshot().models[0].busy, "the end of the first call")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        other = pool.submit(grow, proxy, SMALL, EVER)
        eventually(lambda: host.snapshot().models[0].busy, "the other call runs")
        with pytest.raises(MemoryLimitExceeded) as caught:
            grow(proxy, LARGE)
        with pytest.raises(MemoryLimitExceeded) as another:
            other.result(allowed(DEADLINE))
    assert (another.value.pid, another.value.used) == (caught.value.pid, caught.value.used)
    assert grow(proxy, SMALL) == RIGHT


def test_calls_that_it_had_not_begun_are_made_elsewhere(host: ModelHost) -> None:
    """Of threads that call all the time, none has more than the one error of the call that it was at."""
    proxy = InferenceSessionProxy(growing(), providers=CPU, host=host, max_memory_hard="150MB")
    over = threading.Event()

    def calls() -> int:
        errors, last = 0, False
        while not last:
            last = over.is_set()
            try:
                assert grow(proxy, SMALL) == RIGHT
            except MemoryLimitExceeded:
                errors += 1
        return errors

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        threads = [pool.submit(calls) for _ in range(4)]
        eventually(lambda: any(status.runs > 20 for status in host.snapshot().models), "they call")
        with pytest.raises(MemoryLimitExceeded) as caught:
            grow(proxy, LARGE)
        over.set()
        assert all(thread.result(allowed(DEADLINE)) <= 1 for thread in threads)
    assert worker_pid(host) != caught.value.pid


def test_what_stays_below_the_cap_is_left_alone(host: ModelHost) -> None:
    """Also where calls follow each other, and the watchdog sleeps and wakes."""
    proxy = InferenceSessionProxy(growing(), providers=CPU, host=host, max_memory_hard="4GB")
    results = [grow(proxy, size) for size in [SMALL, LARGE // 4] + [SMALL] * 50]
    assert results[0] == results[-1] == RIGHT
    # A call is counted just after it is answered.
    eventually(
        lambda: [(s.loads, s.runs) for s in host.snapshot().models] == [(1, 52)], "the last call counts"
    )


def test_a_hard_cap_below_the_other_is_refused(host: ModelHost) -> None:
    with pytest.raises(ConfigError, match="max_memory_hard='100MB' is less than max_memory='200MB'"):
        InferenceSessionProxy(scaled(), host=host, max_memory="200MB", max_memory_hard="100MB")


# --- copies ------------------------------------------------------------------------------------------------


def test_a_copy_of_a_compiled_model_has_its_terms(host: ModelHost, library: Compile) -> None:
    proxy: Any = ExecutionSession(library("leak"), host=host, pin=True, priority=3, max_runs=9)
    again = copy.copy(proxy)
    proxy.close()
    assert again.run([np.ones(1, np.float32)])[0] == 1
    (status,) = host.snapshot().models
    assert (status.pinned, status.priority) == (True, 3)
