"""``session()`` blocks of one model, and the loads that they hold.  No lock."""

from __future__ import annotations

import collections
import time
from typing import NamedTuple

from onnx_dl.concurrency import waits
from onnx_dl.inprocess.local_worker import LocalWorker


class HeldBlock(NamedTuple):
    """A block: the thread or greenlet that began it, and the load that it holds."""

    caller: int
    worker: LocalWorker


class HeldBlocks:
    """Blocks of all threads and greenlets."""

    def __init__(self) -> None:
        self._blocks: collections.deque[HeldBlock] = collections.deque()

    def __bool__(self) -> bool:
        return bool(self._blocks)

    @property
    def are_mine(self) -> bool:
        """True if this thread, or greenlet, is in a block."""
        return any(block.caller == waits.caller() for block in list(self._blocks))

    def begin(self, worker: LocalWorker) -> bool:
        """Begins a block.  False: the load takes none any more.  One that an unload waits for is joined: a
        block in a block would else wait for the unload, which waits for it."""
        if worker.gate is None or not worker.gate.hold(joins=True):
            return False
        self._blocks.append(HeldBlock(waits.caller(), worker))
        return True

    def end(self) -> None:
        """Ends the latest block of this thread or greenlet; else of any."""
        blocks, me = list(self._blocks), waits.caller()
        own = [block for block in blocks if block.caller == me] or blocks
        if own and self._taken(own[-1]) and own[-1].worker.gate is not None:
            own[-1].worker.gate.unhold(time.monotonic())

    def hold(self, worker: LocalWorker) -> None:
        """Has blocks hold a new load whose own was ended by force."""
        for block in list(self._blocks):
            if block.worker is worker or block.worker.is_open or worker.gate is None:
                continue
            if worker.gate.hold():
                if self._taken(block):
                    self._blocks.append(block._replace(worker=worker))
                else:  # it has ended meanwhile
                    worker.gate.unhold(time.monotonic())

    def _taken(self, block: HeldBlock) -> bool:
        """Removes a block; false if another thread did."""
        try:
            self._blocks.remove(block)
        except ValueError:
            return False
        return True
