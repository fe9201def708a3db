"""Parsers of values that users set.

Each ``parse_...`` function raises :class:`~onnx_dl.errors.ConfigError`, a ValueError, for any other value
than it describes; the message has the value, and what can be given.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping
from typing import Final, NamedTuple

from onnx_dl.errors import ConfigError

KEEP: Final = -1.0
"""TTL of a model that stays loaded until it is unloaded by request."""

_UNITS: Final = {None: 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION: Final = re.compile(r"\s*(?:(-\d+(?:\.\d+)?)|(\d+(?:\.\d+)?)\s*(ms|s|m|h)?)\s*", re.ASCII)
"""Text of a time.  A negative number has no unit: it is not a time, but may have a meaning, as -1 has."""
_TTL_MODES: Final = (
    "-1 (stay until unload() or close()), 0 (unload after each use), or a number of seconds without use "
    'greater than 0, as int, float or text such as "90", "90s", "1.5h" or "5m" (units: ms, s, m, h)'
)


def parse_ttl(value: object) -> float:
    """A TTL in seconds: -1.0, 0.0 or more.

    ``value``: a number, or text such as ``"-1"``, ``"0"``, ``"90"`` (seconds) or ``"5m"``.  This is the only
    parser of TTLs: of proxies, hosts, patches, ``host.toml`` and the command line.
    """
    seconds = _seconds(value)
    if seconds is None or not (seconds == KEEP or 0 <= seconds < math.inf):
        raise ConfigError(f"ttl={value!r} is not one of the three modes: {_TTL_MODES}.")
    return seconds


def parse_time(value: object) -> float:
    """Seconds from 0 to a million."""
    seconds = _seconds(value)
    if seconds is None or not 0 <= seconds <= 1e6:
        raise ConfigError(
            f'{value!r} is not a time; write seconds from 0 to 1000000, or text such as "90s" or "5m".'
        )
    return seconds


def parse_timeout(value: object) -> float | None:
    """Seconds that a caller waits at most.  None: without limit; more than a million count as None."""
    seconds = None if value is None else _seconds(value)
    if value is not None and (seconds is None or not seconds >= 0):
        raise ConfigError(
            f'timeout={value!r} is not a time; give seconds from 0 on, text such as "90s", or None.'
        )
    return None if seconds is None or seconds > 1e6 else seconds


LATENCIES: Final = ("auto", "normal", "low")


def parse_latency(value: object) -> str:
    """``"auto"``, ``"normal"`` or ``"low"``."""
    if value not in LATENCIES:
        raise ConfigError(f'latency={value!r} is none of "auto", "normal" and "low".')
    return str(value)


def parse_span(value: object) -> float:
    """A time in seconds, greater than 0: a number, or text such as ``"2"``, ``"500ms"``, ``"5m"``."""
    seconds = _seconds(value)
    if seconds is None or not 0 < seconds < math.inf:
        raise ConfigError(f'{value!r} is not a time; write seconds, or for example "500ms" or "5m".')
    return seconds


def _seconds(value: object) -> float | None:
    """The seconds of a number or a text, which may be negative; None: it is neither."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        match = _DURATION.fullmatch(value)
        return float(match[1] or match[2]) * _UNITS[match[3]] if match else None
    if not isinstance(value, numbers.Real):  # numpy's numbers are
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def parse_runs(value: object) -> int | None:
    """A number of calls, 1 or more; None: no limit."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63):
        return value
    raise ConfigError(f"max_runs={value!r} is not a number of calls; give an int from 1 on, or None.")


def parse_pin(value: object) -> bool:
    """True or False, as Python's or numpy's bool, or as the numbers 1 and 0."""
    if not isinstance(value, str) and value in (True, False):
        return bool(value)
    raise ConfigError(f"pin={value!r} is neither True nor False.")


def parse_priority(value: object) -> int:
    """A signed integer of 64 bits."""
    found = int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else 2**63
    if -(2**63) <= found < 2**63:
        return found
    raise ConfigError(f"priority={value!r} is not an integer of 64 bits; lower ones are evicted first.")


def parse_group(value: object) -> str | None:
    """The name of a group, or None."""
    if value is None or (isinstance(value, str) and value.strip()):
        return value
    raise ConfigError(f"group={value!r} is not a group name; give text that is not empty, or None.")


def parse_sandbox(value: object) -> bool:
    """True or False."""
    if isinstance(value, bool):
        return value
    raise ConfigError(f"sandbox={value!r} is neither True nor False.")


_SWITCH: Final = dict.fromkeys(("1", "yes", "true", "on"), True) | dict.fromkeys(
    ("0", "no", "false", "off"), False
)


def parse_switch(value: object) -> bool:
    """A bool, or text such as ``"yes"`` and ``"off"``."""
    found = value if isinstance(value, bool) else _SWITCH.get(str(value).lower())
    if found is None:
        raise ConfigError(f"{value!r} is neither yes nor no.")
    return found


class Allowances(NamedTuple):
    """Limits of one worker, as in :class:`~onnx_dl.core.spec.ModelSpec`.  Sizes in bytes; None: no limit."""

    max_memory: int | None = None
    max_memory_hard: int | None = None
    max_runs: int | None = None


def parse_allowances(max_memory: object, max_memory_hard: object, max_runs: object) -> Allowances:
    """The limits of one worker from a proxy's arguments.

    ``max_memory`` alone never ends a call.  ``max_memory_hard`` alone is also the limit between calls:
    otherwise memory that one call leaves behind would end the next call.
    """
    soft = None if max_memory is None else parse_size(max_memory)
    hard = None if max_memory_hard is None else parse_size(max_memory_hard)
    if soft is not None and hard is not None and hard < soft:
        raise ConfigError(
            f"max_memory_hard={max_memory_hard!r} is less than max_memory={max_memory!r}: a worker would be "
            "killed during a run before it could be replaced between runs. Make max_memory_hard the larger."
        )
    return Allowances(hard if soft is None else soft, hard, parse_runs(max_runs))


_SIZES: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", re.IGNORECASE)


def parse_size(value: object) -> int:
    """A number of bytes: an int, or text such as ``"2GiB"``, ``"500 MB"``."""
    match = _SIZE.fullmatch(str(value)) if isinstance(value, str | numbers.Integral) else None
    nbytes = float(match[1]) * _SIZES[(match[2] or "").lower()] if match else math.inf
    if isinstance(value, bool) or nbytes >= 2**63:
        raise ConfigError(
            f'{value!r} is not a size; write a number of bytes or, for example, "2GiB" or "500MB".'
        )
    return int(nbytes)


def parse_gpu_limit(value: object) -> int | dict[int, int]:
    """A size, or the size for each device by its number: a mapping, or text such as ``"0=6GiB,1=10GiB"``."""
    if isinstance(value, str) and "=" in value:
        parts = [part.partition("=") for part in value.split(",")]
        value = {number.strip(): size for number, _, size in parts}
        if len(value) < len(parts):
            raise ConfigError("A device is named twice.")
    if not isinstance(value, Mapping):
        return parse_size(value)
    if not value:
        raise ConfigError("{} names no device; give sizes by number of the device, or one size for all.")
    return {_parse_device(number): parse_size(size) for number, size in value.items()}


def _parse_device(value: object) -> int:
    """The number of a GPU, as an int or text."""
    if not isinstance(value, bool) and re.fullmatch(r"\d{1,3}", str(value), re.ASCII):
        return int(str(value))
    raise ConfigError(f"{value!r} is not the number of a device; give CUDA's number, from 0 to 999.")


_ADDRESS: Final = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:\[\]/]+):(\d{1,5})")


def parse_address(value: str) -> tuple[str, int]:
    """Host and port of text such as ``"127.0.0.1:9464"``, ``"localhost:0"``, ``"[::1]:9464"``."""
    match = _ADDRESS.fullmatch(value)
    if match is None or int(match[2]) > 65535:
        raise ConfigError(
            f"{value!r} is not an address; write host:port, such as 127.0.0.1:9464, or 0.0.0.0:9464 to be "
            "reachable from everywhere."
        )
    return match[1].strip("[]"), int(match[2])


WORKER_STDERR: Final = ("inherit", "log")


def parse_worker_stderr(value: object) -> str:
    """``"inherit"`` or ``"log"``."""
    if value not in WORKER_STDERR:
        raise ConfigError(f'worker_stderr={value!r} is neither "inherit" nor "log".')
    return str(value)
