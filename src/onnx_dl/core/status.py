"""Description and status of a model, as plain data."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from onnx_dl.core.lifecycle import ModelState
from onnx_dl.core.model_files import ReadFile


class TensorSpec(msgspec.Struct, frozen=True):
    """One input, output or initializer; ``shape`` holds ints, names of symbolic dimensions, or None."""

    name: str
    type: str
    shape: list[int | str | None]


class ModelDescription(msgspec.Struct, frozen=True, kw_only=True):
    """Metadata of a loaded model.  Clients remember it, so reading it again costs nothing."""

    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    overridable_initializers: list[TensorSpec] = []
    modelmeta: dict[str, Any] = {}
    providers: list[str] = []
    provider_options: dict[str, Any] = {}
    options: dict[str, Any] = {}
    details: dict[str, Any] = {}
    """Metadata that only this engine has."""
    members: dict[str, ModelDescription] = {}
    """Descriptions of the models of a group, by key."""
    failed: dict[str, Any] = {}
    """Exceptions of models of the group that did not load, by key (:mod:`onnx_dl.protocol.failures`)."""
    files: list[ReadFile] = []
    """The files that it was read from, as they were."""


class Usage(msgspec.Struct, frozen=True):
    """Memory of one worker in bytes.

    ``private`` is held by this process only (USS); ``shared`` is held by its callers' lanes for tensors;
    ``pss`` is resident memory in which pages that processes share count in part; ``peak`` is the kernel's
    high-water mark: of the load when the model has just become ready, of runs after that (the mark is reset
    when the model is ready, and from time to time).  ``gpu_estimated``: the driver has no figure for this
    process; ``gpu`` is then the decrease of free device memory during the load.
    """

    rss: int = 0
    private: int = 0
    gpu: int | None = None
    shared: int = 0
    pss: int = 0
    peak: int = 0
    gpu_estimated: bool = False


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a snapshot.

    ``leases`` counts the proxies that hold the model; ``ttl`` is the TTL in force, in seconds (-1: stays);
    ``loads`` counts the workers that became ready.  Of the present worker: ``busy`` counts the calls and
    ``session()`` blocks under way, ``idle`` is the seconds since its last use (None: in use, or not used
    yet), ``runs`` counts the calls that it has answered, ``p50`` is the median of the seconds that they took;
    ``members`` are the names of the models of a group, by key; ``isolated`` is false if the model runs in the
    application's own process (``pid``).
    """

    model: str
    key: str
    state: ModelState
    worker_id: int | None
    pid: int | None
    leases: int
    ttl: float | None
    usage: Usage
    loads: int
    failures: int
    retry_after: float
    pinned: bool = False
    priority: int = 0
    busy: int = 0
    idle: float | None = None
    runs: int = 0
    p50: float | None = None
    members: dict[str, str] = {}
    isolated: bool = True


class Snapshot(msgspec.Struct, frozen=True):
    """All models at one moment.  Events with a larger ``seq`` came later."""

    seq: int
    supervisor_pid: int | None
    models: list[ModelStatus]
    host: str | None = None
    """Name of a shared host."""
    memory_limit: int | None = None
    """Bytes that all workers together may take."""
    memory_in_use: int = 0
    """Bytes of it that are taken or reserved: PSS of the workers or, if that is more, what they are known to
    take in runs; loads in progress; workers that are ending."""
    metrics: str | None = None
    """Host and port where the supervisor serves metrics (``ONNX_DL_METRICS``)."""
    gpu_memory_limit: int | None = None
    """Like ``memory_limit``, for GPU memory; None: no limit, or nothing was to be loaded on a GPU so far."""
    gpu_memory_in_use: int = 0


def to_plain(value: object) -> object:
    """Converts subclasses of str, paths and numpy's scalars to plain text and numbers.

    Raises:
        TypeError: it is none of these.
    """
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "dtype") and hasattr(value, "item") and not getattr(value, "shape", True):
        return value.item()
    raise TypeError(f"Objects of type {type(value)} have no plain form.")
