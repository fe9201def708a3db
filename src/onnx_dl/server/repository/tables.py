"""The table that is served, put together from the plans of all models, and its hand-over to all processes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import msgspec

from onnx_dl.server.interfaces import IndexRow, Served, ServedTable
from onnx_dl.server.repository.health import Health
from onnx_dl.server.repository.models import ModelTable, UsedModel
from onnx_dl.server.repository.plan import Plan, content


class Tables:
    """Owner of what is served now.  Belongs to the event loop's thread.

    ``strict``: the table is ready only if all rows of wanted models are.
    """

    def __init__(
        self,
        models: ModelTable,
        publish: Callable[[ServedTable], Awaitable[None]],
        health: Health,
        *,
        strict: bool,
    ) -> None:
        self._models = models
        self._hand_out = publish
        self._health = health
        self._strict = strict
        self._plans: dict[str, Plan] = {}
        self._slots: dict[tuple[str, str], int] = {}
        self._published: ServedTable | None = None
        self._lock = asyncio.Lock()
        self.is_started = False
        """Eager models are loaded, or cannot be."""

    def set(self, name: str, planned: Plan) -> None:
        """Sets what the next table has of a model."""
        self._plans[name] = planned

    def forget(self, name: str) -> None:
        """The next table has nothing of this model."""
        self._plans.pop(name, None)

    def served(self, name: str) -> dict[str, Served]:
        """Served versions of a model."""
        planned = self._plans.get(name)
        return {} if planned is None else {entry.version: entry for entry in planned.served}

    def all(self) -> Iterator[Served]:
        """All that is served."""
        for planned in self._plans.values():
            yield from planned.served

    async def publish(self) -> list[UsedModel]:
        """Has all processes serve the present plans, and returns when they do.  The proxies of what is no
        longer served close after their last use.

        Returns:
            What this process no longer serves; each has an event for its end.
        """
        async with self._lock:  # tables reach the processes in one order
            table = self._table()
            if table == self._published:
                return []
            leaving = self._models.apply(table)
            await self._hand_out(table)
            self._published = table
            self._free_slots(table)
            return leaving

    def _table(self) -> ServedTable:
        plans = [self._plans[name] for name in sorted(self._plans)]
        served = [
            msgspec.structs.replace(entry, slot=self._slot(entry))
            for planned in plans
            for entry in planned.served
        ]
        failing = self._health.failing
        reasons = {
            (entry.name, entry.version): failing[content(entry)]
            for entry in served
            if content(entry) in failing
        }
        rows = [
            IndexRow(row.name, row.version, "UNAVAILABLE", reasons[row.name, row.version])
            if row.state == "READY" and (row.name, row.version) in reasons
            else row
            for planned in plans
            for row in planned.rows
        ]
        wanted = {name for name, planned in self._plans.items() if planned.is_wanted}
        is_lacking = any(row.state != "READY" for row in rows if row.name in wanted)
        return ServedTable(served, rows, self.is_started and not (self._strict and is_lacking))

    def _slot(self, entry: Served) -> int:
        """The column of a version; contents that replace each other have the same."""
        place = entry.name, entry.version
        if place not in self._slots:
            taken = set(self._slots.values())
            self._slots[place] = next(slot for slot in range(len(taken) + 1) if slot not in taken)
        return self._slots[place]

    def _free_slots(self, table: ServedTable) -> None:
        places = {(entry.name, entry.version) for entry in table.served}
        self._slots = {place: slot for place, slot in self._slots.items() if place in places}
