"""The ledger: booked when measured, given back when reaped."""

from __future__ import annotations

from onnx_dl.model import Usage
from onnx_dl.supervisor.ledger import Ledger


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
