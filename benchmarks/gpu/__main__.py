"""``python -m benchmarks.gpu [--quick] [--only NAME ...] [--rounds N] [--json FILE]``

onnx-dl beside onnxruntime in-process on one GPU: ways take turns in short blocks within each round, figures
are medians over rounds.  In three minutes at most: what does not fit into that is left out, and told.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

# Models load plainly unless it is the load cache that is measured, and the user's is left alone.
os.environ["ONNX_DL_CACHE"] = "off"
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from benchmarks import report
from benchmarks.calls import OURS
from benchmarks.gpu import calls, loads, machine, variants
from benchmarks.gpu.works import Work, works
from benchmarks.report import Row

ROUNDS, QUICK = 9, 2
SECONDS: Final = 150.0
"""No part begins later than that; the longest takes half a minute."""


def _parts(stack: contextlib.ExitStack, all_works: dict[str, Work]) -> dict[str, Callable[[int], list[Row]]]:
    """What can be asked for; each takes the number of rounds and gives rows."""
    paths: list[Path] = []

    def large() -> Path:
        if not paths:
            paths.append(stack.enter_context(loads.large_file()))
        return paths[0]

    return {
        **{key: lambda rounds, work=work: calls.measure(work, rounds) for key, work in all_works.items()},
        "threads": lambda rounds: calls.threads(all_works["conv"], max(2, rounds // 2)),
        "loads": lambda rounds: loads.measure(large(), max(1, rounds // 3)),
        "memory": lambda rounds: [
            *loads.left(large(), max(1, rounds // 3)),
            *loads.three(max(1, rounds // 4)),
        ],
        "device": lambda rounds: [
            *calls.bound(all_works["tiny"], rounds),
            *calls.bound(all_works["67mb"], rounds),
        ],
        "variants": lambda rounds: variants.measure(all_works["conv"], max(1, rounds // 2)),
    }


def _arguments(argv: Sequence[str] | None, parts: list[str]) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[1])
    parser.add_argument(
        "--only", nargs="+", choices=parts, default=parts, metavar="NAME", help=f"of {', '.join(parts)}"
    )
    parser.add_argument("--rounds", type=int, help=f"({ROUNDS})")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} rounds: does it run? not: how fast?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # and end all children
    with contextlib.ExitStack() as stack:
        all_works = works()
        parts = _parts(stack, all_works)
        arguments = _arguments(argv, list(parts))
        if (why := machine.why_not(all_works["tiny"].model)) is not None:
            sys.exit(f"There is nothing to measure: {why}.")
        rounds = arguments.rounds or (QUICK if arguments.quick else ROUNDS)
        found: dict[str, Any] = {"machine": report.machine() | machine.described(), "rounds": rounds}
        rows: list[Row] = []
        try:
            for name in arguments.only:
                rows += _measured(name, parts[name], rounds, began)
        finally:  # what was measured before something failed was measured
            _report(arguments, rows, found)


def _measured(name: str, part: Callable[[int], list[Row]], rounds: int, began: float) -> list[Row]:
    started = time.monotonic()
    if started - began > SECONDS:
        return [Row(name, OURS, None, note="no time was left: --only")]
    rows = part(rounds)
    # At once, too: if a later part ends this process, as a crash of CUDA does, the figures are not lost.
    print(f"{name}: {time.monotonic() - started:.0f} s\n{report.table(rows)}", file=sys.stderr, flush=True)
    return rows


def _report(arguments: argparse.Namespace, rows: list[Row], found: dict[str, Any]) -> None:
    print(json.dumps(found["machine"]))
    print(report.table(rows))
    report.write(rows, found, arguments.json)


if __name__ == "__main__":
    main()
