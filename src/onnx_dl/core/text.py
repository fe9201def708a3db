"""Durations, model names and sparklines as text for people."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Final

_BARS: Final = " ▁▂▃▄▅▆▇█"
_DIGEST: Final = 8
_BYTES: Final = "bytes:"
_GROUP: Final = "group:"


def duration(seconds: float) -> str:
    """``0.0123`` as ``12 ms``, ``75`` as ``1 m 15 s``."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} m {rest} s" if rest else f"{minutes} m"
    return f"{minutes // 60} h {minutes % 60} m"


def file_name(model: str) -> str:
    """The name of a model without its folders: ``asr.onnx``, ``bytes:1f2e3d4c5b6a``, ``group speech``."""
    if model.startswith(_GROUP):
        return f"group {model.removeprefix(_GROUP)}"
    return model.rstrip("/").rpartition("/")[2] or model


def printable(text: str) -> str:
    """Replaces characters that a terminal would obey, which a file's name may have, by question marks."""
    return "".join(each if each.isprintable() else "?" for each in text)


def is_path(model: str) -> bool:
    """True for a model that was given as a path: neither as bytes nor a group."""
    return not model.startswith((_GROUP, _BYTES))


def short_names(models: Sequence[tuple[str, str]]) -> list[str]:
    """A short name for each (model, key): the file name, with as much of its folder as makes it unique.

    Models of one file with different keys get the first digits of the key added.
    """
    ways = collections.Counter(model for model, _ in models)
    paths = list(ways)
    names = {path: _shortest(path, paths) for path in paths}
    return [f"{names[model]} ({key[:_DIGEST]})" if ways[model] > 1 else names[model] for model, key in models]


def _shortest(path: str, paths: Sequence[str]) -> str:
    """The shortest tail of a path that no other path has."""
    for parts in range(1, path.count("/") + 1):
        name = _tail(path, parts)
        if all(other == path or _tail(other, parts) != name for other in paths):
            return name
    return _tail(path, path.count("/") + 1)


def _tail(model: str, parts: int) -> str:
    if model.startswith(_BYTES):
        return model[: len(_BYTES) + _DIGEST]
    return "/".join(model.split("/")[-parts:])


def sparkline(values: Sequence[float], width: int, top: float) -> str:
    """``values`` as ``width`` bars, each the largest of its values: ``top`` is a full bar, zero a space."""
    if not values:
        return " " * width
    bars = []
    for column in range(width):
        first = column * len(values) // width
        last = max(first + 1, (column + 1) * len(values) // width)
        bars.append(_bar(max(values[first:last]), top))
    return "".join(bars)


def _bar(value: float, top: float) -> str:
    if value <= 0 or top <= 0:
        return _BARS[0]
    return _BARS[max(1, min(len(_BARS) - 1, round(value / top * (len(_BARS) - 1))))]


def format_bytes(count: int) -> str:
    """``12345678`` as ``12.3 MB``, ``20_220_800_000`` as ``20.2 GB``."""
    return f"{count / 1e9:.1f} GB" if count >= 10**10 else f"{count / 1e6:.1f} MB"
