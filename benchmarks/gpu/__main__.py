"""``python -m benchmarks.gpu [--quick] [--only NAME ...] [--rounds N] [--json FILE]``

onnx-dl beside onnxruntime in-process on one GPU: ways take turns in short blocks within each round, figures
are medians over rounds.  In three minutes at most: what does not fit into that is left out, and told.  Rows
are printed as they are found, on stderr, and the file has them from then on.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

# Models load plainly unless it is the load cache that is measured, and the user's is left alone.
os.environ["ONNX_DL_CACHE"] = "off"
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from benchmarks import report
from benchmarks.calls import OURS
from benchmarks.gpu import calls, loads, machine, variants
from benchmarks.gpu.works import Work, works
from benchmarks.report import Row

ROUNDS, QUICK = 9, 2
BEGINS, ENDS, KILLED = 150.0, 165.0, 176
"""Seconds: no part begins later; the one that is not ready then is given up; a process that hangs ends."""

_Part = Callable[[int], Iterable[list[Row]]]
"""Takes the number of rounds, and gives rows as it finds them."""


def _parts(stack: contextlib.ExitStack, all_works: dict[str, Work]) -> dict[str, _Part]:
    """What can be asked for, in the order in which it is measured: first what takes least."""
    paths: list[Path] = []

    def large() -> Path:
        if not paths:
            paths.append(stack.enter_context(loads.large_file()))
        return paths[0]

    return {
        **{key: lambda rounds, work=work: [calls.measure(work, rounds)] for key, work in all_works.items()},
        "device": lambda rounds: (calls.bound(all_works[key], rounds) for key in ("tiny", "67mb")),
        "threads": lambda rounds: [calls.threads(all_works["conv"], max(2, rounds // 2))],
        "three": lambda rounds: [loads.three(max(1, rounds // 4))],
        "left": lambda rounds: [loads.left(large(), max(1, rounds // 3))],
        "loads": lambda rounds: loads.measure(large(), max(1, rounds // 3)),
        "variants": lambda rounds: [variants.measure(all_works["conv"], max(1, rounds // 2))],
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
        failed: list[str] = []

        def keep(more: list[Row]) -> None:
            rows.extend(more)
            report.write(rows, found, arguments.json)

        _limit_time(began)
        try:
            for name in arguments.only:
                if time.monotonic() - began > BEGINS:
                    keep([Row(name, OURS, None, note="no time was left: --only")])
                elif not _measure(name, parts[name], rounds, keep):
                    failed.append(name)
        finally:  # also if it is ended
            signal.alarm(0)
            print(json.dumps(found["machine"]))
            print(report.table(rows), flush=True)
            keep([])
    faulthandler.cancel_dump_traceback_later()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _limit_time(began: float) -> None:
    left = began - time.monotonic()
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(f"ended after {ENDS:.0f} s"))
    signal.setitimer(signal.ITIMER_REAL, left + ENDS)
    faulthandler.dump_traceback_later(left + KILLED, exit=True)  # also where CUDA does not return


def _measure(name: str, part: _Part, rounds: int, keep: Callable[[list[Row]], None]) -> bool:
    """False if it failed: the other parts may work."""
    started = time.monotonic()
    try:
        for rows in part(rounds):
            keep(rows)
            seconds = time.monotonic() - started
            print(f"{name}: {seconds:.0f} s\n{report.table(rows)}", file=sys.stderr, flush=True)
    except Exception as error:
        keep([Row(name, OURS, None, note=f"failed: {type(error).__name__}: {error}")])
        traceback.print_exc()
        return False
    return True


if __name__ == "__main__":
    main()
