"""Defaults, environment variables and the validation of what users may set.

Covers numbers and names; who uses them is not known here.
"""

from __future__ import annotations

import math
import numbers
import re
from typing import Any, Final, NamedTuple

from onnx_dl.errors import ConfigError

KEEP: Final = -1.0
"""The TTL of a model that stays until it is asked to go."""

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h)\s*")
_TTL_MODES: Final = (
    "-1 (stay until unload() or close()), 0 (unload after each use), or a number of seconds without use "
    'greater than 0, as int, float or text such as "90s" or "5m"'
)


def parse_ttl(value: object) -> float:
    """A TTL in seconds: -1.0, 0.0 or more.

    Raises:
        ValueError: (as :class:`~onnx_dl.errors.ConfigError`) anything but the three modes.
    """
    seconds = _seconds(value)
    if seconds is None or not (seconds == KEEP or 0 <= seconds < math.inf):
        raise ConfigError(f"ttl={value!r} is not one of the three modes: {_TTL_MODES}.")
    return seconds


def parse_time(value: object) -> float:
    """Seconds from 0 to a million.

    Raises:
        ValueError: (as :class:`~onnx_dl.errors.ConfigError`) it is no such time.
    """
    seconds = _seconds(value)
    if seconds is None or not 0 <= seconds <= 1e6:
        raise ConfigError(
            f'{value!r} is no time; write seconds from 0 to 1000000, or text such as "90s" or "5m".'
        )
    return seconds


def parse_timeout(value: object) -> float | None:
    """Seconds after which a caller goes on; None: it waits for as long as it takes, as with more than a
    million seconds.

    Raises:
        ValueError: (as :class:`~onnx_dl.errors.ConfigError`) it is no such time.
    """
    seconds = None if value is None else _seconds(value)
    if value is not None and (seconds is None or not seconds >= 0):
        raise ConfigError(
            f'timeout={value!r} is no time; give seconds from 0 on, text such as "90s", or None.'
        )
    return None if seconds is None or seconds > 1e6 else seconds


LATENCIES: Final = ("normal", "low")


def parse_latency(value: object) -> str:
    """``"normal"`` or ``"low"``.

    Raises:
        ValueError: (as :class:`~onnx_dl.errors.ConfigError`) anything else.
    """
    if value not in LATENCIES:
        raise ConfigError(f'latency={value!r} is neither "normal" nor "low".')
    return str(value)


def parse_span(value: object) -> float:
    """A time in seconds that is greater than 0: a number, or text such as ``"2"``, ``"500ms"``, ``"5m"``.

    Raises:
        ValueError: (as :class:`~onnx_dl.errors.ConfigError`) it is none.
    """
    seconds = _seconds(plain_number(value))
    if seconds is None or not 0 < seconds < math.inf:
        raise ConfigError(f'{value!r} is no time; write seconds, or for example "500ms" or "5m".')
    return seconds


def plain_number(value: Any) -> Any:
    """Text from a command line that is a number, as one; anything else as it is."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _seconds(value: object) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        match = _DURATION.fullmatch(value)
        return float(match[1]) * _UNITS[match[2]] if match else None
    if not isinstance(value, numbers.Real):  # numpy's numbers are
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def parse_runs(value: object) -> int | None:
    """A number of calls, 1 or more; None: no limit.

    Raises:
        ValueError: (as :class:`~onnx_dl.errors.ConfigError`) it is neither.
    """
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63):
        return value
    raise ConfigError(f"max_runs={value!r} is no number of calls; give an int from 1 on, or None.")


def parse_pin(value: object) -> bool:
    """True or False, as Python's, numpy's, or the numbers 1 and 0.

    Raises:
        ValueError: (as :class:`~onnx_dl.errors.ConfigError`) it is neither.
    """
    if not isinstance(value, str) and value in (True, False):
        return bool(value)
    raise ConfigError(f"pin={value!r} is neither True nor False.")


def parse_priority(value: object) -> int:
    """A whole number of 64 bits.

    Raises:
        ValueError: (as :class:`~onnx_dl.errors.ConfigError`) it is none.
    """
    found = int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else 2**63
    if -(2**63) <= found < 2**63:
        return found
    raise ConfigError(f"priority={value!r} is no whole number; models of a lower one make room first.")


def parse_group(value: object) -> str | None:
    """The name of a group, or None.

    Raises:
        ValueError: (as :class:`~onnx_dl.errors.ConfigError`) it is neither.
    """
    if value is None or (isinstance(value, str) and value.strip()):
        return value
    raise ConfigError(f"group={value!r} is no name of a group; give text that is not empty, or None.")


_SWITCH: Final = {
    "1": True,
    "yes": True,
    "true": True,
    "on": True,
    "0": False,
    "no": False,
    "false": False,
    "off": False,
}


def parse_switch(value: object) -> bool:
    """A bool, or text such as ``"yes"`` and ``"off"``.

    Raises:
        ValueError: (as :class:`~onnx_dl.errors.ConfigError`) it is neither.
    """
    found = value if isinstance(value, bool) else _SWITCH.get(str(value).lower())
    if found is None:
        raise ConfigError(f"{value!r} is neither yes nor no.")
    return found


class Allowances(NamedTuple):
    """What a worker may use; as :class:`~onnx_dl.core.spec.ModelSpec` has it."""

    max_memory: int | None = None
    max_memory_hard: int | None = None
    max_runs: int | None = None


def parse_allowances(max_memory: object, max_memory_hard: object, max_runs: object) -> Allowances:
    """Sizes in bytes and a number of calls; None: no limit.

    ``max_memory`` alone ends no call.  A hard limit alone counts between calls, too, or what a call left
    would end the next one.

    Raises:
        ValueError: (as :class:`~onnx_dl.errors.ConfigError`) one cannot be, or the hard limit is the lower.
    """
    soft = None if max_memory is None else parse_size(max_memory)
    hard = None if max_memory_hard is None else parse_size(max_memory_hard)
    if soft is not None and hard is not None and hard < soft:
        raise ConfigError(
            f"max_memory_hard={max_memory_hard!r} is less than max_memory={max_memory!r}: a worker would be "
            "ended during a run before it could be replaced between two. Give max_memory_hard the larger one."
        )
    return Allowances(hard if soft is None else soft, hard, parse_runs(max_runs))


_SIZES: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SIZE: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", re.IGNORECASE)


def parse_size(value: object) -> int:
    """A number of bytes: an int, or text such as ``"2GiB"``, ``"500 MB"``.

    Raises:
        ValueError: (as :class:`~onnx_dl.errors.ConfigError`) it is neither.
    """
    match = _SIZE.fullmatch(str(value)) if isinstance(value, str | numbers.Integral) else None
    nbytes = float(match[1]) * _SIZES[(match[2] or "").lower()] if match else math.inf
    if isinstance(value, bool) or nbytes >= 2**63:
        raise ConfigError(
            f'{value!r} is no size; write a number of bytes or, for example, "2GiB" or "500MB".'
        )
    return int(nbytes)


_ADDRESS: Final = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:\[\]/]+):(\d{1,5})")


def parse_address(value: str) -> tuple[str, int]:
    """Host and port of text such as ``"127.0.0.1:9464"``, ``"localhost:0"``, ``"[::1]:9464"``.

    Raises:
        ValueError: (as :class:`~onnx_dl.errors.ConfigError`) it is none.
    """
    match = _ADDRESS.fullmatch(value)
    if match is None or int(match[2]) > 65535:
        raise ConfigError(
            f"{value!r} is no address; write host:port, such as 127.0.0.1:9464, or 0.0.0.0:9464 to be "
            "reached from everywhere."
        )
    return match[1].strip("[]"), int(match[2])


_CHOICES: Final = {
    "start": ("fork", "exec"),
    "lane": ("socket", "zmq"),
    "cache": ("on", "off"),
    "worker_stderr": ("inherit", "log"),
}


def parse_worker_stderr(value: object) -> str:
    """``"inherit"`` or ``"log"``.

    Raises:
        ValueError: (as :class:`~onnx_dl.errors.ConfigError`) it is neither.
    """
    if value not in _CHOICES["worker_stderr"]:
        raise ConfigError(f'worker_stderr={value!r} is neither "inherit" nor "log".')
    return str(value)
