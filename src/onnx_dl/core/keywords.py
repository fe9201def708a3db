"""Unknown keywords: the name that the user may have meant, and the warning about it.

A misspelt keyword must not be lost: a proxy with ``tll=3`` would keep its model loaded for ever.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Collection, Iterable, Sequence
from types import FrameType
from typing import Final

_SHORT: Final = 4
"""Characters of a short name, in which one wrong letter is a large part."""
_CUTOFF: Final = 0.75
_CUTOFF_OF_SHORT: Final = 0.66
"""Least ratios of :class:`difflib.SequenceMatcher`: one wrong letter of three has 0.67."""

_OTHER_WORDS: Final = {
    "ttl": (
        "time_to_live", "keep_alive", "idle_timeout", "idle", "timeout", "expires", "expire_after", "expiry",
        "lifetime", "max_idle", "unload_after",
    ),
    "max_memory": ("max_mem", "memory", "memory_limit", "mem_limit", "max_ram", "ram", "max_rss"),
    "max_memory_hard": ("hard_limit", "memory_limit_hard", "hard_memory_limit"),
    "max_runs": ("max_calls", "max_requests", "max_tasks", "max_uses"),
    "environment": ("env", "envs", "environ", "env_vars", "variables"),
    "pin": ("keep", "never_evict"),
    "eager": ("preload", "lazy", "load_now"),
    "group": ("worker", "worker_group", "model_group"),
    "sess_options": ("options", "session_options", "session_opts", "so"),
    "providers": ("ep", "eps", "execution_providers"),
    "in_process": ("local", "in_proc"),
}  # fmt: skip
"""Names of the same thing in other programs, by ours."""


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known name that ``name`` may stand for, or None.

    Compares letters only, so ``TTL`` and ``maxMemory`` are found; then words that other programs use; then
    misspellings.
    """
    plain = _plain(name)
    by_plain = {_plain(each): each for each in known}
    if (found := by_plain.get(plain)) is not None:
        return found
    for ours, words in _OTHER_WORDS.items():
        if ours in known and plain in map(_plain, words):
            return ours
    short = [each for each in by_plain if len(each) <= _SHORT]
    long = [each for each in by_plain if len(each) > _SHORT]
    near = difflib.get_close_matches(plain, short, 1, _CUTOFF_OF_SHORT)
    near += difflib.get_close_matches(plain, long, 1, _CUTOFF)
    best = max(near, key=lambda each: difflib.SequenceMatcher(None, plain, each).ratio(), default=None)
    return None if best is None else by_plain[best]


def hint(names: Iterable[str], known: Collection[str]) -> str:
    """The end of an error about unknown names: `` Did you mean ttl?``, or nothing."""
    near = list(dict.fromkeys(found for name in names if (found := nearest(name, known)) is not None))
    return f" Did you mean {' and '.join(near)}?" if near else ""


def warn_of_slips(names: Iterable[str], known: Collection[str], inside: Sequence[str]) -> None:
    """Warns of each name that is close to a known one, at the line of the user's call.

    Other unknown names are ignored silently, as onnxruntime does: packages pass keywords of their own.

    Args:
        names: unknown keywords of a call.
        known: the keywords that exist.
        inside: packages whose frames are not the user's, such as ``("onnx_dl",)``.
    """
    for name in names:
        if (near := nearest(name, known)) is not None:
            text = f"{name} is not an argument of a session and is ignored; did you mean {near}?"
            warnings.warn(text, stacklevel=_level(sys._getframe(), inside))


def _level(frame: FrameType | None, inside: Sequence[str]) -> int:
    """The ``stacklevel``, for a warning in ``frame``, of the nearest caller that is in no package of
    ``inside``."""
    level = 1
    while frame is not None and frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in inside:
            return level
        frame, level = frame.f_back, level + 1
    return level


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()
