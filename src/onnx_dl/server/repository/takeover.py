"""Takes over what a model has become: loads it, has all processes switch, and the old proxies close."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.server.interfaces import Served
from onnx_dl.server.repository import control_requests, loads, plan, waits
from onnx_dl.server.repository.catalog import Candidate
from onnx_dl.server.repository.disk import Disk
from onnx_dl.server.repository.health import Health
from onnx_dl.server.repository.loads import Outcome, logger
from onnx_dl.server.repository.models import ModelTable, UsedModel
from onnx_dl.server.repository.plan import Content, Plan, content
from onnx_dl.server.repository.tables import Tables

_MOST_CLOSING: Final = 30.0
"""Seconds that a replacement without memory for two waits for calls of the old one."""
_GIVEN_UP: Final = "its load was given up; load it again"


class Takeover:
    """Carries out plans.  One at a time for each model; belongs to the loop's thread."""

    def __init__(self, models: ModelTable, tables: Tables, disk: Disk, health: Health) -> None:
        self._models = models
        self._tables = tables
        self._disk = disk
        self._health = health
        self.failures: dict[Content, str] = {}
        """Reasons of contents that did not load, until their files change or a client loads them again."""

    def forget_failures(self, name: str) -> None:
        """The model's loads are tried again."""
        self.failures = {at: why for at, why in self.failures.items() if at[0] != name}

    async def switch(
        self, candidate: Candidate, override: str | None, *, must_load: bool, is_clients: bool
    ) -> tuple[Candidate, list[Outcome]]:
        """Serves a model as it is on the disk, with loads first where something is served already.

        Args:
            candidate: the model.
            override: the configuration that it was read with.
            must_load: it is loaded before it is served.
            is_clients: a client waits for the load, and gets its error.

        Returns:
            The candidate, with what loads have told of it, and the loads that failed.

        One that is cancelled leaves what was served, and no proxy of what was to come.
        """
        name, present = candidate.name, self._tables.served(candidate.name)
        loaded: set[Content] = set()
        failures = dict(self.failures)
        decide = functools.partial(
            plan.decide, present=present, loaded=loaded, failures=failures, must_load=must_load
        )
        planned = decide(candidate)
        try:
            self._tables.set(name, planned)
            await self._tables.publish()
            ended = await self._load(planned.to_load, candidate)
            for entry, outcome in ended:
                on_use = not (present or is_clients or entry.version in candidate.unread)
                if self._is_served_after(entry, outcome, on_use=on_use, is_replaced=bool(present)):
                    loaded.add(content(entry))
                else:
                    failures[content(entry)] = control_requests.reason_of_load(entry, outcome.text)
            candidate = await self._completed(candidate, override, ended)
            if any(outcome.lacks_room for _, outcome in ended):
                await self._unpin(name, present, planned)
        except BaseException:  # else the index would say for ever that it loads
            for entry in planned.to_load:
                failures.setdefault(content(entry), control_requests.reason_of_load(entry, _GIVEN_UP))
            raise
        finally:
            if planned.to_load:
                self._tables.set(name, decide(candidate))
                await self._tables.publish()
            self._discard(name, planned.to_load)
        return candidate, [outcome for entry, outcome in ended if content(entry) not in loaded]

    async def _load(self, entries: Sequence[Served], candidate: Candidate) -> list[tuple[Served, Outcome]]:
        """Loads all of them at the same time."""
        outcomes = await asyncio.gather(*(loads.load(self._models, entry, candidate) for entry in entries))
        return list(zip(entries, outcomes, strict=True))

    def _discard(self, name: str, entries: Sequence[Served]) -> None:
        """Gives up what was prepared of a model and is not served."""
        now = self._tables.served(name)
        for entry in entries:
            if entry.version not in now or not plan.is_same(now[entry.version], entry):
                self._models.discard(entry)

    def _is_served_after(self, entry: Served, outcome: Outcome, *, on_use: bool, is_replaced: bool) -> bool:
        """True if a version is served after its load has ended like this, also where it failed.

        Args:
            entry: the version.
            outcome: of its load.
            on_use: it may as well be loaded by the first request, which may succeed.
            is_replaced: something is served of the model.
        """
        at = content(entry)
        if outcome.error is None:
            logger.info("Model '%s' version %s is loaded from %s", *at[:2], entry.path)
            return True
        if outcome.lacks_room and is_replaced:
            logger.warning(
                "Model '%s' version %s: there is no memory for the new and the old one at the same time, so "
                "it is replaced without a load first: %s",
                *at[:2],
                outcome.text,
            )
            return True
        logger.error("Model '%s' version %s does not load: %s", *at[:2], outcome.text)
        if not outcome.may_pass:
            reason = control_requests.reason_of_load(entry, outcome.text)
            if on_use:
                self._health.mark(entry, reason)
            else:
                self.failures[at] = reason
        return on_use

    async def _completed(
        self, candidate: Candidate, override: str | None, ended: Sequence[tuple[Served, Outcome]]
    ) -> Candidate:
        """The candidate with the signatures that the loads have told."""
        if all(outcome.signature is None for _, outcome in ended):
            return candidate
        for entry, outcome in ended:
            if outcome.signature is not None:
                await self._disk.learn(entry, outcome.signature)
        return await self._disk.read_one(candidate.name, override) or candidate

    async def _unpin(self, name: str, present: Mapping[str, Served], planned: Plan) -> None:
        """Has what is served of a model leave when there is no room: the host refuses a load beside pinned
        models at once, so requests to the new version would fail while calls of the old one still run."""
        if not any(entry.arguments.get("pin") for entry in present.values()):
            return
        old = tuple(msgspec.structs.replace(entry, arguments=_unpinned(entry)) for entry in planned.served)
        self._tables.set(name, Plan(old, planned.rows))
        leaving = await self._tables.publish()
        await waits.wait_in_thread(_await_end, leaving)


def _unpinned(entry: Served) -> dict[str, Any]:
    return {key: value for key, value in entry.arguments.items() if key != "pin"}


def _await_end(leaving: Sequence[UsedModel]) -> None:
    """Returns when these proxies are closed, or 30 seconds have passed."""
    deadline = Deadline(_MOST_CLOSING)
    for used in leaving:
        used.gone.wait(deadline.left())
