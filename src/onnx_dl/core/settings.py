"""Environment variables ``ONNX_DL_*`` as types."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final

import msgspec

from onnx_dl.core.parsing import WORKER_STDERR, parse_address, parse_gpu_limit, parse_size, parse_ttl
from onnx_dl.errors import ConfigError

DEFAULT_HOST: Final = "default"
"""Name of the shared host when the user names none."""

_Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e6)]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a host, from the environment.  Times are in seconds, sizes in bytes.

    The docstrings of the fields become ``docs/settings.md`` (``.ci/settings_table.py``).  What follows
    "Default:" goes into its own column.
    """

    python: str = ""
    """Path of the Python interpreter for onnx-dl's processes.  Default: the same version and environment as
    the application's, or the application itself if it is frozen."""
    lane: str = "socket"
    """Transport of calls.  ``socket``: a Unix socket; ``zmq``: ZeroMQ, which control messages always use."""
    start: str = "fork"
    """Start of workers.  ``fork``: forked from a template process; ``exec``: each is a fresh interpreter."""
    isolation: str = "on"
    """Process of the models.  ``on``: worker processes; ``off``: the application's own process, except for
    models with ``isolation=True``."""
    load_timeout: _Seconds = 600.0
    """Time limit of a load.  A load that takes longer is ended, and raises ``LoadTimeout``."""
    start_timeout: _Seconds = 30.0
    """Time limit for the start of a supervisor, and for the answer to any single control message."""
    exit_grace: _Seconds = 5.0
    """Time that a worker has to exit after its last call; then it is killed.  Also the time that running
    calls have when a shared host is stopped."""
    memory_limit: int | None = None
    """Limit of the memory of all workers together.  Default: four fifths of the memory of the machine or its
    cgroup."""
    gpu_memory_limit: int | dict[int, int] | None = None
    """Limit of the GPU memory of all workers together, or of each GPU by its number.  Default: four fifths of
    the memory of the GPUs, if NVML reports it."""
    room_timeout: _Seconds = 60.0
    """Time that a load waits until other models make room.  After that it raises ``CapacityError``."""
    host: str = ""
    """Name of the shared host that serves this application.  Default: none; the application has its own
    host."""
    config: str = ""
    """Path of a file with the host's models and limits (``host.toml``).  Default: none."""
    linger: _Seconds = 60.0
    """Time after which a shared host in the background ends, if it has no clients and no models."""
    template_ttl: Annotated[float, msgspec.Meta(ge=-1)] = 60.0
    """Time after which the template ends, if no proxy is open that has used a model, and no model is loaded.
    The next load starts another one, which takes longer.  ``-1``: never."""
    stable_after: _Seconds = 10.0
    """Time after which a worker counts as stable.  If it dies later, the next load is not delayed."""
    cache: str = "on"
    """Use of the load cache.  ``off``: nothing is read from it or saved in it."""
    cache_dir: str = ""
    """Folder of the load cache.  Default: ``onnx-dl`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    cache_limit: int = 20 << 30
    """Size limit of the load cache.  Beyond it, the least recently used entries are removed."""
    cache_from: _Seconds = 0.15
    """Time that a load must take so that its model is saved in the load cache."""
    worker_stderr: str = "inherit"
    """Target of the lines that workers of a private host write on stderr.  ``inherit``: the application's
    stderr; ``log``: the logger ``onnx_dl.worker``."""
    metrics: str = ""
    """Address at which the supervisor serves metrics over HTTP, such as ``127.0.0.1:9464``.  Default:
    none."""


CHOICES: Final = {
    "start": ("fork", "exec"),
    "isolation": ("on", "off"),
    "lane": ("socket", "zmq"),
    "cache": ("on", "off"),
    "worker_stderr": WORKER_STDERR,
}
SIZES: Final = frozenset({"memory_limit", "cache_limit"})
SIZES_BY_DEVICE: Final = frozenset({"gpu_memory_limit"})

ELSEWHERE: Final = {
    "ONNX_DL_RUNTIME_DIR": (
        "Folder of the files of shared hosts: addresses, secrets, logs.  Its mode must be 0700.  Default: "
        "``onnx-dl`` in ``$XDG_RUNTIME_DIR``, or ``onnx-dl-UID`` in a folder for temporary files."
    ),
}
"""Variables that are no field of :class:`Settings`, and what they mean."""
INTERNAL: Final = {
    "ONNX_DL_OWNER": "Process id and start time of the server whose host this is: the host ends with it.",
    "ONNX_DL_FREEZE_SUPPORT": "A mark that ``freeze_support()`` was called.",
    "ONNX_DL_RUN": "Options of ``onnx-dl run`` for the program that it starts.",
    "ONNX_DL_RUN_PYTHONPATH": "The program's own ``PYTHONPATH``, while ``onnx-dl run`` starts it.",
}
"""Variables that onnx-dl sets for its own processes."""


def settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings from ``ONNX_DL_*`` variables, such as ``ONNX_DL_LOAD_TIMEOUT=120``.

    Raises:
        ConfigError: (a ValueError) the value of a variable is not valid.
    """
    found: dict[str, str | float | dict[int, int]] = {}
    for field in Settings.__struct_fields__:
        variable = f"ONNX_DL_{field.upper()}"
        if text := environ.get(variable):
            found[field] = _parse_field(variable, field, text)
    return msgspec.convert(found, Settings, strict=False)


def _parse_field(variable: str, field: str, text: str) -> str | float | dict[int, int]:
    if text not in (choices := CHOICES.get(field, (text,))):
        raise ConfigError(f"{variable}={text!r} is not one of {', '.join(choices)}.")
    if field == "config":
        return os.path.abspath(text)
    try:
        if field in SIZES:
            return parse_size(text)
        if field in SIZES_BY_DEVICE:
            return parse_gpu_limit(text)
        if field == "template_ttl":
            return parse_ttl(text)
        if field == "metrics":
            parse_address(text)
    except ConfigError as error:
        raise ConfigError(f"{variable}: {error}") from None
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
