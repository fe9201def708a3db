"""Blocks that CUDA's driver has pinned, so that a GPU copies from them and to them at full speed.

To copy other memory, the driver first copies it to pinned memory of its own.  Pinning takes about 0.5 ms and
0.1 ms per MB, so only blocks that are used again are pinned, and each until its mapping goes: those of the
caller, where inputs lie, and those of the lane's arena, where a prepared call has its results.  Their pages
are there before (a block is allocated when it is made) and count as without it; pinned ones are not swapped.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable
from typing import Final

from onnx_dl.protocol.lane import Tensor, Value
from onnx_dl.system import cuda_driver, resources
from onnx_dl.system.cuda_driver import CudaDriver
from onnx_dl.system.cuda_types import DriverError
from onnx_dl.tensors.arena import Mappings
from onnx_dl.tensors.block import Block

_MOST: Final = 1 << 30
_PART: Final = 4
"""Bytes that a worker pins: at most so many, and this part of the memory that it may use."""


def most_pinned(memory: int | None) -> int:
    """Returns the bytes that a worker may pin.  ``memory``: that it may use; None: not known."""
    return _MOST if memory is None else min(_MOST, memory // _PART)


@functools.cache
def _most_here() -> int:
    return most_pinned(resources.memory())


class PinRules:
    """The blocks to be pinned, by address: from the second use on, and never again once refused.

    Each method changes a dict in one step, so that :meth:`gone` may interrupt another one for another block.
    """

    def __init__(self, most: Callable[[], int]) -> None:
        """``most``: tells the bytes that may be pinned at a time; not asked before the first block is."""
        self._most = most
        self._seen: dict[int, None] = {}
        self._refused: dict[int, None] = {}
        self._pinned: dict[int, int] = {}
        """Bytes by address."""

    @property
    def nbytes(self) -> int:
        """Bytes that are pinned."""
        return sum(list(self._pinned.values()))

    def is_settled(self, address: int) -> bool:
        """Tells whether later uses change nothing."""
        return address in self._pinned or address in self._refused

    def use(self, address: int, nbytes: int) -> bool:
        """Counts a use of a block.  True: it is to be pinned now, and counts as pinned."""
        if self.is_settled(address):
            return False
        if address not in self._seen:
            self._seen[address] = None
            return False
        if self.nbytes + nbytes > self._most():
            return False
        self._pinned[address] = nbytes
        return True

    def refuse(self, address: int) -> None:
        """Notes that the driver did not pin it."""
        self._refused[address] = None
        self._pinned.pop(address, None)

    def gone(self, address: int) -> bool:
        """Forgets a block.  True: it is pinned."""
        self._seen.pop(address, None)
        self._refused.pop(address, None)
        return self._pinned.pop(address, None) is not None


class PinnedBlocks:
    """The pinned blocks of this process.  Thread-safe."""

    def __init__(
        self,
        most: Callable[[], int] = _most_here,
        driver: Callable[[], CudaDriver | None] = cuda_driver.loaded,
    ) -> None:
        """
        Args:
            most: tells the bytes that may be pinned at a time.
            driver: finds the driver; None: this process does not use CUDA, and nothing is pinned.
        """
        self._rules = PinRules(most)
        self._driver = driver
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes that are pinned."""
        return self._rules.nbytes

    def use(self, device: int, block: Block) -> None:
        """Counts a use of a block by a session on a device.  Pins it if that is worth it and allowed."""
        mapping = block.mapping
        address, rules = mapping.address, self._rules
        if rules.is_settled(address) or (driver := self._driver()) is None:
            return
        with self._lock:
            wanted = rules.use(address, mapping.size)
        if mapping.before_unmap is None:
            mapping.before_unmap = functools.partial(self._gone, device, address)
        if wanted:
            try:
                driver.register_host(device, address, mapping.size)
            except DriverError:  # the copies take longer; nothing else changes
                rules.refuse(address)

    def _gone(self, device: int, address: int) -> None:
        """Unpins a block before its memory goes: the driver would take other memory there for it.  Called by
        a finalizer, which may have interrupted :meth:`use`: takes no lock, and raises nothing."""
        with contextlib.suppress(Exception):
            if self._rules.gone(address) and (driver := self._driver()) is not None:
                driver.unregister_host(device, address)


class LanePins:
    """Uses of the blocks of one lane, by a session on a device."""

    def __init__(self, pinned: PinnedBlocks, device: int, mappings: Mappings) -> None:
        self._use = functools.partial(pinned.use, device)
        self._mappings = mappings

    def fed(self, values: Iterable[tuple[object, Value]]) -> None:
        """Counts a use of the caller's blocks in which inputs lie, each once."""
        self.used({value.block for _, value in values if isinstance(value, Tensor) and value.block})

    def used(self, numbers: Iterable[int], blocks: Iterable[Block | None] = ()) -> None:
        """Counts a use of the caller's blocks of these numbers, and of blocks of this side; None is none.
        Raises nothing: the call has its answer, and a second one would be taken for that of the next call."""
        with contextlib.suppress(Exception):
            for number in numbers:
                if self._mappings.has(number):
                    self._use(self._mappings.block(number))
            for block in blocks:
                if block is not None:
                    self._use(block)
