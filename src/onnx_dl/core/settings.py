"""Environment variables ``ONNX_DL_*`` as types."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from onnx_dl.core.parsing import _CHOICES, parse_address, parse_size
from onnx_dl.errors import ConfigError

_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e6)]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the environment can change.  Times are in seconds."""

    python: str = ""
    """The interpreter for our processes; empty: one like the application's (:mod:`onnx_dl.system.interpreters`), or
    the application itself where it is frozen (:mod:`onnx_dl.system.boot`)."""
    lane: str = "socket"
    """``socket``: calls go over a Unix socket, ZeroMQ carries control; ``zmq``: calls go over ZeroMQ too."""
    start: str = "fork"
    """``fork``: workers are forked from a template process; ``exec``: each is a fresh interpreter."""
    load_timeout: _Seconds = 600.0
    """A load that takes longer is ended and raises LoadTimeout."""
    start_timeout: _Seconds = 30.0
    """How long the supervisor may take to come up, and any single control message to be answered."""
    exit_grace: _Seconds = 5.0
    """How long a drained worker may take to exit before it is killed."""
    memory_limit: str = ""
    """Bytes that all workers together may take, such as ``2GiB``; empty: four fifths of what the machine or
    its cgroup has."""
    gpu_memory_limit: str = ""
    """Bytes of GPU memory that all workers together may take, such as ``6GiB``; empty: four fifths of what
    the GPUs have, where NVML tells."""
    room_timeout: _Seconds = 60.0
    """How long a load may wait for others to make room."""
    host: str = ""
    """The name of the shared host that serves this application; empty: one of its own."""
    config: str = ""
    """A file that says which models the host has and what they may take; see docs/host-file.md."""
    linger: _Seconds = 60.0
    """How long a shared host that was started in the background stays without clients and models."""
    stable_after: _Seconds = 10.0
    """A worker that was ready for longer than this does not count as one that keeps dying."""
    cache: str = "on"
    """``off``: the load cache is neither read nor written."""
    cache_dir: str = ""
    """Where the load cache lies; empty: ``onnx-dl`` in the user's cache folder."""
    cache_limit: str = "20GiB"
    """Bytes that the load cache may take; beyond that, what was not used for longest goes."""
    cache_from: _Seconds = 0.15
    """Loads that take at least this long are saved for the next time."""
    worker_stderr: str = "inherit"
    """Where an application writes what its own host's workers write on stderr: ``inherit``, to its stderr;
    ``log``, to the logger ``onnx_dl.worker``."""
    metrics: str = ""
    """Where the supervisor serves metrics over HTTP, such as ``127.0.0.1:9464``; empty: nowhere."""


def settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings from ``ONNX_DL_*`` variables: ``ONNX_DL_LOAD_TIMEOUT=120`` and so on.

    Raises:
        ValueError: (as :class:`~onnx_dl.errors.ConfigError`) a variable has a value that cannot be used.
    """
    found: dict[str, str] = {}
    for field in Settings.__struct_fields__:
        variable = f"ONNX_DL_{field.upper()}"
        if text := environ.get(variable):
            _check_choice(variable, field, text)
            if field in ("cache_limit", "memory_limit", "gpu_memory_limit"):
                parse_size(text)
            if field == "metrics":
                parse_address(text)
            _check_kind(variable, field, text)
            found[field] = os.path.abspath(text) if field == "config" else text
    return msgspec.convert(found, Settings, strict=False)


def _check_kind(variable: str, field: str, text: str) -> None:
    try:
        msgspec.convert({field: text}, Settings, strict=False)
    except msgspec.ValidationError:
        raise ConfigError(f"{variable}={text!r} is no number of seconds from 0 to 1000000.") from None


def _check_choice(variable: str, field: str, text: str) -> None:
    choices = _CHOICES.get(field, ())
    if choices and text not in choices:
        raise ConfigError(f"{variable}={text!r} is not one of {', '.join(choices)}.")


def cache_folder(found: Settings) -> Path:
    """Where what outlives a host is kept."""
    if found.cache_dir:
        return Path(found.cache_dir)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "onnx-dl"
