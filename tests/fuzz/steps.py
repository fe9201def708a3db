"""What both fuzzers are: steps drawn by a seed, told where they failed, ended where they hang."""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import gc
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from tests.support.waiting import eventually

HANG: Final = 120.0
"""Seconds after which a step hangs."""

Step = Callable[[random.Random], str | None]
"""Does something with what it draws, and may say what."""


class Wrong(AssertionError):
    """An answer that is not onnxruntime's, or none."""


def arguments(name: str, kinds: Mapping[str, int], argv: list[str] | None) -> argparse.Namespace:
    """Of a fuzzer with steps of these kinds."""
    parser = argparse.ArgumentParser(prog=f"python -m tests.{name}")
    parser.add_argument("--minutes", type=float, default=1.0, help="how long to go on (1)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed draws the same steps (1)")
    parser.add_argument("--steps", type=int, default=None, help="end after so many, to see one again")
    parser.add_argument("--only", nargs="+", choices=kinds, default=list(kinds), help="kinds of steps")
    parser.add_argument("--without", nargs="+", choices=kinds, default=[], help="kinds of steps")
    parser.add_argument("--verbose", action="store_true", help="tell each step")
    return parser.parse_args(argv)


class Watch:
    """Ends the process, with every thread's stack, if a step takes too long."""

    def __init__(self, limit: float = HANG) -> None:
        self._limit = limit
        self._what = ""
        self._changed = threading.Condition()
        self._pid = os.getpid()
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    @contextlib.contextmanager
    def over(self, what: str) -> Iterator[None]:
        self._set(what)
        try:
            yield
        finally:
            if os.getpid() == self._pid:
                self._set("")

    def _set(self, what: str) -> None:
        with self._changed:
            self._what = what
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while True:
                hangs = not self._changed.wait(self._limit if self._what else None)
                if hangs and self._what:
                    print(f"HANGS: {self._what}", file=sys.stderr, flush=True)
                    faulthandler.dump_traceback(all_threads=True)
                    os._exit(3)


class Player:
    """Plays steps until the time is up or one fails."""

    def __init__(self, name: str, given: argparse.Namespace, weights: Mapping[str, int]) -> None:
        self._name = name
        self._given = given
        self._weights = {k: weights[k] for k in given.only if k not in given.without}
        self._done: collections.Counter[str] = collections.Counter()
        self._last: collections.deque[str] = collections.deque(maxlen=30)

    def play(self, steps: Mapping[str, Step]) -> int:
        """The exit status: 0 if nothing was wrong."""
        watch, started = Watch(), time.monotonic()
        end = started + 60 * self._given.minutes
        number = 0
        while time.monotonic() < end and number != self._given.steps:
            rng = random.Random(f"{self._given.seed}/{number}")
            (kind,) = rng.choices(list(self._weights), list(self._weights.values()))
            where = f"seed {self._given.seed}, step {number}, {kind}"
            try:
                with watch.over(where):
                    said = steps[kind](rng)
            except Exception:
                self._tell(where)
                return 1
            self._note(f"{number} {kind}: {said or ''}")
            self._done[kind] += 1
            number += 1
        took = time.monotonic() - started
        print(f"{self._name}: {number} steps in {took:.0f} s, nothing wrong; {dict(self._done)}", flush=True)
        return 0

    def _note(self, line: str) -> None:
        self._last.append(line)
        if self._given.verbose:
            print(line, flush=True)

    def _tell(self, where: str) -> None:
        print("\n".join(["The last steps:", *self._last]), file=sys.stderr)
        traceback.print_exc()
        again = f"python -m tests.{self._name} --seed {self._given.seed} --minutes 60"
        print(f"WRONG: {where}. To see it again: {again}", file=sys.stderr, flush=True)


def ended(status: int, descriptors: int) -> int:
    """The exit status of a program that closed everything: 1 where something is left all the same."""
    if left := leftovers(descriptors):
        print("LEFT:", *left, sep="\n  ", file=sys.stderr)
        return 1
    return status


def leftovers(descriptors: int) -> list[str]:
    """What this process still has, some seconds after it closed everything."""
    left: list[str] = []

    def nothing_is_left() -> bool:
        gc.collect()
        left[:] = _left(descriptors)
        return not left

    with contextlib.suppress(AssertionError):  # the caller tells of it
        eventually(nothing_is_left, "nothing is left", 10)
    return left


def _left(descriptors: int) -> list[str]:
    children = [f"process {pid}" for pid in _children()]
    links = {fd: _link(fd) for fd in os.listdir("/proc/self/fd")}
    ours = [f"descriptor {fd}: {link}" for fd, link in links.items() if "onnx-dl" in link]
    with open("/proc/self/maps") as maps:
        mapped = [line.strip() for line in maps if "memfd:onnx-dl" in line]
    more = [f"{len(links)} descriptors, {descriptors} before"] if len(links) > descriptors else []
    return [*children, *ours, *mapped, *more]


def _children() -> list[str]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return file.read().split()


def _link(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""
