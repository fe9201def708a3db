"""Control in the first process: it carries out what concerns all processes, and has the others follow."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from onnx_dl.server.inference.statistics import merged
from onnx_dl.server.interfaces import ModelState, RegionStatus, Served, ServedTable, VersionStatistics
from onnx_dl.server.metrics import families
from onnx_dl.server.processes import host
from onnx_dl.server.processes.children import Children
from onnx_dl.server.processes.front import Front
from onnx_dl.server.repository import specs
from onnx_dl.server.repository.repository import Repository
from onnx_dl.server.shielded import shielded
from onnx_dl.server.v2.failures import unavailable


class LocalControl:
    """A ``Control`` (``server/interfaces.py``): the owner of registrations, of the repository, of statistics
    and metrics.  All methods belong to the loop's thread."""

    def __init__(self, front: Front, children: Children) -> None:
        self._front = front
        self._children = children
        self._order = asyncio.Lock()
        """Held while a region comes or goes, so that all processes see that in one order."""
        self.repository: Repository

    async def publish(self, table: ServedTable) -> None:
        """Has all processes serve this table, and returns when they do."""
        self._front.table.apply(table)
        await _whole(self._children.use_table(table))

    async def load(self, name: str, parameters: dict[str, Any]) -> None:
        await _whole(self.repository.load(name, parameters))

    async def unload(self, name: str, parameters: dict[str, Any]) -> None:
        await _whole(self.repository.unload(name, parameters))

    async def register_region(self, name: str, key: str, offset: int, byte_size: int) -> None:
        await _whole(self._register(name, key, offset, byte_size))

    async def unregister_region(self, name: str | None) -> None:
        await _whole(self._unregister(name))

    async def _register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        async with self._order:
            self._front.regions.register(name, key, offset, byte_size)
            try:
                await self._children.use_region(self._front.regions, name)
            except OSError as error:
                self._front.regions.unregister(name)
                await self._children.drop_regions(name)
                raise unavailable(f"The region cannot be given to all processes: {error}.") from None

    async def _unregister(self, name: str | None) -> None:
        async with self._order:
            self._front.regions.unregister(name)
            await self._children.drop_regions(name)

    async def region_status(self, name: str | None) -> list[RegionStatus]:
        return self._front.regions.status(name)

    async def statistics(self, name: str = "", version: str = "") -> list[VersionStatistics]:
        return selected(await self._all_statistics(), self._served(name, version))

    async def model_state(self, name: str, version: str = "") -> ModelState:
        entry = self._front.models.find(name, version)
        key = specs.spec_of(entry).key
        snapshot = await host.snapshot_of(self._front.host)
        state = ModelState(name=entry.name, version=entry.version, state="unloaded")
        if snapshot is not None and (status := host.status_of(snapshot, key)) is not None:
            state.state = status.state.value
            state.ttl, state.idle_seconds = status.ttl, status.idle
            state.pid, state.loads = status.pid, status.loads
            state.memory = None if status.pid is None else status.usage.pss
        state.last_unload = await host.last_unload(self._front.host, key)
        return state

    async def metrics(self, accept: str = "") -> tuple[bytes, str]:
        accept = families.readable(accept)
        statistics = selected(await self._all_statistics(), self._served("", ""))
        snapshot = await host.snapshot_of(self._front.host)
        page = await host.page_of(snapshot, accept)
        # A driver of GPUs may take its time.
        return await asyncio.to_thread(families.render, statistics, snapshot, page, accept)

    async def _all_statistics(self) -> list[VersionStatistics]:
        own = self._front.statistics.snapshot()
        return merged([own, *await self._children.statistics()])

    def _served(self, name: str, version: str) -> list[Served]:
        """The versions that are meant.  Raises RequestFailure (404) if there is none."""
        if version:
            return [self._front.models.find(name, version)]
        if name:
            self._front.models.find(name)
            return [each for each in self._front.models.table.served if each.name == name]
        return self._front.models.table.served


async def _whole(work: Coroutine[None, None, None]) -> None:
    """Carries it out to its end, even if the caller has gone: else processes would differ, or a load would
    stay half done."""
    await shielded(work)


def selected(found: list[VersionStatistics], served: list[Served]) -> list[VersionStatistics]:
    """The counts of these versions, in their order; 0 for those that had no request."""
    counts = {(each.name, each.version): each for each in found}
    return [
        counts.get((entry.name, entry.version)) or VersionStatistics(name=entry.name, version=entry.version)
        for entry in served
    ]
