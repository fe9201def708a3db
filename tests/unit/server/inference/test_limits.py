"""Bounds of requests and bytes, over threads and processes."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import threading
import weakref
from collections.abc import Callable

import pytest

from onnx_dl.server.inference.limits import (
    COLUMNS,
    Limits,
    create_page,
    default_max_bytes,
    queue_bound,
)
from onnx_dl.server.interfaces import Served
from onnx_dl.server.v2.failures import RequestFailure


def served(slot: int = 0, max_queue_size: int = 0, max_batch_size: int = 0) -> Served:
    return Served(
        name="m", version="1", path="", generation="",
        slot=slot, max_queue_size=max_queue_size, max_batch_size=max_batch_size,
    )  # fmt: skip


def test_answers_that_wait_are_in_flight_and_keep_new_requests_out() -> None:
    limits = Limits(100)
    limits.take_bytes(60)
    limits.check_bytes()
    limits.add_bytes(50)
    with pytest.raises(RequestFailure) as caught:
        limits.check_bytes()
    assert caught.value.http == 429
    limits.free_bytes(50)
    limits.check_bytes()


def test_the_bound_of_a_queue() -> None:
    assert queue_bound(served(), 0) == 64
    assert queue_bound(served(max_batch_size=8), 0) == 64
    assert queue_bound(served(max_batch_size=100), 0) == 400
    assert queue_bound(served(max_batch_size=100), 5) == 5
    assert queue_bound(served(max_queue_size=7), 5) == 7


def test_the_bound_of_bytes() -> None:
    assert default_max_bytes(400) == 100
    assert default_max_bytes(None) > 1 << 20
    assert Limits(0).max_bytes == default_max_bytes(None)


def test_a_full_queue_refuses_until_one_leaves() -> None:
    limits, entry, other = Limits(), served(1, 2), served(2, 2)
    columns = [limits.enter(entry) for _ in range(2)]
    with pytest.raises(RequestFailure, match="2 requests of model 'm' wait or run") as caught:
        limits.enter(entry)
    failure = caught.value
    assert (failure.http, failure.grpc, failure.reason) == (429, "RESOURCE_EXHAUSTED", "REJECTED")
    assert failure.retry_after == 1.0
    assert limits.pending(entry) == 2
    limits.enter(other)
    limits.leave(columns[0])
    limits.enter(entry)
    assert (limits.pending(entry), limits.pending(other)) == (2, 1)


def test_full_memory_refuses_until_some_is_free() -> None:
    limits = Limits(100)
    limits.take_bytes(60)
    with pytest.raises(RequestFailure, match="60 bytes are in flight, and 41 more") as caught:
        limits.take_bytes(41)
    assert caught.value.http == 429
    limits.take_bytes(40)
    limits.free_bytes(60)
    assert limits.bytes_in_flight == 40


def test_what_is_larger_than_the_bound_is_refused_for_ever() -> None:
    limits = Limits(100)
    with pytest.raises(RequestFailure, match="larger than") as caught:
        limits.take_bytes(101)
    assert (caught.value.http, caught.value.retry_after) == (413, None)
    assert limits.bytes_in_flight == 0


def test_slots_beyond_the_page_share_a_column() -> None:
    limits = Limits()
    limits.enter(served(3))
    assert limits.pending(served(3 + COLUMNS - 1)) == 1


def test_processes_sum_their_rows() -> None:
    fd = create_page(2)
    try:
        one, two = Limits(100, fd=fd, row=0, rows=2), Limits(100, fd=fd, row=1, rows=2)
    finally:
        os.close(fd)
    entry = served(5, 3)
    one.enter(entry)
    two.enter(entry)
    two.enter(entry)
    with pytest.raises(RequestFailure):
        one.enter(entry)
    two.take_bytes(80)
    with pytest.raises(RequestFailure):
        one.take_bytes(21)
    one.take_bytes(20)
    one.clear(1)  # the other process is gone
    assert (one.pending(entry), one.bytes_in_flight) == (1, 20)


def _fill(fd: int, row: int, results: multiprocessing.SimpleQueue[int]) -> None:
    limits, entered = Limits(fd=fd, row=row, rows=3), 0
    for _ in range(2000):
        try:
            limits.enter(served(1, 1000))
            entered += 1
        except RequestFailure:
            pass
    results.put(entered)


def test_a_bound_holds_for_processes_that_come_at_once() -> None:
    fd = create_page(3)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    try:
        processes = [context.Process(target=_fill, args=(fd, row, results)) for row in range(2)]
        for process in processes:
            process.start()
        entered = [results.get() for _ in processes]
        for process in processes:
            process.join(20)
            assert process.exitcode == 0
        limits = Limits(fd=fd, row=2, rows=3)
    finally:
        os.close(fd)
    # Two that come to the last places at once may both be refused, but never both be let in.
    assert 990 <= sum(entered) <= 1000
    assert limits.pending(served(1)) == sum(entered)


def test_threads_lose_no_count() -> None:
    limits, entry = Limits(1 << 40), served(1, 1 << 30)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work() -> None:
        for _ in range(3000):
            column = limits.enter(entry)
            limits.take_bytes(3)
            limits.leave(column)

    threads = [threading.Thread(target=work) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    finally:
        sys.setswitchinterval(before)
    assert limits.pending(entry) == 0
    assert limits.bytes_in_flight == 4 * 3000 * 3


class _Cycle:
    """Garbage that only the collector frees, in whichever step of a thread it runs."""

    def __init__(self, free: Callable[[], None]) -> None:
        self.me = self
        weakref.finalize(self, free)


def test_finalizers_at_any_step_lose_no_count() -> None:
    limits, entry = Limits(1 << 40), served(1, 1 << 30)
    thresholds = gc.get_threshold()
    gc.set_threshold(3, 1, 1)
    try:
        for _ in range(3000):
            limits.take_bytes(5)
            _Cycle(lambda: limits.free_bytes(5))
            limits.leave(limits.enter(entry))
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    assert limits.bytes_in_flight == 0
    assert limits.pending(entry) == 0
