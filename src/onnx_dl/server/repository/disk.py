"""The disk as the event loop sees it: candidates are read in one thread, and what is said of them is logged
once."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar

from onnx_dl.server.interfaces import Served
from onnx_dl.server.repository.catalog import Candidate, Catalog, NamedModel
from onnx_dl.server.repository.signature import ModelSignature, Unservable

SETTLED: Final = 0.1
"""Seconds between two looks at files that have changed; a file that is still written differs."""
_MOST_SETTLING: Final = 60.0
"""Seconds that a load waits for files that change all the time."""

_T = TypeVar("_T")
_logger: Final = logging.getLogger("onnx_dl.server")


class Disk:
    """Reads candidates without blocking the loop.  Belongs to the loop's thread."""

    def __init__(self, roots: Sequence[str], named: Sequence[NamedModel]) -> None:
        self._catalog = Catalog(roots, named)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "onnx-dl-repository")
        self._told: set[str] = set()

    async def read(self, overrides: Mapping[str, str]) -> dict[str, Candidate]:
        """All candidates.  Raises OSError: a repository's folder cannot be listed."""
        return await self._in_thread(functools.partial(self._catalog.read, dict(overrides)))

    async def read_one(self, name: str, override: str | None) -> Candidate | None:
        """One candidate; None: there is no model of this name."""
        return await self._in_thread(functools.partial(self._catalog.read_one, name, override))

    async def settled(self, name: str, override: str | None) -> Candidate | None:
        """One candidate, when two looks at it have found the same."""
        candidate = await self.read_one(name, override)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_MOST_SETTLING):
                while candidate is not None:
                    await asyncio.sleep(SETTLED)
                    before, candidate = candidate, await self.read_one(name, override)
                    if candidate == before:
                        break
        return candidate

    async def learn(self, entry: Served, found: ModelSignature | Unservable) -> None:
        """Remembers what a load has told about a file that cannot be read without one."""
        await self._in_thread(functools.partial(self._catalog.learn, entry, found))

    def tell(self, candidate: Candidate) -> None:
        """Logs the notes and problems of a model, each text once."""
        for text in (*candidate.notes, *candidate.broken.values(), candidate.problem):
            if text:
                self.tell_once(f"Model '{candidate.name}': {text}")

    def tell_once(self, text: str) -> None:
        """Logs a warning that was not logged before."""
        if text not in self._told:
            self._told.add(text)
            _logger.warning("%s", text)

    def close(self) -> None:
        """Ends the thread after what it reads now."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, call: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)
