"""Work on many items in processes that may crash: the item is reported, and another process goes on."""

from __future__ import annotations

import collections
import dataclasses
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

SILENCE = 120.0
"""Seconds without a word after which processes count as hung."""
_forks = multiprocessing.get_context("fork")

Work = Callable[[Sequence[Any], Callable[..., None]], None]
"""Does items in order; says ``("now", ...)`` as often as it likes, ``("done", result)`` after each item."""


@dataclasses.dataclass
class Crashed:
    """What became of an item whose process ended."""

    item: Any
    last_words: tuple[Any, ...]
    exitcode: int | None


class _Crew:
    """One process at a time, and the items that are left."""

    def __init__(self, work: Work, items: Sequence[Any]) -> None:
        self.work = work
        self.left = collections.deque(items)
        self.start()

    def start(self) -> None:
        """A process that does what is left."""
        self.last_words: tuple[Any, ...] = ()
        self.pipe, theirs = _forks.Pipe(duplex=False)
        self.process = _forks.Process(target=_work, args=(self.work, list(self.left), theirs))
        self.process.start()
        theirs.close()

    def hear(self) -> Iterator[Any]:
        """What is finished, if anything."""
        try:
            kind, *words = self.pipe.recv()
        except EOFError:
            self.process.join()
            self.pipe.close()
            if self.left:
                yield Crashed(self.left.popleft(), self.last_words, self.process.exitcode)
                if self.left:
                    self.start()
            return
        if kind == "now":
            self.last_words = tuple(words)
        else:
            self.left.popleft()
            self.last_words = ()
            yield words[0]


def _work(work: Work, items: Sequence[Any], pipe: Connection) -> None:
    work(items, lambda *words: pipe.send(words))


def each(work: Work, items: Sequence[Any], jobs: int) -> Iterator[Any]:
    """The results of all items, and a :class:`Crashed` for each that a process did not survive."""
    crews = [_Crew(work, share) for i in range(jobs) if (share := items[i::jobs])]
    while pipes := {crew.pipe: crew for crew in crews if not crew.pipe.closed}:
        ready = wait(list(pipes), SILENCE)
        if not ready:
            for crew in pipes.values():
                crew.process.kill()
        for pipe in ready:
            yield from pipes[pipe].hear()
