"""Environment variables ``ONNX_DL_*`` as types."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final

import msgspec

from onnx_dl.core.parsing import WORKER_STDERR, parse_address, parse_size
from onnx_dl.errors import ConfigError

DEFAULT_HOST: Final = "default"
"""Name of the shared host when the user names none."""

_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e6)]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a host, from the environment.  Times are in seconds, sizes in bytes."""

    python: str = ""
    """Interpreter of our processes.  Empty: one like the application's, or itself if it is frozen."""
    lane: str = "socket"
    """``socket``: calls go over a Unix socket, ZeroMQ carries control only; ``zmq``: calls use ZeroMQ too."""
    start: str = "fork"
    """``fork``: workers are forked from a template process; ``exec``: each is a fresh interpreter."""
    isolation: str = "on"
    """``off``: models run in the application's own process, unless a proxy says ``isolation=True``."""
    load_timeout: _Seconds = 600.0
    """Time limit of a load; a longer one is ended and raises LoadTimeout."""
    start_timeout: _Seconds = 30.0
    """Time limit for the start of a supervisor, and for the answer to any single control message."""
    exit_grace: _Seconds = 5.0
    """Time that a drained worker has to exit before it is killed."""
    memory_limit: int | None = None
    """Limit of all workers together.  None: four fifths of the memory of the machine or its cgroup."""
    gpu_memory_limit: int | None = None
    """Limit of GPU memory of all workers together.  None: four fifths of the GPUs' memory, if NVML tells."""
    room_timeout: _Seconds = 60.0
    """Time that a load may wait until other models make room."""
    host: str = ""
    """Name of the shared host that serves this application.  Empty: a private host."""
    config: str = ""
    """Path of a file that lists the host's models and limits; see docs/host-file.md."""
    linger: _Seconds = 60.0
    """Time that a shared host in the background stays without clients and models."""
    stable_after: _Seconds = 10.0
    """A worker that was ready for longer does not count as one that keeps dying."""
    cache: str = "on"
    """``off``: the load cache is neither read nor written."""
    cache_dir: str = ""
    """Folder of the load cache.  Empty: ``onnx-dl`` in the user's cache folder."""
    cache_limit: int = 20 << 30
    """Size limit of the load cache; beyond it, the least recently used entries are removed."""
    cache_from: _Seconds = 0.15
    """Loads that take at least this long are saved in the load cache."""
    worker_stderr: str = "inherit"
    """Target of stderr lines of a private host's workers.  ``inherit``: the application's stderr; ``log``:
    the logger ``onnx_dl.worker``."""
    metrics: str = ""
    """Address at which the supervisor serves metrics over HTTP, such as ``127.0.0.1:9464``.  Empty: none."""


_CHOICES: Final = {
    "start": ("fork", "exec"),
    "isolation": ("on", "off"),
    "lane": ("socket", "zmq"),
    "cache": ("on", "off"),
    "worker_stderr": WORKER_STDERR,
}
_SIZE_FIELDS: Final = frozenset({"memory_limit", "gpu_memory_limit", "cache_limit"})


def settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings from ``ONNX_DL_*`` variables, such as ``ONNX_DL_LOAD_TIMEOUT=120``.

    Raises:
        ConfigError: (a ValueError) the value of a variable is not valid.
    """
    found: dict[str, str | int] = {}
    for field in Settings.__struct_fields__:
        variable = f"ONNX_DL_{field.upper()}"
        if text := environ.get(variable):
            found[field] = _parse_field(variable, field, text)
    return msgspec.convert(found, Settings, strict=False)


def _parse_field(variable: str, field: str, text: str) -> str | int:
    if text not in (choices := _CHOICES.get(field, (text,))):
        raise ConfigError(f"{variable}={text!r} is not one of {', '.join(choices)}.")
    if field in _SIZE_FIELDS:
        return parse_size(text)
    if field == "config":
        return os.path.abspath(text)
    if field == "metrics":
        parse_address(text)
    try:
        msgspec.convert({field: text}, Settings, strict=False)
    except msgspec.ValidationError:
        raise ConfigError(f"{variable}={text!r} is not a number of seconds from 0 to 1000000.") from None
    return text


def cache_folder(found: Settings) -> Path:
    """The folder of files that outlive a host, such as the load cache."""
    if found.cache_dir:
        return Path(found.cache_dir)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "onnx-dl"
