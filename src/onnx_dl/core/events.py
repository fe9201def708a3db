"""Events in the life of models, and their wording as log lines.

:mod:`onnx_dl.supervisor.policy.scheduler` makes them.
"""

from __future__ import annotations

import enum

import msgspec

from onnx_dl.core.text import format_bytes


class EventType(enum.StrEnum):
    """The kinds of event, in the order in which one worker goes through them."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    UNLOADED = "unloaded"
    FAILED = "failed"
    THRASH = "thrash"
    """A warning: models are loaded again and again because they do not fit together."""
    OUTDATED = "outdated"
    """A warning: a file of the model has changed.  Proxies that use its worker keep it, new ones do not."""


class ModelEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One step in the life of one worker.

    Attributes:
        seq: number among all events of a supervisor; after a gap, events were missed: take a snapshot.
        type: what happened.
        at: Unix time in seconds.
        model: the model's path, ``bytes:<digest>``, or ``group:<name>`` of several in one worker.
        key: identity of the model with its options and providers.
        worker_id: identity of this spawn.
        pid: process id of the worker, None before it has one.
        rss: resident bytes of the worker when last measured, None while it has not been.
        gpu: GPU bytes of the worker, None where there is no GPU.
        reason: why it is draining or unloaded: ``ttl``, ``request``, ``evicted``, ``recycled``,
            ``regrouped`` (a model joins its group), ``crash`` or ``exit``.
        seconds: ready: how long the load took; unloaded: how long the model was loaded.
        freed: unloaded: bytes that only this worker had, and that the system has again.
        detail: failed: what went wrong; outdated: the path of the file; thrash: which models, and how much
            of the time their loads took; unloaded: that its worker ended itself for its memory, or why one
            that had started early ended before its load began.
        retry_after: failed: seconds until the host will load the model again.
        isolated: false if the model runs in the application's own process, which numbers its events itself.
    """

    seq: int
    type: EventType
    at: float
    model: str
    key: str
    worker_id: int
    pid: int | None = None
    rss: int | None = None
    gpu: int | None = None
    reason: str | None = None
    seconds: float | None = None
    freed: int | None = None
    detail: str | None = None
    retry_after: float | None = None
    isolated: bool = True

    def __str__(self) -> str:
        if self.type is EventType.THRASH:  # concerns several models
            return f"{self.type}: {self.detail}"
        if self.type is EventType.OUTDATED:
            return (
                f"{self.type} {self.model}, pid {self.pid}: {self.detail} has changed since it was loaded; "
                "existing sessions keep the loaded version until it is unloaded, new ones load the new files"
            )
        parts = [f"{self.type} {self.model}"]
        if self.reason:
            parts.append(f"reason {self.reason}")
        if self.seconds is not None:
            how = "loaded for" if self.type is EventType.UNLOADED else "loaded in"
            parts.append(f"{how} {self.seconds:.3f} s")
        if self.freed is not None:
            parts.append(f"gave back {format_bytes(self.freed)}")
        if self.rss is not None and self.freed is None:
            parts.append(f"RSS {format_bytes(self.rss)}")
        if self.gpu is not None:
            parts.append(f"GPU {format_bytes(self.gpu)}")
        if self.pid is not None:
            parts.append(f"pid {self.pid}")
        if self.retry_after:
            parts.append(f"retry in {self.retry_after:.1f} s")
        if self.detail:
            parts.append(self.detail)
        return ", ".join(parts)
