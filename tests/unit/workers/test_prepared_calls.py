"""What a worker remembers of a call that repeats."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnx_dl.protocol import lane as m
from onnx_dl.workers.engines.base import BoundRun, CancelToken, Rerun
from onnx_dl.workers.prepared_calls import PreparedCall
from tests.support.builders import arena


class Lane:
    """A worker's end whose arena replaces its scratch block at the next request for one."""

    def __init__(self) -> None:
        self.arena, _ = arena()
        self.arena.scratch(1)
        another: Any = self.arena.take(1)
        self.arena.scratch = lambda nbytes: another  # type: ignore[method-assign]


class Backend:
    def __init__(self) -> None:
        self.runs: list[str] = []

    def bind(self, outputs: Any, feed: Any, results: Any) -> Any:
        return BoundRun(lambda: None, None)

    def run(self, *_: Any) -> list[Any]:
        self.runs.append("run")
        return []

    def rerun(self, outputs: Any) -> Rerun:
        self.runs.append("prepared")

        def run(feed: dict[str, Any]) -> list[Any]:
            self.runs.append("rerun")
            return []

        return Rerun(run, lambda: None)


def test_results_are_never_written_where_the_caller_does_not_read():
    """An arena may shrink between two calls; Same would then have the caller read the block of before."""
    lane: Any = Lane()
    call = m.Call(outputs=m.Plain(None), feed=[], plan=0)
    repeat = PreparedCall(call, None, {})
    repeat.learn(m.Items("list", [m.Tensor("<f4", (4,), lane.arena.current_scratch.number, 0)]), lane)
    backend: Any = Backend()
    assert not repeat.run(lane, backend, {"x": np.zeros(1)}, [], CancelToken())


def repeat_of(*feed: tuple[str, Any]) -> PreparedCall:
    return PreparedCall(m.Call(outputs=m.Plain(None), feed=list(feed), plan=0), None, dict(feed))


def test_a_run_that_was_told_to_end_is_prepared_anew():
    """What told it would tell the next one, too."""
    repeat, backend, token = repeat_of(), Backend(), CancelToken()
    for number in range(4):
        token.number = number
        if number == 2:
            token.cancel(2)
        repeat.run_unbound(backend, {}, token)  # type: ignore[arg-type]
    assert backend.runs == ["prepared", "run", "rerun", "rerun", "prepared", "run"]


def test_another_scratch_block_is_left():
    """What lay in the one before would never be freed."""
    lane: Any = Lane()
    repeat, block = repeat_of(), lane.arena.current_scratch
    repeat.learn(m.Items("list", [m.Packed(block.number, 0)]), lane)
    repeat.on_scratch(block)
    assert repeat.form is not None
    repeat.on_scratch(lane.arena.scratch(1))
    assert repeat.form is None
