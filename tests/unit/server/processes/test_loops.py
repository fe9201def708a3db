"""The loop's own threads, and those for long waits."""

from __future__ import annotations

import asyncio
import threading

import pytest

from onnx_dl.server.processes import loops
from onnx_dl.server.repository.waits import wait_in_thread
from tests.support.waiting import DEADLINE, allowed, eventually


@pytest.fixture(autouse=True)
def asyncios_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """uvloop would leave a pipe to the end of the process."""
    monkeypatch.setattr(loops, "_factory", lambda: None)


def test_short_work_of_many_requests_runs_side_by_side() -> None:
    """Also on a machine of two cores."""
    together = threading.Barrier(32)

    async def work() -> int:
        async with asyncio.timeout(allowed(DEADLINE)):
            waits = (asyncio.to_thread(together.wait, allowed(DEADLINE)) for _ in range(together.parties))
            return len(set(await asyncio.gather(*waits)))

    assert loops.run(work()) == 32


def test_long_waits_leave_the_loops_threads_free() -> None:
    end = threading.Event()

    async def work() -> int:
        async with asyncio.timeout(allowed(DEADLINE)):
            waits = [asyncio.ensure_future(wait_in_thread(end.wait, allowed(DEADLINE))) for _ in range(40)]
            await asyncio.to_thread(end.set)
            return sum(await asyncio.gather(*waits))

    assert loops.run(work()) == 40
    eventually(lambda: not any("onnx-dl-wait" in each.name for each in threading.enumerate()), "their end")
