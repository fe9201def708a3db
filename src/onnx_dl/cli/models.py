"""``onnx-dl load``, ``pin`` and ``unload``: models that a shared host holds itself."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_dl.cli.output import say
from onnx_dl.core import parsing
from onnx_dl.core.environment import parse_pairs
from onnx_dl.core.status import ModelStatus
from onnx_dl.core.text import format_bytes
from onnx_dl.errors import OnnxDLError, RemoteError
from onnx_dl.host.model_host import ModelHost


def load(
    host: ModelHost,
    model: str,
    *,
    ttl: float | None,
    pin: bool | None = None,
    priority: int | None = None,
    environment: Sequence[str] = (),
) -> None:
    """Has the host load a model and hold it on, and prints what became of it.

    ``ttl``: in seconds; None, here and of the others: what the host's file says, or else its default;
    ``environment``: texts such as ``OMP_NUM_THREADS=4``.

    Raises:
        OnnxDLError: the model did not load; errors of onnxruntime's become one, with their words.
    """
    try:
        variables = parse_pairs(environment)
        status = host.adopt(model, ttl=ttl, pin=pin, priority=priority, environment=variables)
    except OnnxDLError:
        raise
    except Exception as error:  # onnxruntime's own classes, or none that this process knows
        raise RemoteError(f"{model} did not load: {error}", type(error).__name__) from error
    say(loaded(status))


def loaded(status: ModelStatus) -> str:
    """One line that tells of a model that a host holds."""
    ttl = "" if status.ttl is None else ", stays" if status.ttl == parsing.KEEP else f", ttl {status.ttl:g} s"
    pinned = ", pinned" if status.pinned else ""
    return (
        f"{status.state} {status.model}, pid {status.pid}, PSS {format_bytes(status.usage.pss)}{ttl}{pinned}"
    )


def unload(host: ModelHost, model: str, *, force: bool) -> None:
    """Ends a model's worker and prints whether there was one."""
    was_loaded = host.unload(model, force=force)
    say(f"unloaded {model}" if was_loaded else f"{model} was not loaded; onnx-dl ps lists what is")
