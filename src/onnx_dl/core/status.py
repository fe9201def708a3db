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
    """Memory of one worker, in bytes.

    Attributes:
        rss: resident memory, including what it shares with other processes.
        private: memory that only this process has (USS).
        gpu: GPU memory; None without a GPU.
        shared: memory for tensors that it shares with its callers.
        pss: resident memory, in which a page of several processes counts in part.
        peak: the highest ``rss`` according to the kernel.  Of the load, when the model has just become ready;
            of runs, after that.  The kernel's mark is reset when the model is ready, and now and then.
        gpu_estimated: True if the driver has no figure for this process.  ``gpu`` is then the decrease of
            free device memory during the load.
        inherited: the part of ``pss`` in pages that the worker got when it was forked from the template, and
            has not written to.  They are the template's memory, and do not count in ``memory_limit``.
        gpus: ``gpu`` by number of the device in the host's environment: on the devices that the model's
            options name.
    """

    rss: int = 0
    private: int = 0
    gpu: int | None = None
    shared: int = 0
    pss: int = 0
    peak: int = 0
    gpu_estimated: bool = False
    inherited: int = 0
    gpus: dict[int, int] = {}


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One model of a :class:`Snapshot`; ``str()`` of it is one line.

    Attributes:
        model: the model's path, ``bytes:<digest>``, or ``group:<name>`` of several in one worker.
        key: identity of the model with its options and providers.
        state: where the model is in its life.
        worker_id: identity of the present worker; None without one.
        pid: process id of the present worker; None without one.
        leases: number of proxies that hold the model.
        ttl: TTL in force, in seconds; -1: stays; None: there is no worker.
        usage: memory of the present worker.
        loads: number of workers that became ready.
        failures: number of failures in a row.
        retry_after: seconds until the host loads a failed model again; 0: at once.
        pinned: True if the model is not evicted to make room for others.
        priority: models of lower priority are evicted first.
        busy: number of calls and ``session()`` blocks that the present worker serves now.
        idle: seconds since the last use of the present worker; None: in use, or not used yet.
        runs: number of calls that the present worker has answered.
        p50: median duration of these calls, in seconds; None before the first.
        members: names of the models of a group, by key.
        isolated: False if the model runs in the application's own process, ``pid``.
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

    def __str__(self) -> str:
        from onnx_dl.core import snapshot_text

        return snapshot_text.line(self)


class Snapshot(msgspec.Struct, frozen=True):
    """All models of a host at one moment.  ``print(snapshot)`` shows a table, a notebook one of HTML.

    Attributes:
        seq: number of the last event before this moment; events with a larger number came later.
        supervisor_pid: process id of the supervisor; None if none runs.
        models: the host's models.
        host: name of a shared host; None: a private one.
        memory_limit: bytes that all workers together may take.
        memory_in_use: bytes of ``memory_limit`` that are taken or reserved: the PSS of the workers without
            what they inherited, or what they are known to take in runs if that is more; loads in progress;
            workers that are ending.
        metrics: host and port where the supervisor serves metrics (``ONNX_DL_METRICS``); None: nowhere.
        gpu_memory_limit: bytes of GPU memory that all workers together may take; None: no limit, or no model
            was loaded on a GPU yet.
        gpu_memory_in_use: bytes of ``gpu_memory_limit`` that are taken or reserved.
        gpu_memory_limits: the limit of each device that has one of its own, by its number;
            ``gpu_memory_limit`` is their sum.
        gpu_memory_in_use_on: the part of ``gpu_memory_in_use`` on each device, by its number.
    """

    seq: int
    supervisor_pid: int | None
    models: list[ModelStatus]
    host: str | None = None
    memory_limit: int | None = None
    memory_in_use: int = 0
    metrics: str | None = None
    gpu_memory_limit: int | None = None
    gpu_memory_in_use: int = 0
    gpu_memory_limits: dict[int, int] = {}
    gpu_memory_in_use_on: dict[int, int] = {}

    def __str__(self) -> str:
        from onnx_dl.core import snapshot_text

        return snapshot_text.text(self)

    def _repr_html_(self) -> str:
        """The table for a notebook."""
        from onnx_dl.core import snapshot_text

        return snapshot_text.as_html(self)


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
