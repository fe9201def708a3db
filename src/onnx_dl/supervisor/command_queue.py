"""Carries out the scheduler's commands: a table of handlers by type of command."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from onnx_dl.supervisor.boundary import boundary
from onnx_dl.supervisor.policy.commands import Command

_C = TypeVar("_C", bound=Command)
Run = Callable[[Iterable[Command]], None]
"""Carries out commands: :meth:`CommandQueue.run`."""


class CommandQueue:
    """Carries out commands in the order in which they were decided, also where one leads to others."""

    def __init__(self) -> None:
        self._handlers: dict[type[object], Callable[[Any], object]] = {}
        self._failed: dict[type[object], Callable[[Any, Exception], object]] = {}
        self._waiting: collections.deque[Command] = collections.deque()
        self._running = False

    def on(
        self,
        kind: type[_C],
        handler: Callable[[_C], object],
        failed: Callable[[_C, Exception], object] = lambda command, error: None,
    ) -> None:
        """Registers the handler of a type of command.  ``failed`` is called if the handler raises."""
        self._handlers[kind], self._failed[kind] = handler, failed

    def run(self, commands: Iterable[Command]) -> None:
        """Carries out commands after those that wait.  Called by a handler, it only queues them."""
        self._waiting.extend(commands)
        if self._running:
            return
        self._running = True
        try:
            while self._waiting:
                self.perform(self._waiting.popleft())
        finally:
            self._running = False

    def perform(self, command: Command) -> None:
        """Carries out one command at once.  A failure is reported, and ends only what it concerns."""
        kind = type(command)
        with boundary(f"{kind.__name__} failed", lambda error: self._failed[kind](command, error)):
            self._handlers[kind](command)
