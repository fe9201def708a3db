"""Environment variables that one model's worker has, beside those that its host was started with.

Values may be secrets: no message, log, name or ``repr()`` shows them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from onnx_dl.errors import ConfigError

LONGEST: Final = 32 << 10
"""Bytes of all names and values."""
_OURS: Final = "ONNX_DL_"


class Environment(msgspec.Struct, frozen=True):
    """Variables and their values; None: the worker does not have this one, whatever its host has.

    Raises:
        ConfigError: (a ValueError) a variable cannot be set.
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
        """The environment of a process that has these instead of what ``environ`` has of the same name."""
        merged = {**environ, **self.variables}
        return {name: value for name, value in merged.items() if value is not None}

    @property
    def tag(self) -> str:
        """A short name that tells one environment from another."""
        plain = msgspec.json.encode(self.variables, order="deterministic")
        return hashlib.sha256(plain).hexdigest()[:8]


NOTHING: Final = Environment()


def parse(value: object) -> Environment:
    """The variables of a mapping from names to text; None: there are none.

    Raises:
        ConfigError: (a ValueError) it is something else, or a variable cannot be set.
    """
    if isinstance(value, Environment):
        return value
    if value is None:
        return Environment()
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"environment is a {type(value).__name__}; give a dict of names and text, such as "
            '{"OMP_NUM_THREADS": "4"}, or None.'
        )
    return Environment({name: _plain(given) for name, given in value.items()})


def parse_pairs(texts: Iterable[str]) -> dict[str, str]:
    """Texts such as ``OMP_NUM_THREADS=4``.

    Raises:
        ConfigError: (a ValueError) one is written otherwise.
    """
    pairs = [text.partition("=") for text in texts]
    for name, equals, _ in pairs:
        if not (name and equals):
            raise ConfigError(f"--env {name!r} is no variable; write NAME=VALUE, such as OMP_NUM_THREADS=4.")
    return {name: value for name, _, value in pairs}


def _plain(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _checked(name: object, value: object) -> int:
    """The bytes that the variable takes.

    Raises:
        ConfigError: it cannot be set.
    """
    if not isinstance(name, str) or not name or set(name) & set("=\0"):
        raise ConfigError(f"environment: {name!r} is no name of a variable; give text without '=' and NUL.")
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
