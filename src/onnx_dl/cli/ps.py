"""``onnx-dl ps`` and ``onnx-dl top``: shows the models of a host, once or repeatedly."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from onnx_dl.cli.hosts import check_alive, connected
from onnx_dl.cli.output import console, print_line
from onnx_dl.cli.table import History, live, overview
from onnx_dl.core.status import Snapshot
from onnx_dl.errors import SupervisorError
from onnx_dl.host.model_host import ModelHost
from onnx_dl.transport import running_hosts
from onnx_dl.transport.running_hosts import RunningHost

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_HISTORY: Final = 300.0
"""Seconds of memory history that are shown."""
_MOST_SAMPLES: Final = 600


def ps(name: str, *, as_json: bool) -> None:
    """Prints the models of the host of this name, and all running hosts of that name; as JSON, in one line.

    Raises:
        SupervisorError: no host of this version runs.  Hosts of other versions are printed before.
    """
    snapshot, failure = None, None
    try:
        with connected(name) as host:
            snapshot = check_alive(host.snapshot())
    except SupervisorError as error:
        failure = error
    found = running_hosts.running(name)
    if snapshot is not None or found:
        _print(snapshot or Snapshot(0, None, [], name), found, as_json=as_json)
    if failure is not None:
        raise failure


def _print(snapshot: Snapshot, found: Sequence[RunningHost], *, as_json: bool) -> None:
    if as_json:
        data = msgspec.to_builtins(snapshot) | {"hosts": host_data(found)}
        print_line(msgspec.json.encode(data).decode())
        return
    terminal = console()
    if snapshot.supervisor_pid is not None:
        terminal.print(overview(snapshot, terminal.width))
    for line in host_lines(found):
        terminal.print(line, markup=False)


def host_lines(found: Sequence[RunningHost]) -> list[str]:
    """One line for each host."""
    return [f"Host: {running_hosts.describe(host)}. {_remark(host, found)}".rstrip() for host in found]


def host_data(found: Sequence[RunningHost]) -> list[dict[str, object]]:
    """The hosts as plain data for JSON; times are Unix times in seconds."""
    return [
        {
            "name": host.name,
            "protocol": host.protocol,
            "package": host.package,
            "pid": host.pid,
            "since": host.since,
            "kept": host.managed,
            "reachable": host.reachable,
            "leaving": running_hosts.successor(host, found) is not None,
        }
        for host in found
    ]


def _remark(host: RunningHost, found: Sequence[RunningHost]) -> str:
    if not host.reachable:
        return f"This version of onnx-dl cannot connect to it. {running_hosts.outlook(host, found)}"
    return running_hosts.outlook(host, found) if running_hosts.successor(host, found) is not None else ""


def top(host: ModelHost, interval: float) -> None:
    """Shows the host's models every ``interval`` seconds until Ctrl-C.

    If stdout is not a terminal, prints one picture after the other.

    Raises:
        SupervisorDied: the host has ended.
    """
    terminal = console()
    history = History(max(2, min(_MOST_SAMPLES, round(_HISTORY / interval) + 1)))

    def picture() -> RenderableType:
        snapshot = check_alive(host.snapshot())
        history.add(snapshot, time.monotonic())
        return live(snapshot, history, terminal.width)

    show = _on_screen if terminal.is_terminal and not terminal.is_dumb_terminal else _one_by_one
    with contextlib.suppress(KeyboardInterrupt):
        show(terminal, picture, interval)


def _on_screen(terminal: Console, picture: Callable[[], RenderableType], interval: float) -> None:
    from rich.live import Live

    shown = Live(picture(), console=terminal, screen=True, auto_refresh=False)
    try:  # before start(): Ctrl-C may come while the first picture is drawn
        shown.start(refresh=True)
        while True:
            time.sleep(interval)
            shown.update(picture(), refresh=True)
    finally:
        shown.stop()  # restores the terminal


def _one_by_one(terminal: Console, picture: Callable[[], RenderableType], interval: float) -> None:
    while True:
        terminal.print(picture())
        terminal.print()
        time.sleep(interval)
