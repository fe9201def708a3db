"""Environment of the worker of one model: variables beside those of its host, and attributes of its threads.

Values of variables may be secrets: they are not in any message, log, name or ``repr()``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from onnx_dl.errors import ConfigError

LONGEST: Final = 32 << 10
"""Largest number of bytes of all names and values."""
_OURS: Final = "ONNX_DL_"


class Environment(msgspec.Struct, frozen=True):
    """Variables and their values; None: the variable is removed from the worker's environment.

    Raises:
        ConfigError: (a ValueError) a variable is not valid.
    """

    variables: dict[str, str | None] = {}

    def __post_init__(self) -> None:
        nbytes = sum(_checked(name, value) for name, value in self.variables.items())
        if nbytes > LONGEST:
            raise ConfigError(f"environment has {nbytes} bytes of names and values; {LONGEST} are allowed.")

    def __bool__(self) -> bool:
        return bool(self.variables)

    def __repr__(self) -> str:
        return f"Environment({', '.join(sorted(self.variables))})"

    def over(self, environ: Mapping[str, str]) -> dict[str, str]:
        """``environ`` with these variables set or removed."""
        merged = {**environ, **self.variables}
        return {name: value for name, value in merged.items() if value is not None}

    @property
    def tag(self) -> str:
        """A short digest that differs between environments."""
        plain = msgspec.json.encode(self.variables, order="deterministic")
        return hashlib.sha256(plain).hexdigest()[:8]


NOTHING: Final = Environment()

Mask = Annotated[bytes, Meta(max_length=1024)]
Nice = Annotated[int, Meta(ge=-20, le=19)]
Policy = Annotated[int, Meta(ge=0, le=255)]
Priority = Annotated[int, Meta(ge=0, le=99)]
Mode = Annotated[int, Meta(ge=0, le=0o777)]


class ThreadAttributes(msgspec.Struct, frozen=True, kw_only=True):
    """Attributes of one thread, which its children inherit.  None: not known, so the worker's stays as it is.

    ``processors``: the CPU affinity, as a little-endian bit mask; ``policy`` and ``priority``: of the
    scheduler, such as SCHED_BATCH and 0.
    """

    processors: Mask | None = None
    nice: Nice | None = None
    policy: Policy | None = None
    priority: Priority = 0
    umask: Mode | None = None


def parse(value: object) -> Environment:
    """The environment of a mapping from names to text; None: an empty one.

    Raises:
        ConfigError: (a ValueError) the value is not a mapping, or a variable is not valid.
    """
    if isinstance(value, Environment):
        return value
    if value is None:
        return NOTHING
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"environment is a {type(value).__name__}; give a dict of names and text, such as "
            '{"OMP_NUM_THREADS": "4"}, or None.'
        )
    paths = {name: os.fspath(given) for name, given in value.items() if isinstance(given, os.PathLike)}
    return Environment({**value, **paths})


def parse_pairs(texts: Iterable[str]) -> dict[str, str]:
    """Splits texts such as ``OMP_NUM_THREADS=4``.

    Raises:
        ConfigError: (a ValueError) a text has another form.
    """
    pairs = [text.partition("=") for text in texts]
    for name, equals, _ in pairs:
        if not (name and equals):
            raise ConfigError(f"--env {name!r} is not a variable; write NAME=VALUE, e.g. OMP_NUM_THREADS=4.")
    return {name: value for name, _, value in pairs}


def _checked(name: object, value: object) -> int:
    """Checks a variable; returns its number of bytes, ``=`` and NUL included."""
    if not isinstance(name, str) or not name or set(name) & set("=\0"):
        raise ConfigError(f"environment: {name!r} is not a variable name; give text without '=' and NUL.")
    if name.startswith(_OURS):
        raise ConfigError(
            f"environment: {name} is a setting of onnx-dl, and of the whole host. Set it before the host "
            "starts, or give it to ModelHost."
        )
    if not isinstance(value, str | None) or "\0" in (value or ""):
        kind = "text with NUL in it" if isinstance(value, str) else f"a value of type {type(value).__name__}"
        raise ConfigError(f"environment: {name} is {kind}; give text, or None to leave the variable out.")
    try:
        return len(f"{name}{value or ''}".encode()) + 2
    except UnicodeEncodeError:
        raise ConfigError(f"environment: {name!a} or its value is not valid UTF-8.") from None
