"""``onnx-dl ps`` and ``onnx-dl top``: a host's models, once and again and again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import msgspec

from onnx_dl.console.history import History
from onnx_dl.console.hosts import alive
from onnx_dl.console.output import console, quiet_end, say
from onnx_dl.console.table import live, overview
from onnx_dl.host import ModelHost

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_REMEMBERED: Final = 300.0
"""Seconds of which memory is shown, as long as that is not more samples than fit on a line anyway."""
_SAMPLES: Final = 600


def ps(host: ModelHost, *, as_json: bool) -> None:
    """Prints the host's models; as JSON, the snapshot in one line."""
    snapshot = alive(host.snapshot())
    with quiet_end():
        if as_json:
            say(msgspec.json.encode(snapshot).decode())
        else:
            terminal = console()
            terminal.print(overview(snapshot, terminal.width))


def top(host: ModelHost, interval: float) -> None:
    """Shows the host's models every ``interval`` seconds until Ctrl-C, which is no error.

    Where stdout is no terminal, one picture after the other is printed.

    Raises:
        SupervisorDied: the host has ended.
    """
    terminal = console()
    history = History(max(2, min(_SAMPLES, round(_REMEMBERED / interval) + 1)))

    def picture() -> RenderableType:
        snapshot = alive(host.snapshot())
        history.add(snapshot, time.monotonic())
        return live(snapshot, history, terminal.width)

    show = _on_screen if terminal.is_terminal and not terminal.is_dumb_terminal else _one_by_one
    with contextlib.suppress(KeyboardInterrupt), quiet_end():
        show(terminal, picture, interval)


def _on_screen(terminal: Console, picture: Callable[[], RenderableType], interval: float) -> None:
    from rich.live import Live

    shown = Live(picture(), console=terminal, screen=True, auto_refresh=False)
    try:  # from before it starts: Ctrl-C may come while the first picture is drawn
        shown.start(refresh=True)
        while True:
            time.sleep(interval)
            shown.update(picture(), refresh=True)
    finally:
        shown.stop()  # the terminal is as it was before


def _one_by_one(terminal: Console, picture: Callable[[], RenderableType], interval: float) -> None:
    while True:
        terminal.print(picture())
        terminal.print()
        time.sleep(interval)
