"""Calls that one caller makes again and again, as the worker remembers them.

The caller's side is :mod:`onnx_dl.transport.plans`.  A call whose inputs always lie in the same places, and
whose results are small and of the same shapes as before, is prepared once: the engine then reads and writes
shared memory, and nothing is packed, unpacked or looked up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from onnx_dl.errors import ProtocolError
from onnx_dl.transport import messages as m
from onnx_dl.transport.arena import Block, align
from onnx_dl.transport.lane import WorkerLane
from onnx_dl.workers.backend import Backend


class Repeat:
    """One call.  Its arrays are views of the caller's memory."""

    def __init__(self, call: m.Call, outputs: Any, feed: dict[str, Any]) -> None:
        self.outputs = outputs
        self.feed = feed
        self.names = list(feed)
        self.blocks = {value.block for _, value in call.feed if isinstance(value, m.Tensor) and value.block}
        self._run: Callable[[], object] | None = None
        self._block: Block | None = None
        self._nbytes = 0
        self._preparable = True

    def run_in_place(self, lane: WorkerLane) -> bool:
        """Runs the call as it was prepared; false if it was not, or its results have other shapes now."""
        if self._run is None or not lane.is_in_place(self._block, self._nbytes):
            return False
        try:
            self._run()
        except Exception:  # the plain way shall tell, or find other shapes
            self._run, self._preparable = None, False
            return False
        return True

    def prepare(self, lane: WorkerLane, backend: Backend, sent: m.Value) -> None:
        """The results were just sent: the next ones may lie where these do."""
        places = lane.places(sent) if self._preparable else None
        if places is not None:
            self._block, results = places
            self._nbytes = sum(align(result.nbytes) for result in results)
            self._run = backend.repeat(self.outputs, self.feed, results)


class Repeats:
    """All that one caller repeats."""

    def __init__(self, lane: WorkerLane, backend: Backend) -> None:
        self._lane = lane
        self._backend = backend
        self._repeats: dict[int, Repeat] = {}

    def remember(self, number: int, repeat: Repeat) -> None:
        """Keeps a call; drops those whose memory its caller has dropped, else that would never be freed."""
        kept = {n: r for n, r in self._repeats.items() if all(map(self._lane.has, r.blocks))}
        self._repeats = {**kept, number: repeat}

    def answer(self, again: m.Again) -> None:
        """Runs a remembered call and replies.

        Raises:
            ProtocolError: there is none of that number.
            Exception: the engine's.
        """
        repeat = self._repeats.get(again.plan)
        if repeat is None:
            raise ProtocolError(f"A caller repeats call {again.plan}, which it never made.")
        if again.moved:
            self._run_moved(repeat, again)
        elif repeat.run_in_place(self._lane):
            self._lane.reply_same()
        else:
            repeat.prepare(self._lane, self._backend, self._lane.reply(self._run(repeat, repeat.feed)))

    def _run_moved(self, repeat: Repeat, again: m.Again) -> None:
        moved = {repeat.names[index]: self._lane.unpack(tensor) for index, tensor in again.moved}
        self._lane.reply(self._run(repeat, repeat.feed | moved))

    def _run(self, repeat: Repeat, feed: dict[str, NDArray[Any]]) -> Any:
        return self._backend.run(repeat.outputs, feed, None, self._lane.place)
