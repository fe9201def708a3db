"""The owner of what is served: reads repositories, follows their changes, loads and unloads by request.

All state belongs to the event loop's thread.  What becomes of a model is decided by :mod:`.plan`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from onnx_dl.client.host_client import HostClient
from onnx_dl.errors import ConfigError
from onnx_dl.server.interfaces import ServedTable
from onnx_dl.server.options import ServeOptions
from onnx_dl.server.repository import control_requests, loads, plan
from onnx_dl.server.repository.catalog import Candidate, NamedModel
from onnx_dl.server.repository.disk import SETTLED, Disk
from onnx_dl.server.repository.events import Events
from onnx_dl.server.repository.health import Health
from onnx_dl.server.repository.loads import Outcome, logger
from onnx_dl.server.repository.models import UNLOADED, ModelTable
from onnx_dl.server.repository.plan import Plan
from onnx_dl.server.repository.retries import Retries
from onnx_dl.server.repository.tables import Tables
from onnx_dl.server.repository.takeover import Takeover
from onnx_dl.server.repository.tasks import Tasks
from onnx_dl.server.repository.wishes import Wishes

_AT_A_TIME: Final = 4
"""Models that load at a time at the start."""


class Repository:
    """Owner of what a server serves.

    Args:
        options: of the server.
        host: the host that loads the models.
        models: the table of this process.
        publish: hands a table to all processes; awaited until they use it.
        named: models that are served beside the repositories and ``options.models``, as of a host's file.
    """

    def __init__(
        self,
        options: ServeOptions,
        host: HostClient,
        models: ModelTable,
        publish: Callable[[ServedTable], Awaitable[None]],
        named: Sequence[NamedModel] = (),
    ) -> None:
        self._options = options
        self._host = host
        given = [
            NamedModel(name=name, path=path, place=f"--model {name}={path}")
            for name, path in options.models.items()
        ]
        alone = [*given, *named]
        self._wishes = Wishes(options.model_control, {model.name for model in alone})
        self._disk = Disk(options.repository, alone)
        health = Health()
        self._tables = Tables(models, publish, health, strict=options.strict_readiness)
        self._takeover = Takeover(models, self._tables, self._disk, health)
        self._candidates: dict[str, Candidate] = {}
        """Models as they were when it was last decided about them."""
        self._retries = Retries()
        self._locks: dict[str, asyncio.Lock] = {}
        self._tasks = Tasks()
        self._events = Events(health, self._tables, self._tasks)
        self.has_started = asyncio.Event()
        """Set when what loads at the start is loaded, or does not load."""

    # --- the whole ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Reads everything and publishes the first table; models that load at once do so in the background,
        and :attr:`ServedTable.is_ready` tells when.

        Raises:
            ConfigError: a repository's folder cannot be listed, or a model that is to be loaded is not there.
        """
        try:
            found = await self._disk.read({})
        except OSError as error:
            raise ConfigError(f"The repository {error.filename} cannot be read: {error.strerror}.") from None
        self._wishes.begin(self._options.load_models, found)
        self._events.follow(self._host)
        for name, candidate in found.items():
            self._disk.tell(candidate)
            self._candidates[name] = candidate
            self._tables.set(name, self._first_plan(candidate))
        await self._tables.publish()
        self._tasks.begin(self._load_first(list(found.values())))
        if self._options.model_control != "none":
            self._tasks.begin(self._follow())

    async def close(self) -> None:
        """Ends the watching and the loads that it waits for; models stay in their table."""
        self._events.close()
        await self._tasks.cancel()
        self._disk.close()

    async def _load_first(self, candidates: Sequence[Candidate]) -> None:
        """Loads what is to be loaded at the start.  A model that does not load keeps no other away."""
        at_a_time = asyncio.Semaphore(_AT_A_TIME)

        async def one(candidate: Candidate) -> None:
            async with at_a_time:
                await self._adopt(candidate, must_load=True)

        try:
            await asyncio.gather(*(one(each) for each in candidates if _loads_at_start(self._wishes, each)))
            self._tables.is_started = True
            await self._tables.publish()
        finally:  # a server that waits for this must not wait for ever
            self.has_started.set()

    # --- what clients ask for -----------------------------------------------------------------------------

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Loads a model now, from the files that are there; returns when it is served.

        Raises:
            RequestFailure: 400: not with this model control, or a parameter is not valid; 404: there is no
                such model; 503: a version does not load, with the reason; others may be served.
        """
        control_requests.check_control(self._options.model_control)
        override = control_requests.config_of(name, parameters)
        candidate = await self._disk.settled(name, override)
        if candidate is None:
            raise control_requests.unknown(name)
        if candidate.problem:
            raise control_requests.not_loaded(name, candidate.problem, is_clients=override is not None)
        self._disk.tell(candidate)
        failed = await self._adopt(candidate, must_load=True, is_clients=True, override=override)
        if failed or candidate.broken:
            is_clients = override is not None and not failed
            raise control_requests.load_failure(name, failed, candidate.broken, is_clients=is_clients)

    async def unload(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Withdraws a model until it is loaded again, and frees its memory; with ``withdraw`` false it only
        frees the memory.  Returns when that is free, or after 30 seconds of running calls.  A model that is
        not there is unloaded already.

        Raises:
            RequestFailure: 400: not with this model control, or a parameter is not valid.
        """
        control_requests.check_control(self._options.model_control)
        withdraws = control_requests.is_withdrawn(name, parameters)
        if name not in self._candidates:
            return
        async with self._lock(name):
            served = self._tables.served(name)
            candidate = self._candidates.get(name) if withdraws else None
            if candidate is not None:
                self._wishes.unload(name)
                self._tables.set(name, plan.unloaded(candidate, UNLOADED, "UNLOADING" if served else None))
                await self._tables.publish()
            try:
                await asyncio.gather(*(loads.free_quietly(self._host, entry) for entry in served.values()))
            finally:  # also if it is cancelled: else the index would say UNLOADING for ever
                if candidate is not None:
                    self._tables.set(name, plan.unloaded(candidate, UNLOADED))
                    await self._tables.publish()

    # --- one model ----------------------------------------------------------------------------------------

    def _first_plan(self, candidate: Candidate) -> Plan:
        """Decides what is served of a new model before anything is loaded for it."""
        name = candidate.name
        if not self._wishes.is_served(name):
            return plan.unloaded(candidate, UNLOADED if name in self._wishes.unloaded else "")
        must_load = self._wishes.is_loaded_first(name)
        return plan.decide(candidate, {}, failures=self._takeover.failures, must_load=must_load)

    async def _adopt(
        self,
        candidate: Candidate,
        *,
        must_load: bool = False,
        is_clients: bool = False,
        override: str | None = None,
    ) -> list[Outcome]:
        """Serves a model as it is on the disk now, with loads first where something is served already.

        Args:
            candidate: the model.
            must_load: it is loaded before it is served, and failures of earlier loads do not count.
            is_clients: a client waits for the load, and gets its error.
            override: a configuration that the candidate was read with.

        Returns:
            The loads that failed.
        """
        name = candidate.name
        async with self._lock(name):
            if must_load:
                self._wishes.load(name, override)
                self._takeover.forget_failures(name)
            return await self._switch(candidate, must_load=must_load, is_clients=is_clients)

    async def _switch(
        self, candidate: Candidate, *, must_load: bool = False, is_clients: bool = False
    ) -> list[Outcome]:
        """The part of :meth:`_adopt` that needs the model's lock."""
        name = candidate.name
        if candidate != self._candidates.get(name):
            self._retries.forget(name)
        self._candidates[name] = candidate
        override = self._wishes.overrides.get(name)
        self._candidates[name], failed = await self._takeover.switch(
            candidate, override, must_load=must_load, is_clients=is_clients
        )
        self._retries.note(name, failed, time.monotonic())
        return failed

    # --- changes ------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Looks at the repositories now and then, and takes over what has changed."""
        while True:
            await asyncio.sleep(self._options.poll_every)
            try:
                for name, candidate in (await self._changes()).items():
                    if not self._lock(name).locked():  # else it is looked at again when that has ended
                        self._tasks.begin(self._take_over(name, candidate))
            except OSError as error:  # what is served stays: the folder may come back
                self._disk.tell_once(f"The repository {error.filename} cannot be read: {error.strerror}.")
            except Exception:
                logger.exception("The repositories could not be followed")

    async def look(self) -> None:
        """Looks once, and returns when what has changed is taken over.

        Raises:
            OSError: a repository's folder cannot be listed.
        """
        changes = await self._changes()
        await asyncio.gather(*(self._take_over(name, candidate) for name, candidate in changes.items()))

    async def _changes(self) -> dict[str, Candidate | None]:
        """Changed models by name; None: it is gone.  A model whose files change between two looks is left
        for the next time.  Raises OSError, as :meth:`look`."""
        overrides = self._wishes.overrides
        first = await self._disk.read(overrides)
        changed = [name for name in first.keys() | self._candidates.keys() if self._differs(name, first)]
        if not changed:
            return {}
        await asyncio.sleep(SETTLED)
        second = await self._disk.read(overrides)
        return {name: second.get(name) for name in sorted(changed) if second.get(name) == first.get(name)}

    def _differs(self, name: str, found: Mapping[str, Candidate]) -> bool:
        is_due = self._retries.is_due(name, time.monotonic())
        is_other = is_due or found.get(name) != self._candidates.get(name)
        return is_other and self._wishes.is_followed(name)

    async def _take_over(self, name: str, candidate: Candidate | None) -> None:
        if candidate is not None:
            self._disk.tell(candidate)
        async with self._lock(name):
            if not self._wishes.is_followed(name):  # a client has loaded it since it was read
                return
            if candidate is not None and self._wishes.is_served(name):
                await self._switch(candidate)
                return
            if candidate is None:
                self._candidates.pop(name, None)
                self._tables.forget(name)
            else:
                self._candidates[name] = candidate
                self._tables.set(name, self._first_plan(candidate))
            await self._tables.publish()

    # --- small things -------------------------------------------------------------------------------------

    def _lock(self, name: str) -> asyncio.Lock:
        """Held while a model's plan is carried out."""
        return self._locks.setdefault(name, asyncio.Lock())


def _loads_at_start(wishes: Wishes, candidate: Candidate) -> bool:
    is_asked = wishes.is_loaded_first(candidate.name)
    is_eager = any(entry.is_eager for entry in candidate.entries)
    return wishes.is_served(candidate.name) and (is_asked or is_eager or bool(candidate.unread))
