"""What a model says of itself and how it fares, as plain data."""

from __future__ import annotations

import os
from typing import Any

import msgspec

from onnx_dl.core.file_identity import ReadFile
from onnx_dl.core.lifecycle import ModelState


class TensorSpec(msgspec.Struct, frozen=True):
    """One input, output or initializer; ``shape`` holds ints, names of symbolic dimensions, or None."""

    name: str
    type: str
    shape: list[int | str | None]


class ModelDescription(msgspec.Struct, frozen=True, kw_only=True):
    """What a loaded model says of itself; remembered by clients, so asking again costs nothing."""

    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    overridable_initializers: list[TensorSpec] = []
    modelmeta: dict[str, Any] = {}
    providers: list[str] = []
    provider_options: dict[str, Any] = {}
    options: dict[str, Any] = {}
    details: dict[str, Any] = {}
    """What only this engine has to say."""
    members: dict[str, ModelDescription] = {}
    """What the models of a group say of themselves, by key."""
    failed: dict[str, Any] = {}
    """How others of them did not load: what :mod:`onnx_dl.protocol.failures` makes of an exception."""
    files: list[ReadFile] = []
    """What it was read from, as that was."""


class Usage(msgspec.Struct, frozen=True):
    """Memory of one worker in bytes.

    ``private`` is what only this process holds (USS); ``shared`` what its callers' lanes hold for tensors;
    ``pss`` is resident memory in which pages that processes share count in part; ``peak`` is the most that it
    was, by the kernel's high-water mark: during the load when the model has just become ready, in runs after
    that (the mark is set back when the model is ready, and from time to time).  ``gpu_estimated``: the driver
    does not tell what this process has; ``gpu`` is by how much less of the devices was free after the load.
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

    ``leases`` counts the proxies that hold the model; ``ttl`` is in force now, in seconds (-1 stays);
    ``loads`` counts the workers that became ready.  Of the present worker: ``busy`` counts the calls and
    ``session()`` blocks under way, ``idle`` is the seconds since its last use (None: in use, or not used
    yet), ``runs`` counts the calls that it has answered, ``p50`` is the median of the seconds that they took;
    ``members`` are the names of the models of a group, by key.
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


def to_plain(value: Any) -> Any:
    """What callers give for text and numbers, as these: subclasses of str, paths, numpy's scalars.

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
