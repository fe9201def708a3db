"""Feeds the decoders; whatever is wrong ends it with all that is needed to have it again."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import threading
import time
from collections import Counter

from tests.fuzz import decoders
from tests.support.waiting import allowed

SLOW = 2.0
"""Seconds that one frame may take."""


class Fault(AssertionError):
    """A decoder did what it must not."""


def feed(frames: int, seed: int, only: str = "") -> Counter[str]:
    """So many frames, over all decoders.

    Raises:
        Fault: says which decoder, which frame and what came out.
    """
    before = _belongings()
    counts = _fed(frames, seed, only)  # in a frame of its own, which keeps no target
    after = _belongings()
    if after != before:
        raise Fault(f"left behind: {after} after {before}")
    return counts


def _fed(frames: int, seed: int, only: str) -> Counter[str]:
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        targets = [target for target in decoders.all_of(rng, stack) if only in target.name]
        weights = [target.share for target in targets]
        for number in range(frames):
            target = rng.choices(targets, weights)[0]
            give(target, target.mutator.frame(), f"seed {seed}, frame {number}")
            counts[target.name] += 1
    return counts


def give(target: decoders.Target, data: bytes, which: str) -> None:
    began = time.perf_counter()
    try:
        target.take(data)
    except target.allowed:
        pass
    except Exception as error:
        raise Fault(f"{target.name}: {which}: {type(error).__name__}: {error}\n{_shown(data)}") from error
    took = time.perf_counter() - began
    if took > SLOW and took > allowed(SLOW):
        raise Fault(f"{target.name}: {which}: took {took:.1f} s\n{_shown(data)}")


def _shown(data: bytes) -> str:
    return f"{data[:600]!r}" + (f" and {len(data) - 600} bytes" if len(data) > 600 else "")


def _belongings() -> tuple[list[str], int]:
    gc.collect()
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(found), threading.active_count()
