"""The children of a server: started, followed up, started again when one has ended."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from typing import Final

import msgspec

from onnx_dl.server.inference.limits import Limits
from onnx_dl.server.inference.statistics import merged
from onnx_dl.server.interfaces import RegionStatus, ServedTable, VersionStatistics
from onnx_dl.server.processes import messages as m
from onnx_dl.server.processes.child_process import Answering, ChildGone, ChildProcess
from onnx_dl.server.shielded import shielded
from onnx_dl.server.shm.regions import Regions

_LOOK_EVERY: Final = 1.0
"""Seconds between two questions for a child's counts, which also find out that it hangs."""
_LEAST_LIFE: Final = 5.0
"""Seconds after which a child that ended is replaced at once; else after a pause of the same length."""
_START_TIMEOUT: Final = 60.0
_LAST_WORDS: Final = 2.0
"""Seconds that a child has to exit after its requests have ended."""

_log = logging.getLogger("onnx_dl.server")


class Children:
    """All children.  All methods belong to the loop's thread."""

    def __init__(self, limits: Limits, page: int) -> None:
        """``page``: descriptor of the page of limits, which stays the caller's."""
        self._limits = limits
        self._page = page
        self._living: dict[int, ChildProcess] = {}
        self._gone: list[VersionStatistics] = []
        """Counts of children that have ended."""
        self._begin: Callable[[int], m.Begin]
        self._answer: Answering
        self._regions: Regions
        self._is_ending = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(
        self, count: int, begin: Callable[[int], m.Begin], answer: Answering, regions: Regions
    ) -> None:
        """Starts so many children, in the rows 1 and on, and returns when all listen.

        ``begin``: makes the first message for the child of a row; ``answer``: carries out what children ask
        for; ``regions``: those that new children get.

        Raises:
            OSError: one could not be started, or cannot listen.
        """
        self._begin, self._answer, self._regions = begin, answer, regions
        started = [self._start(row) for row in range(1, count + 1)]
        for child in started:
            try:
                await _listening(child)
            except ChildGone as error:
                raise OSError(f"A process of the server did not start. {error}") from None
        if count:
            self._spawn(self._look())

    @property
    def pids(self) -> list[int]:
        return [child.pid for child in self._living.values()]

    async def use_table(self, table: ServedTable) -> None:
        """Has all children serve this table, and returns when they do."""
        await self._tell(lambda ticket: m.UseTable(ticket=ticket, table=table))

    async def use_region(self, regions: Regions, name: str) -> None:
        """Has all children use a region that was registered, and returns when they do."""
        if not self._living:
            return
        (status,) = regions.status(name)
        fd = regions.find(name).memory.duplicate()
        try:
            await self._tell(lambda ticket: m.UseRegion(ticket=ticket, region=status), fd)
        finally:
            os.close(fd)

    async def drop_regions(self, name: str | None) -> None:
        """Has all children forget a region, or all, and returns when they have."""
        await self._tell(lambda ticket: m.DropRegions(ticket=ticket, name=name))

    async def statistics(self) -> list[list[VersionStatistics]]:
        """Counts of each child, and of those that have ended."""
        await self._count()
        # Only now, and without a pause: what a child counted that ended meanwhile is in ``_gone``.
        return [*(child.statistics for child in self._living.values()), self._gone]

    async def drain(self, seconds: float) -> None:
        """Has all children finish their requests and end; kills those that do not, after so many seconds."""
        self._is_ending = True
        ending = list(self._living.values())
        for child in ending:
            child.tell(m.Drain(seconds=seconds))
        await asyncio.gather(*(child.ended(seconds + _LAST_WORDS) for child in ending))

    async def close(self) -> None:
        """Kills all children."""
        self._is_ending = True
        for task in self._tasks:
            task.cancel()
        ending = list(self._living.values())
        for child in ending:
            child.kill()
        await asyncio.gather(*(child.ended(0.0) for child in ending))

    async def _tell(self, make: Callable[[int], msgspec.Struct], *fds: int) -> None:
        asked = [child.told(make, fds) for child in self._living.values()]
        for answer in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(answer, BaseException) and not isinstance(answer, ChildGone):
                raise answer

    def _start(self, row: int) -> ChildProcess:
        child = ChildProcess(row, self._answer, self._on_ended)
        self._living[row] = child
        try:
            child.tell(self._begin(row), [self._page])
            for status in self._regions.status(None):
                self._give_region(child, status)
        except Exception:
            _log.exception("a process of the server cannot be told what to do; it is ended")
            child.kill()  # and so replaced
        return child

    def _give_region(self, child: ChildProcess, status: RegionStatus) -> None:
        fd = self._regions.find(status.name).memory.duplicate()
        try:
            child.tell(m.UseRegion(ticket=0, region=status), [fd])
        finally:
            os.close(fd)

    def _on_ended(self, child: ChildProcess) -> None:
        if self._living.get(child.row) is child:
            del self._living[child.row]
        for counts in child.statistics:
            counts.pending = 0
        self._gone = merged([self._gone, child.statistics])
        if not self._is_ending:
            self._spawn(self._replace(child))

    async def _replace(self, child: ChildProcess) -> None:
        pause = 0.0 if child.age > _LEAST_LIFE else _LEAST_LIFE
        await child.ended(_LAST_WORDS)
        self._limits.clear(child.row)  # now: nothing writes there any more
        _log.warning("process %d of the server has ended; another one is started", child.pid)
        while True:
            await asyncio.sleep(pause)
            if self._is_ending:  # since the sleep began: it would not be told to end
                return
            try:
                started = self._start(child.row)
                break
            except OSError as error:
                _log.warning("a process of the server cannot be started: %s", error)
                pause = _LEAST_LIFE
        try:
            await _listening(started)
        except ChildGone as error:
            if not self._is_ending:
                _log.warning("process %d of the server did not start. %s", started.pid, error)
                started.kill()  # and so replaced, unless it has ended by itself

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY)
            await self._count()

    async def _count(self) -> None:
        listening = [child for child in self._living.values() if child.is_listening]
        await asyncio.gather(*(child.count() for child in listening))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _listening(child: ChildProcess) -> None:
    """Returns when the child takes requests.  Raises ChildGone: it has ended, or took too long."""
    try:
        async with asyncio.timeout(_START_TIMEOUT):
            await shielded(child.listens)
    except TimeoutError:
        raise ChildGone("It did not listen in time.") from None
