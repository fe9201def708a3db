"""Control in the first process: what begins is carried out for all processes, or for none."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from onnx_dl.server.interfaces import RegionStatus, ServedTable
from onnx_dl.server.processes.local_control import LocalControl
from onnx_dl.server.v2.failures import RequestFailure, invalid


class Children:
    """The other processes: they take their time, and note what they have taken over."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.taken: list[Any] = []
        self.may = asyncio.Event()
        self._failure = failure

    async def use_table(self, table: ServedTable) -> None:
        await self._take(table)

    async def use_region(self, regions: Regions, name: str) -> None:
        await self._take(name)
        if self._failure is not None:
            raise self._failure

    async def drop_regions(self, name: str | None) -> None:
        await self._take(("drop", name))

    async def _take(self, what: Any) -> None:
        await self.may.wait()
        self.taken.append(what)


class Regions:
    def __init__(self) -> None:
        self.known: list[str] = []

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        if name in self.known:
            raise invalid("twice")
        self.known.append(name)

    def unregister(self, name: str | None) -> None:
        self.known = [] if name is None else [each for each in self.known if each != name]

    def status(self, name: str | None) -> list[RegionStatus]:
        return [RegionStatus(each, "/k", 0, 1) for each in self.known]


class Front:
    """The parts of the first process."""

    def __init__(self) -> None:
        self.regions = Regions()
        self.table = self
        self.applied: list[ServedTable] = []

    def apply(self, table: ServedTable) -> None:
        self.applied.append(table)


def parts(failure: Exception | None = None) -> tuple[LocalControl, Front, Children]:
    front, children = Front(), Children(failure)
    return LocalControl(front, children), front, children  # type: ignore[arg-type]


async def settle(children: Children) -> None:
    """Lets all take over what they were told, and what goes on without a caller come to its end."""
    children.may.set()
    while len(asyncio.all_tasks()) > 1:
        await asyncio.sleep(0)


def test_an_answer_comes_when_all_have_taken_it_over() -> None:
    async def test() -> None:
        control, front, children = parts()
        asked = asyncio.ensure_future(control.register_region("r", "/k", 0, 1))
        await asyncio.sleep(0.01)
        assert not asked.done() and front.regions.known == ["r"]
        children.may.set()
        await asked
        assert children.taken == ["r"]
        assert [each.name for each in await control.region_status(None)] == ["r"]

    asyncio.run(test())


@pytest.mark.parametrize("steps", range(6))
def test_a_caller_that_goes_at_any_step_leaves_nothing_half_done(steps: int) -> None:
    async def test() -> None:
        control, front, children = parts()
        asked = asyncio.ensure_future(control.register_region("r", "/k", 0, 1))
        for _ in range(steps):
            await asyncio.sleep(0)
        asked.cancel()
        await settle(children)
        assert asked.cancelled()
        assert children.taken == front.regions.known

    asyncio.run(test())


def test_a_table_reaches_all_though_its_caller_goes() -> None:
    async def test() -> None:
        control, front, children = parts()
        table = ServedTable(is_ready=True)
        asked = asyncio.ensure_future(control.publish(table))
        await asyncio.sleep(0)
        asked.cancel()
        await settle(children)
        assert front.applied == children.taken == [table]

    asyncio.run(test())


def test_a_region_that_not_all_can_have_is_nobodys() -> None:
    async def test() -> None:
        control, front, children = parts(OSError(24, "Too many open files"))
        children.may.set()
        with pytest.raises(RequestFailure, match="Too many open files") as caught:
            await control.register_region("r", "/k", 0, 1)
        assert caught.value.http == 503
        assert front.regions.known == [] and children.taken == ["r", ("drop", "r")]

    asyncio.run(test())


def test_what_comes_at_once_is_done_in_order() -> None:
    async def test() -> None:
        control, front, children = parts()
        asked = [
            asyncio.ensure_future(control.register_region("r", "/k", 0, 1)),
            asyncio.ensure_future(control.unregister_region("r")),
            asyncio.ensure_future(control.register_region("r", "/k", 0, 1)),
            asyncio.ensure_future(control.unregister_region(None)),
        ]
        children.may.set()
        await asyncio.gather(*asked)
        assert children.taken == ["r", ("drop", "r"), "r", ("drop", None)]
        assert front.regions.known == []

    asyncio.run(test())
