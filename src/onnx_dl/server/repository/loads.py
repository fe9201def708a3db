"""Loads, warm-ups and unloads of versions at the host, for the repository."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from onnx_dl.client import remote_model
from onnx_dl.client.host_client import HostClient
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.core.status import ModelDescription, TensorSpec
from onnx_dl.errors import (
    CapacityError,
    DescriptorsExhausted,
    FilesChanging,
    OnnxDLError,
    ProcessesExhausted,
    ProxyClosedError,
    RemoteError,
    SharedMemoryError,
    SupervisorError,
    WorkerError,
)
from onnx_dl.server.interfaces import Served
from onnx_dl.server.repository import signature, specs, waits, warmup
from onnx_dl.server.repository.catalog import Candidate
from onnx_dl.server.repository.models import ModelTable, UsedModel
from onnx_dl.server.repository.signature import ModelSignature, Unservable

logger: Final = logging.getLogger("onnx_dl.server")
UNLOAD_TIMEOUT: Final = 30.0
"""Seconds that an unload waits for running calls."""
_PASSING: Final = (
    DescriptorsExhausted,
    FilesChanging,
    ProcessesExhausted,
    ProxyClosedError,
    SharedMemoryError,
    SupervisorError,
)
"""Errors that say nothing about the model's file."""


class Outcome:
    """End of a load.

    Attributes:
        error: what it raised; None: the model is loaded.
        signature: what the worker told of a file that cannot be read without one.
    """

    def __init__(self, error: Exception | None, found: ModelSignature | Unservable | None = None) -> None:
        self.error = error
        self.signature = found

    @property
    def lacks_room(self) -> bool:
        """There is no memory for it beside what is loaded; alone it would fit."""
        error = self.error
        return isinstance(error, CapacityError) and not (error.limit and error.needed > error.limit)

    @property
    def is_passing(self) -> bool:
        """The error may be gone the next time, with the same file."""
        return isinstance(self.error, _PASSING) or self.lacks_room

    @property
    def may_pass(self) -> bool:
        """The error may be gone later, with the same file: it is passing, or the worker died, took too long
        or had too little memory, which may be due to the machine."""
        return self.is_passing or isinstance(self.error, WorkerError)

    @property
    def text(self) -> str:
        """The error in words."""
        return reason_of(self.error) if self.error is not None else ""


def reason_of(error: Exception) -> str:
    """An error's words, without the name of a class of another process."""
    text = str(error)
    if isinstance(error, RemoteError):
        text = text.removeprefix(f"{error.type_name}: ")
    return text or type(error).__name__


async def load(models: ModelTable, entry: Served, candidate: Candidate) -> Outcome:
    """Loads a version before it is served, and warms it up."""
    used = models.prepare(entry)
    try:
        await used.proxy.aload()
    except Exception as error:
        return Outcome(error)
    found: ModelSignature | Unservable | None = None
    if entry.version in candidate.unread:
        try:
            found = await asyncio.to_thread(_described, used)
        except Unservable as error:
            return Outcome(error, error)
        except Exception as error:
            return Outcome(error)
    for each in candidate.warmups:
        await _warm(used, each)
    return Outcome(None, found)


def _described(used: UsedModel) -> ModelSignature:
    """The signature in the worker's words.  It is known from the load, so nothing is loaded for it."""
    inputs, outputs = used.proxy.get_inputs(), used.proxy.get_outputs()
    return signature.of_description(
        ModelDescription(
            inputs=[TensorSpec(each.name, each.type, each.shape) for each in inputs],
            outputs=[TensorSpec(each.name, each.type, each.shape) for each in outputs],
        )
    )


async def _warm(used: UsedModel, given: dict[str, object]) -> None:
    """Runs a warm-up.  One that fails says nothing about the model, so it is told and no more."""
    entry = used.entry
    try:
        feed = await asyncio.to_thread(warmup.feed_of, given, entry)
        for _ in range(warmup.runs_of(given)):
            await used.proxy.arun(None, feed)
    except Exception as error:
        logger.warning(
            "The warm-up %s of model '%s' version %s failed, and the model is served anyway: %s",
            given.get("name") or "without a name",
            entry.name,
            entry.version,
            reason_of(error),
        )


async def free(host: HostClient, entry: Served, timeout: float = UNLOAD_TIMEOUT) -> None:
    """Ends the version's worker after its running calls, and returns when its memory is free.

    Raises:
        UnloadTimeout: calls still ran after ``timeout`` seconds; it ends after them.
        SupervisorError: the host does not answer.
    """
    await waits.wait_in_thread(_free, host, entry, timeout)


def _free(host: HostClient, entry: Served, timeout: float) -> None:
    if (connection := host.link.present()) is not None:
        unit = specs.spec_of(entry).unit
        remote_model.unload(connection, unit, entry.name, force=False, deadline=Deadline(timeout))


async def free_quietly(host: HostClient, entry: Served) -> None:
    """Like :func:`free`; what goes wrong is told in the log."""
    try:
        await free(host, entry)
    except OnnxDLError as error:
        logger.warning("Model '%s' version %s: %s", entry.name, entry.version, error)
