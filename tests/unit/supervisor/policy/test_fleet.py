"""The ledger: booked when measured, given back when reaped."""

from __future__ import annotations

from onnx_dl.core.status import Usage
from onnx_dl.supervisor.policy.fleet import Ledger
from onnx_dl.supervisor.policy.memory_amount import NOTHING, MemoryAmount


def test_nothing_booked():
    ledger = Ledger()
    assert ledger.of(1) == Usage(0, 0, None)
    assert ledger.give_back(1) == Usage(0, 0, None)


def test_the_last_figure_counts():
    ledger = Ledger()
    ledger.book(1, Usage(10, 5, 3))
    ledger.book(1, Usage(20, 15))
    assert ledger.of(1) == Usage(20, 15)


def test_given_back_once():
    ledger = Ledger()
    ledger.book(1, Usage(10, 5, 3))
    ledger.book(2, Usage(1, 1))
    assert ledger.give_back(1) == Usage(10, 5, 3)
    assert ledger.give_back(1) == Usage()
    assert ledger.of(2) == Usage(1, 1)
    ledger.give_back(2)
    assert ledger.of(2) == Usage()


def test_what_is_reserved_counts_until_more_is_measured():
    ledger = Ledger()
    ledger.reserve(1, MemoryAmount(100, 10))
    assert ledger.counted(1) == MemoryAmount(100, 10)
    ledger.book(1, Usage(pss=60, gpu=40))
    assert ledger.counted(1) == MemoryAmount(100, 40)
    ledger.reserve(1, NOTHING)
    assert ledger.counted(1) == MemoryAmount(60, 40)
    ledger.give_back(1)
    assert ledger.counted(1) == NOTHING


def test_gpu_memory_is_back_when_the_driver_says_so_or_after_two_seconds():
    ledger = Ledger()
    for worker_id in (1, 2, 3):
        ledger.book(worker_id, Usage(pss=9, gpu=10 * worker_id, gpu_estimated=worker_id == 3))
        ledger.hold_gpu(worker_id, 100 + worker_id, 50.0)
        ledger.give_back(worker_id)
    assert ledger.lingering(50.1) == MemoryAmount(0, 60)
    assert ledger.lingering_pids(50.1) == {1: 101, 2: 102}  # the driver never showed the third
    ledger.release_gpu(1)
    assert ledger.lingering(51.9) == MemoryAmount(0, 50)
    assert (ledger.lingering_pids(52.0), ledger.lingering(52.0)) == ({}, NOTHING)


def test_who_had_nothing_on_a_gpu_leaves_nothing():
    ledger = Ledger()
    ledger.book(1, Usage(pss=9))
    ledger.hold_gpu(1, 101, 0.0)
    assert ledger.lingering_pids(0.0) == {}
