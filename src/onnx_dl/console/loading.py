"""``onnx-dl load``, ``pin`` and ``unload``: models that a shared host holds itself."""

from __future__ import annotations

import os
from collections.abc import Sequence

from onnx_dl import config
from onnx_dl.console.hosts import Host
from onnx_dl.console.output import quiet_end, say
from onnx_dl.errors import OnnxDLError, RemoteError
from onnx_dl.events import format_bytes
from onnx_dl.model import ModelStatus


def load(host: Host, model: str, *, ttl: float | None, pin: bool, priority: int) -> None:
    """Has the host load a model and hold it on, and prints what became of it.

    ``ttl``: in seconds; None: the host's own default.

    Raises:
        OnnxDLError: the model did not load; errors of onnxruntime's become one, with their words.
    """
    terms = {} if ttl is None else {"ttl": ttl}
    try:
        host.adopt(model, pin=pin, priority=priority, **terms)
    except OnnxDLError:
        raise
    except Exception as error:  # onnxruntime's own classes, or none that this process knows
        raise RemoteError(f"{model} did not load: {error}", type(error).__name__) from error
    with quiet_end():
        say(loaded(model, host.snapshot().models))


def loaded(model: str, models: Sequence[ModelStatus]) -> str:
    """One line that tells of a model that a host holds; of several, loaded in different ways, the last."""
    names = {model, os.path.abspath(model)}
    status = next((status for status in reversed(models) if status.model in names), None)
    if status is None:  # its TTL has ended it already
        return f"{model} was loaded, and is not any more"
    ttl = "" if status.ttl is None else ", stays" if status.ttl == config.KEEP else f", ttl {status.ttl:g} s"
    pinned = ", pinned" if status.pinned else ""
    return (
        f"{status.state} {status.model}, pid {status.pid}, PSS {format_bytes(status.usage.pss)}{ttl}{pinned}"
    )


def unload(host: Host, model: str, *, force: bool) -> None:
    """Ends a model's worker and prints whether there was one."""
    was_loaded = host.unload(model, force=force)
    with quiet_end():
        say(f"unloaded {model}" if was_loaded else f"{model} was not loaded")
