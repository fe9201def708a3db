"""What a worker remembers of a call that repeats."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnx_dl.transport import messages as m
from onnx_dl.workers.backend import Repeatable
from onnx_dl.workers.halt import Halt
from onnx_dl.workers.repeats import Repeat
from tests.unit.builders import arena


class Lane:
    """A worker's end whose arena replaces its scratch block at the next request for one."""

    def __init__(self) -> None:
        self.arena, _ = arena()
        self.current_scratch = self.arena.scratch(1)
        self._next = self.arena.lease(1)

    def scratch(self, nbytes: int) -> Any:
        return self._next


class Backend:
    def repeat(self, outputs: Any, feed: Any, results: Any) -> Any:
        return Repeatable(lambda: None, None)


def test_results_are_never_written_where_the_caller_does_not_read():
    """An arena may shrink between two calls; Same would then have the caller read the block of before."""
    lane: Any = Lane()
    call = m.Call(outputs=m.Plain(None), feed=[], plan=0)
    repeat = Repeat(call, None, {})
    repeat.learn(m.Items("list", [m.Tensor("<f4", (4,), lane.current_scratch.number, 0)]), lane)
    backend: Any = Backend()
    assert repeat.run(lane, backend, {"x": np.zeros(1)}, [], Halt()) is None
