"""``python -m benchmarks.serving [--quick] [--only NAME ...] [--rounds N] [--peers PYTHON] [--json FILE]``

Servers take turns in short blocks within each round; each block is called by one client or by eight, which
are processes of their own.  A figure is the median over the rounds; a ratio to tritonserver is taken within a
round, between blocks that ran right after each other.  ``--peers``, or ONNX_DL_BENCH_PEERS, is an interpreter
with ``nvidia-pytriton``, ``mlserver`` and ``onnxruntime``; what it lacks is left out, with a reason.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.report import Row
from benchmarks.serving import memory, turns
from benchmarks.serving.clients import Clients
from benchmarks.serving.servers import SERVERS, NotInstalled, Peer, Server
from benchmarks.serving.works import Work, works

WORKS = ("tiny", "5mb", "conv")
PARTS = (*WORKS, "memory")
ROUNDS, QUICK = 5, 1


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Bench:
    """Makes servers in a folder; those that cannot be made are told once."""

    def __init__(self, folder: Path, peers: str | None, names: Sequence[str]) -> None:
        self._folder, self._peers, self._names = folder, peers, names
        self._count = 0
        self.missing: dict[str, str] = {}

    @contextlib.contextmanager
    def run(self, kind: type[Server], served: Sequence[Work], loaded: Sequence[str]) -> Iterator[Server]:
        """A server that runs.  Raises NotInstalled."""
        self._count += 1
        folder = self._folder / str(self._count)
        if not issubclass(kind, Peer):
            server = kind(folder, served, loaded=loaded)
        elif self._peers is None:
            raise NotInstalled("no --peers")
        else:
            server = kind(folder, served, loaded=loaded, python=self._peers)
        try:
            server.start()
            yield server
        finally:
            server.stop()

    def kinds(self) -> list[type[Server]]:
        return [kind for kind in SERVERS if not self._names or kind.name in self._names]


def _calls(bench: Bench, clients: Clients, names: Sequence[str], rounds: int, quick: bool) -> Iterator[Row]:
    """All servers at once, but one of them is called at a time."""
    served = list(works(names).values())
    with contextlib.ExitStack() as stack:
        running = []
        for kind in bench.kinds():
            try:
                running.append(stack.enter_context(bench.run(kind, served, names)))
            except NotInstalled as error:
                bench.missing[kind.name] = str(error)
        for work in served:
            started = time.monotonic()
            yield from turns.measure(running, clients, work, rounds, quick=quick)
            _say(f"{work.name}: {time.monotonic() - started:.0f} s")


def _memory(bench: Bench, clients: Clients, quick: bool) -> Iterator[Row]:
    """Each server alone: one after another."""
    for kind in bench.kinds():
        if not {"HTTP", "gRPC"} <= set(kind.ways):
            continue
        work = works([memory.LARGE])[memory.LARGE]
        with contextlib.suppress(NotInstalled), bench.run(kind, [work], []) as server:
            yield from memory.after_unload(server, clients, work, 2 if quick else 5, 2 if quick else 8)
            for way in ("HTTP", "gRPC"):
                yield from memory.after_requests(server, clients, work, way, 1 if quick else 10)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__.split("\n\n")[1]
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, metavar="NAME", help=", ".join(PARTS)
    )
    parser.add_argument("--servers", nargs="+", choices=[kind.name for kind in SERVERS], metavar="NAME")
    parser.add_argument("--rounds", type=int, help=f"({ROUNDS})")
    parser.add_argument("--quick", action="store_true", help="short blocks: does it run? not: how fast?")
    parser.add_argument("--peers", metavar="PYTHON", default=os.environ.get("ONNX_DL_BENCH_PEERS"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # and end all children
    rounds = arguments.rounds or (QUICK if arguments.quick else ROUNDS)
    found: dict[str, Any] = {"machine": report.machine(), "rounds": rounds}
    rows: list[Row] = []
    clients = Clients(8)
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            bench = Bench(Path(folder), arguments.peers, arguments.servers)
            if names := [name for name in WORKS if name in arguments.only]:
                rows.extend(_calls(bench, clients, names, rounds, arguments.quick))
            if "memory" in arguments.only:
                started = time.monotonic()
                rows.extend(_memory(bench, clients, arguments.quick))
                _say(f"memory: {time.monotonic() - started:.0f} s")
            rows += [Row("servers", name, None, note=why) for name, why in bench.missing.items()]
    finally:  # what was measured before something failed was measured
        clients.stop()
        print(report.table(rows))
        report.write(rows, found, arguments.json)


if __name__ == "__main__":
    main()
