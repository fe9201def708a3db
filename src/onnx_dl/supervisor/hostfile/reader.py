"""Reads and checks ``host.toml``: settings of a host, and the models that it knows by name.

All that can be checked without loading a model is, and errors have the line.  It runs in the supervisor, so
neither onnxruntime nor numpy is imported.  A test compares the keys with the tables in ``docs/host-file.md``.
"""

from __future__ import annotations

import json
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterator
from typing import Any, Final, NoReturn, TypeVar

import msgspec
from msgspec import Struct

from onnx_dl.core import digests, environment, parsing
from onnx_dl.core.environment import Environment
from onnx_dl.core.spec import ModelSpec, Warmup, specify
from onnx_dl.core.terms import Terms
from onnx_dl.errors import ConfigError
from onnx_dl.supervisor.hostfile.line_numbers import line_of, too_deep
from onnx_dl.supervisor.hostfile.schema import (
    DefaultsTable,
    HostTable,
    InputTable,
    ModelTable,
    ServeTable,
    SessionTable,
    culprit,
    shown,
)
from onnx_dl.system import small_files

MOST_BYTES: Final = 1 << 20
"""Largest size of a file: several thousand models, which are read within half a second."""
_DEEPEST: Final = 32
"""Levels of tables and arrays; the deepest valid key needs seven."""


class Configured(Struct, frozen=True, kw_only=True):
    """A model of the file.  ``eager``: it loads when the host starts; ``warmup`` is by name of the input."""

    name: str
    spec: ModelSpec
    terms: Terms
    eager: bool
    warmup: dict[str, Warmup]


class HostFile(Struct, frozen=True, kw_only=True):
    """A checked file.  Sizes are in bytes, times in seconds; None: not given.  ``models`` is by name, in the
    file's order.  ``serve`` has the given keys of ``[serve]``: paths are absolute, an address that is "off"
    is empty."""

    memory_limit: int | None
    gpu_memory_limit: int | dict[int, int] | None
    room_timeout: float | None
    load_timeout: float | None
    metrics: str | None
    models: dict[str, Configured]
    serve: dict[str, Any] = {}


def read(path: str | os.PathLike[str]) -> HostFile:
    """Reads a file.  Its relative paths begin in its folder.

    Raises:
        ConfigError: it cannot be read or used; the message has file, line and what is allowed.
    """
    file = os.path.abspath(path)
    try:
        data = small_files.read(file, MOST_BYTES)
    except FileNotFoundError as error:
        raise ConfigError(f"{file} cannot be read: there is no such file.") from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from error
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{file}, line {line}: this is not UTF-8, the encoding of TOML.") from None
    return parse(text, os.path.dirname(file), file)


def parse(text: str, base: str, file: str = "host.toml") -> HostFile:
    """Checks a text.  ``base``: the folder in which relative paths begin; ``file``: its name, for messages.

    Checks that model files exist, but opens none.

    Raises:
        ConfigError: it cannot be used; the message has file, line and what is allowed.
    """
    # First, because parsers recurse for each level, and need time by the square of a key's parts.
    if (line := too_deep(text, _DEEPEST)) is not None:
        raise ConfigError(f"{file}, line {line}: this is nested more than {_DEEPEST} levels deep.")
    try:
        raw = tomllib.loads(text)
    except ValueError as error:
        place, reason = _place_of(error, text)
        raise ConfigError(f"{file}, {place}: this is not valid TOML: {reason}.") from None
    return _Checker(text, os.path.abspath(base), file).host(raw)


def _place_of(error: ValueError, text: str) -> tuple[str, str]:
    """Line and reason of an error of tomllib."""
    reason, _, place = str(error).rstrip(")").rpartition(" (at ")
    if place.startswith("line "):
        return place, reason
    return f"line {text.rstrip().count(chr(10)) + 1}", reason or str(error)


_Keys = tuple[str, ...]
_Table = TypeVar("_Table", bound=Struct)
_Parsed = TypeVar("_Parsed")
_INTEGERS: Final = {f"int{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32, 64)} | {
    f"uint{bits}": (0, 2**bits - 1) for bits in (8, 16, 32, 64)
}
_FLOATS: Final = ("float16", "float32", "float64")
DTYPES: Final = ("bool", *_INTEGERS, *_FLOATS, "str")
"""Types of inputs for a warm-up."""
_MOST_ITEMS: Final = 1 << 48
_MOST_INT: Final = 2**64 - 1
_ADDRESSES: Final = {"http", "grpc", "metrics"}
_SIZES: Final = {"memory_limit", "max_body", "max_in_flight"}
_TIMES: Final = {"poll_every", "drain_timeout"}
_PATHS: Final = {"token_file", "tls_cert", "tls_key", "tls_ca"}
"""Keys of ``[serve]``, by what they are."""


class _Checker:
    """Checks one text.  Every error is raised by :meth:`_refuse`, which finds the line."""

    def __init__(self, text: str, base: str, file: str) -> None:
        self._text = text
        self._base = base
        self._file = file

    def host(self, raw: dict[str, Any]) -> HostFile:
        for where, problem in _invalid_values(raw):
            self._refuse(where, problem)
        table = self._table(HostTable, raw, ())
        defaults = self._table(DefaultsTable, table.defaults, ("defaults",))
        ttl = self._parsed(parsing.parse_ttl, defaults.ttl, ("defaults", "ttl"))
        defaults = msgspec.structs.replace(defaults, ttl=ttl)
        common = self._options(defaults.options, ("defaults",))
        models = {name: self._model(name, given, defaults, common) for name, given in table.models.items()}
        self._refuse_twins(list(models.values()))
        if table.metrics:  # an empty one means no page, as in the environment
            self._parsed(parsing.parse_address, table.metrics, ("metrics",))
        return HostFile(
            memory_limit=self._parsed(parsing.parse_size, table.memory_limit, ("memory_limit",)),
            gpu_memory_limit=self._parsed(
                parsing.parse_gpu_limit, table.gpu_memory_limit, ("gpu_memory_limit",)
            ),
            room_timeout=self._parsed(parsing.parse_time, table.room_timeout, ("room_timeout",)),
            load_timeout=self._parsed(parsing.parse_time, table.load_timeout, ("load_timeout",)),
            metrics=table.metrics,
            models=models,
            serve=self._serve(self._table(ServeTable, table.serve, ("serve",))),
        )

    def _serve(self, table: ServeTable) -> dict[str, Any]:
        """The given options of ``[serve]``."""
        found = {name: value for name, value in msgspec.structs.asdict(table).items() if value is not None}
        for name in _ADDRESSES & found.keys():
            if found[name] == "off":
                found[name] = ""
            else:
                self._parsed(parsing.parse_address, found[name], ("serve", name))
        for names, parse in ((_SIZES, parsing.parse_size), (_TIMES, parsing.parse_time)):
            found |= {key: self._parsed(parse, found[key], ("serve", key)) for key in names & found.keys()}
        for name in _PATHS & found.keys():
            found[name] = self._path(found[name]) if found[name] else ""
        if "repository" in found:
            given = [found["repository"]] if isinstance(found["repository"], str) else found["repository"]
            found["repository"] = [self._path(path) for path in given]
        if found.get("poll_every") == 0:
            self._refuse(("serve", "poll_every"), "= 0 must be a time greater than 0")
        return found

    def _path(self, given: str) -> str:
        return os.path.normpath(os.path.join(self._base, os.path.expanduser(given)))

    def _model(
        self, name: str, raw: dict[str, Any], defaults: DefaultsTable, common: dict[str, Any]
    ) -> Configured:
        where = ("models", name)
        if not name.strip() or not name.isprintable() or set(name) & set("/\\") or name in (".", ".."):
            self._refuse(where, "is not a name for a model: use printable text without / and \\")
        given = self._table(ModelTable, raw, where)
        ttl = self._parsed(parsing.parse_ttl, given.ttl, (*where, "ttl"))
        return Configured(
            name=name,
            spec=self._spec(given, where, _first(given.providers, defaults.providers), common),
            terms=Terms(
                ttl=_first(ttl, defaults.ttl, parsing.KEEP),
                pin=_first(given.pin, defaults.pin, False),
                priority=_first(given.priority, defaults.priority, 0),
            ),
            eager=bool(given.eager),
            warmup={key: self._input(key, one, where) for key, one in given.warmup.items()},
        )

    def _spec(self, given: ModelTable, where: _Keys, providers: Any, common: dict[str, Any]) -> ModelSpec:
        how = {
            "options": _merged(common, self._options(given.options, where)),
            "providers": None if providers is None else list(map(_plain, providers)),
            "provider_options": self._provider_options(given, providers, where),
            "memory": None,
            "extra": {},
            "surroundings": {},
            **self._allowances(given, where),
            "group": self._parsed(parsing.parse_group, given.group or None, (*where, "group")),
            "environment": self._environment(given, where),
            "sha256": self._digests(given, where),
            "sandbox": bool(given.sandbox),
        }
        path = os.path.join(self._base, os.path.expanduser(given.path))
        if not os.path.isfile(path):
            problem = f"= {shown(given.path)}: there is no file {path}; paths begin in this file's folder"
            self._refuse((*where, "path"), problem)
        try:
            return specify(path, None, self._base, how)
        except (ConfigError, OSError) as error:
            self._refuse((*where, "path"), f"= {shown(given.path)}: {error}")

    def _environment(self, given: ModelTable, where: _Keys) -> Environment:
        try:
            return environment.parse(given.environment)
        except ConfigError as error:
            self._refuse((*where, "environment"), f"cannot be: {str(error).removesuffix('.')}")

    def _digests(self, given: ModelTable, where: _Keys) -> dict[str, str]:
        try:
            return digests.of_model(digests.parse(given.sha256), os.path.basename(given.path))
        except ConfigError as error:
            self._refuse((*where, "sha256"), f"cannot be: {str(error).removesuffix('.')}")

    def _allowances(self, given: ModelTable, where: _Keys) -> dict[str, int | None]:
        for name in ("max_memory", "max_memory_hard"):
            self._parsed(parsing.parse_size, getattr(given, name), (*where, name))
        try:
            found = parsing.parse_allowances(given.max_memory, given.max_memory_hard, given.max_runs)
        except ConfigError as error:
            self._refuse((*where, "max_memory_hard"), f"cannot be: {error}")
        return found._asdict()

    def _provider_options(self, given: ModelTable, providers: Any, where: _Keys) -> list[Any] | None:
        if given.provider_options is None:
            return None
        keys = (*where, "provider_options")
        if not all(isinstance(item, str) for item in providers or []):
            self._refuse(keys, "is given twice: the providers are pairs of name and options already")
        if len(providers or []) != len(given.provider_options):
            self._refuse(
                keys, f"has {len(given.provider_options)} tables for {len(providers or [])} providers"
            )
        return given.provider_options

    def _input(self, name: str, raw: dict[str, Any], where: _Keys) -> Warmup:
        where = (*where, "warmup", name)
        given = self._table(InputTable, raw, where)
        if given.dtype not in DTYPES:
            self._refuse((*where, "dtype"), f"= {shown(given.dtype)} must be one of {', '.join(DTYPES)}")
        fill = ("" if given.dtype == "str" else 0) if given.fill is None else given.fill
        if not _holds(given.dtype, fill):
            self._refuse((*where, "fill"), f"= {shown(fill)} is not a value of the dtype {given.dtype}")
        if math.prod(given.shape) > _MOST_ITEMS:
            self._refuse((*where, "shape"), f"= {shown(given.shape)} has more items than memory can hold")
        return Warmup(given.dtype, tuple(given.shape), fill)

    def _options(self, table: dict[str, Any], where: _Keys) -> dict[str, Any]:
        return self._table(SessionTable, table, (*where, "options")).plain()

    def _refuse_twins(self, models: list[Configured]) -> None:
        """Refuses two names for one spec: they would share a worker, but may differ in ttl and warm-up."""
        first: dict[str, str] = {}
        for model in models:
            other = first.setdefault(model.spec.key, model.name)
            if other != model.name:
                twin = _dotted(("models", other))
                problem = f"is the same file with the same options as {twin}; use one name for it"
                self._refuse(("models", model.name), problem)

    def _table(self, kind: type[_Table], raw: dict[str, Any], where: _Keys) -> _Table:
        try:
            return msgspec.convert(raw, kind)
        except msgspec.ValidationError:
            keys, problem = culprit(raw, kind)
            self._refuse((*where, *keys), problem)

    def _parsed(self, parse: Callable[[Any], _Parsed], value: Any, where: _Keys) -> _Parsed | None:
        """A value, parsed by a function of :mod:`onnx_dl.core.parsing`."""
        try:
            return None if value is None else parse(value)
        except ConfigError as error:
            reason = str(error).partition(f"{value!r} ")[2]
            self._refuse(where, f"= {shown(value)} {reason.removesuffix('.')}")

    def _refuse(self, where: _Keys, problem: str) -> NoReturn:
        line = line_of(self._text, where)
        raise ConfigError(f"{self._file}, line {line}: {_dotted(where)} {problem}.")


def _invalid_values(raw: dict[str, Any]) -> Iterator[tuple[_Keys, str]]:
    """Place and reason of values that no table may have, because later code cannot handle all of them.

    Not recursive: the nesting may be too deep for that.
    """
    left: list[tuple[_Keys, int, Any]] = [((), 0, raw)]
    while left:
        where, depth, value = left.pop()
        if depth > _DEEPEST:
            yield where, f"is nested more than {_DEEPEST} levels deep"
        elif isinstance(value, dict):
            left += [((*where, key), depth + 1, item) for key, item in value.items()]
            if any("\0" in key for key in value):
                yield where, "has a key with a NUL in it"
        elif isinstance(value, list):
            left += [(where, depth + 1, item) for item in value]
        elif isinstance(value, str) and "\0" in value:
            yield where, f"= {shown(value)} has a NUL in it"
        elif isinstance(value, int) and abs(value) > _MOST_INT:
            yield where, "is a number of more than 64 bits"


def _dotted(keys: _Keys) -> str:
    dotted = ".".join(key if re.fullmatch(r"[\w-]+", key, re.ASCII) else json.dumps(key) for key in keys)
    return dotted if len(dotted) <= 300 else f"{dotted[:300]}..."


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _merged(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any] | None:
    """Options of all models, replaced by a model's own; None if there are none."""
    entries = common.get("config", {}) | own.get("config", {})
    merged = common | own
    return merged | {"config": entries} if merged else None


def _plain(provider: Any) -> Any:
    return list(provider) if isinstance(provider, tuple) else provider


def _holds(dtype: str, fill: bool | int | float | str) -> bool:
    if dtype == "str" or isinstance(fill, str):
        return dtype == "str" and isinstance(fill, str)
    if dtype == "bool" or isinstance(fill, bool):
        return dtype == "bool" and fill in (0, 1)
    least, most = _INTEGERS.get(dtype, (-(2**63), 2**63 - 1))
    return least <= fill <= most if isinstance(fill, int) else dtype in _FLOATS
