"""The ledger: booked when measured, given back when reaped."""

from __future__ import annotations

from onnx_dl.core.status import Usage
from onnx_dl.supervisor.policy.ledger import Ledger
from onnx_dl.supervisor.policy.requirements import NOTHING, Bytes


def test_nothing_booked():
    ledger = Ledger()
    assert ledger.of(1) == Usage(0, 0, None)
    assert ledger.total() == Usage(0, 0, None)
    assert ledger.give_back(1) == Usage(0, 0, None)


def test_the_last_figure_counts():
    ledger = Ledger()
    ledger.book(1, Usage(10, 5, 3))
    ledger.book(1, Usage(20, 15))
    assert ledger.of(1) == Usage(20, 15)
    assert ledger.total() == Usage(20, 15)


def test_total_over_workers_with_and_without_a_gpu():
    ledger = Ledger()
    ledger.book(1, Usage(10, 5))
    assert ledger.total().gpu is None
    ledger.book(2, Usage(100, 50, 0))
    assert ledger.total() == Usage(110, 55, 0)
    ledger.book(3, Usage(1, 1, 7))
    assert ledger.total() == Usage(111, 56, 7)


def test_given_back_once():
    ledger = Ledger()
    ledger.book(1, Usage(10, 5, 3))
    ledger.book(2, Usage(1, 1))
    assert ledger.give_back(1) == Usage(10, 5, 3)
    assert ledger.give_back(1) == Usage()
    assert ledger.total() == Usage(1, 1)
    ledger.give_back(2)
    assert ledger.total() == Usage()


def test_what_is_reserved_counts_until_more_is_measured():
    ledger = Ledger()
    ledger.reserve(1, Bytes(100, 10))
    assert ledger.counted(1) == Bytes(100, 10)
    ledger.book(1, Usage(pss=60, gpu=40))
    assert ledger.counted(1) == Bytes(100, 40)
    ledger.reserve(1, NOTHING)
    assert ledger.counted(1) == Bytes(60, 40)
    ledger.give_back(1)
    assert ledger.counted(1) == NOTHING


def test_gpu_memory_is_back_when_the_driver_says_so_or_after_two_seconds():
    ledger = Ledger()
    for worker_id in (1, 2, 3):
        ledger.book(worker_id, Usage(pss=9, gpu=10 * worker_id, gpu_estimated=worker_id == 3))
        ledger.haunt(worker_id, 100 + worker_id, 50.0)
        ledger.give_back(worker_id)
    assert ledger.afterglow(50.1) == Bytes(0, 60)
    assert ledger.ghosts(50.1) == {1: 101, 2: 102}  # the driver never showed the third
    ledger.lay(1)
    assert ledger.afterglow(51.9) == Bytes(0, 50)
    assert (ledger.ghosts(52.0), ledger.afterglow(52.0)) == ({}, NOTHING)


def test_who_had_nothing_on_a_gpu_leaves_nothing():
    ledger = Ledger()
    ledger.book(1, Usage(pss=9))
    ledger.haunt(1, 101, 0.0)
    assert ledger.ghosts(0.0) == {}
