"""Control in a child: each call is a question to the first process, with a deadline."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from onnx_dl.core.settings import settings
from onnx_dl.server.interfaces import Control, ModelState, RegionStatus, VersionStatistics
from onnx_dl.server.processes import messages as m
from onnx_dl.server.processes.link import Link, Tickets
from onnx_dl.server.v2.failures import RequestFailure, unavailable

_TIMEOUT: Final = 30.0
_NOBODY: Final = "The first process of the server does not answer."


class RemoteControl:
    """A ``Control`` (``server/interfaces.py``).  All methods belong to the loop's thread."""

    def __init__(self, link: Link[m.ToChild], timeout: float = _TIMEOUT) -> None:
        """``timeout``: seconds for what is no load and no unload; these have as long as a load may take."""
        self._link = link
        self._tickets = Tickets()
        self._timeout = timeout
        self._long = timeout + settings().load_timeout

    def on_answer(self, message: m.Done | m.Refusal) -> None:
        """Takes an answer from the link."""
        self._tickets.answer(message.ticket, message)

    async def load(self, name: str, parameters: dict[str, Any]) -> None:
        await self._ask("load", [name, parameters], self._long)

    async def unload(self, name: str, parameters: dict[str, Any]) -> None:
        await self._ask("unload", [name, parameters], self._long)

    async def register_region(self, name: str, key: str, offset: int, byte_size: int) -> None:
        await self._ask("register_region", [name, key, offset, byte_size])

    async def unregister_region(self, name: str | None) -> None:
        await self._ask("unregister_region", [name])

    async def region_status(self, name: str | None) -> list[RegionStatus]:
        return (await self._ask("region_status", [name])).regions

    async def statistics(self, name: str = "", version: str = "") -> list[VersionStatistics]:
        return (await self._ask("statistics", [name, version])).statistics

    async def model_state(self, name: str, version: str = "") -> ModelState:
        state = (await self._ask("model_state", [name, version])).state
        assert state is not None
        return state

    async def metrics(self, accept: str = "") -> tuple[bytes, str]:
        answer = await self._ask("metrics", [accept])
        return answer.text, answer.kind

    async def _ask(self, operation: str, arguments: list[Any], timeout: float | None = None) -> m.Done:
        ticket, future = self._tickets.open()
        self._link.send(m.Ask(ticket=ticket, operation=operation, arguments=arguments))
        try:
            async with asyncio.timeout(timeout or self._timeout):
                answer = await future
        except TimeoutError:
            raise unavailable(_NOBODY) from None
        finally:
            future.cancel()
        if isinstance(answer, m.Refusal):
            raise m.failure_of(answer)
        assert isinstance(answer, m.Done)
        return answer


async def answered(control: Control, question: m.Ask) -> m.Done:
    """The answer to a child's question, by the first process's control.  Raises RequestFailure."""
    ticket, given = question.ticket, question.arguments
    match question.operation:
        case "load" | "unload" | "register_region" | "unregister_region":
            await getattr(control, question.operation)(*given)
            return m.Done(ticket=ticket)
        case "region_status":
            return m.Done(ticket=ticket, regions=await control.region_status(*given))
        case "statistics":
            return m.Done(ticket=ticket, statistics=await control.statistics(*given))
        case "model_state":
            return m.Done(ticket=ticket, state=await control.model_state(*given))
        case "metrics":
            text, kind = await control.metrics(*given)
            return m.Done(ticket=ticket, text=text, kind=kind)
    raise RequestFailure(500, "INTERNAL", f"There is no operation {question.operation!r}.")
