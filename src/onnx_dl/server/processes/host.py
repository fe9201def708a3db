"""The shared host that a server is a client of: one of its own, or one that the user has named."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Final

import msgspec

from onnx_dl.core.events import EventType
from onnx_dl.core.settings import Settings, settings
from onnx_dl.core.status import ModelStatus, Snapshot
from onnx_dl.errors import OnnxDLError
from onnx_dl.host.model_host import ModelHost
from onnx_dl.server.metrics import host_text
from onnx_dl.server.options import ServeOptions
from onnx_dl.system import process_setup

_METRICS: Final = "127.0.0.1:0"
_EVENTS: Final = 300
"""Events that a host keeps."""


def own_name() -> str:
    """Name of the host of this process's own server."""
    return f"serve-{os.getpid()}"


def claim() -> None:
    """Makes the server's own host end with this process, whichever of the server's processes starts it."""
    pid = os.getpid()
    if (started := process_setup.start_time(pid)) is not None:
        os.environ["ONNX_DL_OWNER"] = f"{pid}:{started}"


def settings_of(options: ServeOptions, base: Settings) -> tuple[Settings, list[str]]:
    """Settings of the host if the server starts it, and the names of those that its file does not change.

    Models never run in the server's own process, whatever ``ONNX_DL_ISOLATION`` says.
    """
    given: dict[str, str | int] = {"host": "", "isolation": "on", "metrics": base.metrics or _METRICS}
    explicit = []
    if options.memory_limit is not None:
        given["memory_limit"] = options.memory_limit
        explicit.append("memory_limit")
    if options.config:
        given["config"] = options.config
    return msgspec.structs.replace(base, **given), explicit


def host_of(options: ServeOptions, name: str) -> ModelHost:
    """The host of this name; nothing is started."""
    os.environ.pop("ONNX_DL_ISOLATION", None)  # proxies look there, too
    chosen, explicit = settings_of(options, settings())
    return ModelHost.of_name(name, chosen, explicit)


def status_of(snapshot: Snapshot, key: str) -> ModelStatus | None:
    """The status of the model with this key, or of the group that it is in; None: it was not used yet."""
    return next((each for each in snapshot.models if key == each.key or key in each.members), None)


async def snapshot_of(host: ModelHost) -> Snapshot | None:
    """The host's snapshot; None: it does not answer."""
    with contextlib.suppress(OnnxDLError):
        return await asyncio.to_thread(host.snapshot)
    return None


async def last_unload(host: ModelHost, key: str) -> str:
    """The last end of a model's worker, as the host told it; empty: none, or it was long ago."""
    with contextlib.suppress(OnnxDLError):
        for event in reversed(await asyncio.to_thread(host.recent_events, _EVENTS)):
            if event.key == key and event.type in (EventType.UNLOADED, EventType.FAILED):
                return str(event)
    return ""


async def page_of(snapshot: Snapshot | None, accept: str) -> str:
    """The text of the host's own metrics, in the format that ``accept`` asks for; empty: it serves none, or
    does not answer."""
    if snapshot is None or snapshot.metrics is None:
        return ""
    return await host_text.fetch(snapshot.metrics, accept)
