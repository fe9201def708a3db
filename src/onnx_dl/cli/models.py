"""``onnx-dl load``, ``pin``, ``unload``: models that a host holds by itself; ``cache``: those on disk."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from onnx_dl.cli.output import print_line
from onnx_dl.core import parsing
from onnx_dl.core.environment import parse_pairs
from onnx_dl.core.status import ModelStatus
from onnx_dl.core.text import format_bytes
from onnx_dl.errors import OnnxDLError, RemoteError
from onnx_dl.host.model_host import ModelHost
from onnx_dl.workers.load_cache.store import open_cache


def load(
    host: ModelHost,
    model: str,
    *,
    ttl: float | None,
    pin: bool | None = None,
    priority: int | None = None,
    environment: Sequence[str] = (),
) -> None:
    """Makes the host load a model and hold it, and prints the model's state.

    ``ttl`` is in seconds.  None for ``ttl``, ``pin`` or ``priority``: the value in the host's file, else the
    default.  ``environment``: texts such as ``OMP_NUM_THREADS=4``.

    Raises:
        OnnxDLError: the model did not load; an error of onnxruntime's becomes one with the same text.
    """
    try:
        variables = parse_pairs(environment)
        status = host.adopt(model, ttl=ttl, pin=pin, priority=priority, environment=variables)
    except OnnxDLError:
        raise
    except Exception as error:  # a class of onnxruntime's, or one that this process does not know
        raise RemoteError(f"{model} did not load: {error}", type(error).__name__) from error
    print_line(load_line(status))


def load_line(status: ModelStatus) -> str:
    """One line with the state of a loaded model."""
    ttl = "" if status.ttl is None else ", stays" if status.ttl == parsing.KEEP else f", ttl {status.ttl:g} s"
    pinned = ", pinned" if status.pinned else ""
    return (
        f"{status.state} {status.model}, pid {status.pid}, PSS {format_bytes(status.usage.pss)}{ttl}{pinned}"
    )


def unload(host: ModelHost, model: str, *, force: bool) -> None:
    """Unloads a model and prints whether it was loaded."""
    was_loaded = host.unload(model, force=force)
    print_line(f"unloaded {model}" if was_loaded else f"{model} was not loaded; onnx-dl ps lists the models")


def list_cached() -> None:
    """Prints size, last use and model of each entry of the load cache, the last used first."""
    store = open_cache()
    entries = store.entries()
    for entry in entries:
        used = datetime.datetime.fromtimestamp(entry.used).isoformat(" ", "minutes")
        print_line(f"{format_bytes(entry.nbytes):>12}  {used}  {entry.meta.name}")
    print_line(
        f"{len(entries)} models, {format_bytes(sum(entry.nbytes for entry in entries))}, in {store.root}"
    )


def clear_cache() -> None:
    """Removes all entries of the load cache, and prints how much that was."""
    store = open_cache()
    print_line(f"{format_bytes(store.clear())} removed from {store.root}")
